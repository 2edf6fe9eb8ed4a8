"""Deltas folded into the base's own weights: a plain model that computes what the adapted one computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..adapters import Parts, at_layers, form_of
from ..errors import ModelError
from ..model.tables import sharing
from ..tree import Params


def merge(base: nn.Module, deltas: Params) -> nn.Module:
    """`base` (a plain copy, changed and returned) with the model-ready `deltas` of one client in its weights.

    Raises ModelError for deltas that no weight can hold: bottlenecks, and biases where the base has none.
    """
    modules = dict(base.named_modules())
    for layer, each in at_layers({k: v.detach() for k, v in deltas.items()}).items():
        for parts in each.values():
            _fold(base, layer, modules[layer], parts)
    return base


def _fold(base: nn.Module, layer: str, module: Any, parts: Parts) -> None:
    form = form_of(parts)
    if form.no_merge:
        raise ModelError(f"export: {layer!r}: {form.no_merge}")
    change = form.merge(parts, module)
    if change.weight is not None:
        turned = change.weight.mT if type(module).__name__ == "Conv1D" else change.weight
        homes = sharing(base, module) if isinstance(module, nn.Embedding) else [module]
        _untie(base, homes)
        weight = _moved(module.weight, turned)
        for m in homes:
            m.weight = weight
    if change.bias is not None:
        if module.bias is None:
            raise ModelError(
                f"export: {layer!r} has no bias in the base, so its bias delta cannot be merged; choose other targets"
            )
        module.bias = _moved(module.bias, change.bias)


def _moved(p: Tensor, change: Tensor) -> nn.Parameter:
    return nn.Parameter(p.detach() + change.to(p), requires_grad=False)


def _untie(base: nn.Module, homes: list[Any]) -> None:
    """A weight that an output layer shares is trained at its input only, so the two part."""
    shared = [m for m in base.modules() if m not in homes and getattr(m, "weight", None) is homes[0].weight]
    config: Any = getattr(base, "config", None)
    if shared and config is not None:
        config.tie_word_embeddings = False
