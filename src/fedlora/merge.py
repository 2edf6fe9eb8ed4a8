"""Deltas folded into the base's own weights: a plain model that computes what the adapted one computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .deltas import base_weight, dora_gain
from .errors import ModelError
from .tree import Params


def merge(base: nn.Module, deltas: Params) -> nn.Module:
    """`base` (a plain copy, changed and returned) with the model-ready `deltas` of one client in its weights.

    Raises ModelError for deltas that no weight can hold: bottlenecks, and biases where the base has none.
    """
    modules = dict(base.named_modules())
    at: dict[tuple[str, str], dict[str, Tensor]] = {}
    for k, v in deltas.items():
        at.setdefault((k.site, k.adapter), {})[k.part] = v.detach()
    for (site, _), parts in at.items():
        _fold(base, site, modules[site], parts)
    return base


def _fold(base: nn.Module, site: str, module: Any, parts: Mapping[str, Tensor]) -> None:
    if "down" in parts:
        raise ModelError(
            f"export: the bottleneck after {site!r} is a layer of its own and cannot be merged; export lora or bitfit"
        )
    change = weight_of(parts, module)
    if change is not None:
        turned = change.mT if type(module).__name__ == "Conv1D" else change
        _untie(base, module)
        module.weight = nn.Parameter(module.weight.detach() + turned.to(module.weight), requires_grad=False)
    if "bias" in parts:
        if module.bias is None:
            raise ModelError(
                f"export: {site!r} has no bias in the base, so its bias delta cannot be merged; choose other targets"
            )
        module.bias = nn.Parameter(module.bias.detach() + parts["bias"].to(module.bias), requires_grad=False)


def weight_of(parts: Mapping[str, Tensor], module: Any) -> Tensor | None:
    """What the parts of one adapter add to the weight of their layer, [o i] (norms [h], embeddings [v h])."""
    if "d" in parts:
        return parts["b"][:, None] * (parts["B"] * parts["d"]) @ parts["A"]
    if "m" in parts:
        w = base_weight(module).float()
        c = dora_gain(parts["A"], parts["B"], parts["m"], w)
        return c[:, None] * (w + parts["B"] @ parts["A"]) - w
    if "A" in parts:
        return parts["B"] @ parts["A"]
    if "values" in parts:
        flat = torch.zeros(module.weight.numel(), dtype=parts["values"].dtype)
        return flat.index_copy(0, parts["index"], parts["values"]).view(base_weight(module).shape)
    return next((parts[p] for p in ("weight", "gain", "table") if p in parts), None)


def _untie(base: nn.Module, module: Any) -> None:
    """A weight that an output layer shares is trained at its input only, so the two part."""
    shared = [m for m in base.modules() if m is not module and getattr(m, "weight", None) is module.weight]
    config: Any = getattr(base, "config", None)
    if shared and config is not None:
        config.tie_word_embeddings = False
