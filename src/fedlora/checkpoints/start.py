"""An adapter to start from: a PEFT folder, or a hub id, with LoRA factors and perhaps a trained head."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from ..adapters.base import matches
from ..errors import ModelError
from ..hub import reachable
from ..layers import base_weight

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """What a folder holds. factors: layer -> A [r i] and B [o r], B with its scale; whole: module path -> the tensors saved whole."""

    source: str
    base: str  # what its config calls the base
    factors: Mapping[str, tuple[Tensor, Tensor]]
    whole: Mapping[str, Tensor]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank at each layer."""
        return {layer: len(a) for layer, (a, _) in self.factors.items()}


def read(source: str) -> Adapter:
    """The adapter in a folder or on the hub. Raises ModelError for anything that is no LoRA adapter of linear layers."""
    from safetensors.torch import load_file

    try:
        config = json.loads(_file(source, CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(_file(source, WEIGHTS))  # a pickle is never opened
    except (ValueError, SafetensorError) as e:
        raise ModelError(
            f"model.adapter: {source!r} cannot be read ({e}); save it again with PEFT's save_pretrained"
        ) from e
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if isinstance(config, dict) and config.get("use_dora") else str(dict(config).get("peft_type"))
        raise ModelError(
            f"model.adapter: {source!r} is a {kind} adapter, expected LoRA; merge it into its base and name that as model.name"
        )
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, v in tensors.items():
        path = name.removeprefix(PREFIX)
        if found := re.fullmatch(r"(.+)\.lora_([AB])(?:\.default)?\.weight", path):
            factors.setdefault(found[1], {})[found[2]] = v.float()
        elif "lora_" in path:
            raise ModelError(
                f"model.adapter: {source!r} holds {path}, expected factors of linear layers; merge it into its base and name that as "
                "model.name"
            )
        else:
            whole[path.replace(".modules_to_save.default", "")] = v.float()
    if not factors or any(set(f) != {"A", "B"} for f in factors.values()):
        raise ModelError(
            f"model.adapter: {source!r} holds no pairs of LoRA factors; save it again with PEFT's save_pretrained"
        )
    scaled = {layer: (f["A"], f["B"] * _scale(config, layer)) for layer, f in factors.items()}
    return Adapter(source, str(config.get("base_model_name_or_path") or ""), scaled, whole)


def _scale(config: Mapping[str, Any], layer: str) -> float:
    """alpha / r at a layer, of rsLoRA alpha / sqrt(r), as PEFT reads its patterns."""
    own = lambda field, usual: next((v for p, v in (config.get(field) or {}).items() if matches(p, layer)), usual)  # noqa: E731
    alpha, r = own("alpha_pattern", config["lora_alpha"]), own("rank_pattern", config["r"])
    return float(alpha) / (r**0.5 if config.get("use_rslora") else r)


def _file(source: str, name: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir() or source.startswith((".", "/", "~")):
        if not (folder / name).is_file():
            what = "is no folder" if not folder.is_dir() else f"has no {name}"
            raise ModelError(
                f"model.adapter: {source!r} {what}, expected a folder saved by PEFT's save_pretrained, or a hub id"
            )
        return folder / name
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, name, local_files_only=not reachable()))
    except Exception as e:  # the hub's client raises many kinds, all of which mean that the file cannot be had
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ModelError(
            f"model.adapter: cannot load {name} of {source!r} ({reason}); name a folder, or a hub id that can be reached"
        ) from e


def fitted(
    found: Adapter, base: nn.Module, layers: Sequence[str], head: Sequence[str], names: Sequence[str]
) -> dict[tuple[str, str], Tensor]:
    """(layer, part) -> the start: factors A and B (with its scale) at `layers`, and the head's change from the base's.

    names: what the base is called here. Raises ModelError where the adapter is of other layers or other sizes; warns of a base that
    its config calls otherwise, and of a head that does not fit.
    """
    modules = dict(base.named_modules())
    lost, more = sorted(set(layers) - found.factors.keys()), sorted(found.factors.keys() - set(layers))
    if lost or more:
        which = (
            f"has no factors for {lost[0]!r} ({len(lost)} such layers)"
            if lost
            else f"has factors for {more[0]!r} ({len(more)} more layers)"
        )
        raise ModelError(
            f"model.adapter: {found.source!r} {which}, expected the {len(layers)} layers of model.targets; set model.targets to auto to take "
            f"the adapter's own, or choose an adapter of this base (it was made for {found.base!r})"
        )
    for layer in layers:
        a, b = found.factors[layer]
        weight = base_weight(modules[layer])
        if (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise ModelError(
                f"model.adapter: {found.source!r} has factors of a {b.shape[0]} x {a.shape[1]} weight at {layer!r}, the base has "
                f"{weight.shape[0]} x {weight.shape[1]} there: it is an adapter of another base ({found.base!r}); choose one of this base"
            )
    if found.base and Path(found.base).name not in {Path(n).name for n in names}:
        warnings.warn(
            f"model.adapter: {found.source!r} was made for {found.base!r}, the base here is {names[0]!r}; the sizes fit, so it is used",
            stacklevel=3,
        )
    out = {(layer, part): v for layer in layers for part, v in zip("AB", found.factors[layer], strict=True)}
    return out | _head(found, modules, head)


def _head(found: Adapter, modules: Mapping[str, Any], head: Sequence[str]) -> dict[tuple[str, str], Tensor]:
    """The change of every tensor of the head; nothing where one of them is missing or of another size, which is said."""
    own = {(h, part): p for h in head for part, p in modules[h].named_parameters()}
    if not own or not found.whole:
        return {}
    if any(getattr(found.whole.get(f"{h}.{part}"), "shape", None) != p.shape for (h, part), p in own.items()):
        warnings.warn(
            f"model.adapter: the head of {found.source!r} has other layers or another number of outputs; it is left out",
            stacklevel=4,
        )
        return {}
    return {(h, part): found.whole[f"{h}.{part}"] - p.detach().float().cpu() for (h, part), p in own.items()}
