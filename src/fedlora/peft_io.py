"""Everything that touches PEFT: its table of default targets, and adapters in and out of its on-disk format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelError, near
from .merge import merge
from .tasks import TASKS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .tree import Params

# Architectures that PEFT's table lacks; the query and value projections, as in its entries for their relatives.
ALSO = {"albert": ["query", "value"], "distilbert": ["q_lin", "v_lin"], "deberta-v3": ["query_proj", "value_proj"]}


def default_targets(model_type: str) -> list[str] | str:
    """PEFT's own default LoRA targets of an architecture; raises ModelError where it has none."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE

    found: list[str] | str | None = TABLE.get(model_type, ALSO.get(model_type))
    if found is None:
        raise ModelError(
            f"model.targets: no default targets for architecture {model_type!r}; name the layers yourself, e.g. "
            f"model.targets: [query, value] ({near(model_type, list(TABLE) + list(ALSO))})"
        )
    return found


def to_peft(base: nn.Module, head: Sequence[str], deltas: Params, task: str, source: str) -> Any:
    """A PeftModel around `base` (a plain copy, without our hooks) that computes what the model-ready `deltas` compute.

    Scale is in B already, so lora_alpha = r. Several low-rank adapters at a site become one of the summed rank, by
    concatenation. The head is saved whole: base plus delta. Raises ModelError for deltas that PEFT's LoRA cannot hold.
    """
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    factors = _factors(deltas)
    other = [k for k in deltas if k.part not in ("A", "B", "m", "rank") and k.adapter != "head"]
    if other:
        raise ModelError(f"export: leaf {other[0]} is no low-rank delta, so PEFT's LoRA cannot hold it; use --merged")
    ranks = {site: len(a) for site, (a, _) in factors.items()}
    if not ranks:
        raise ModelError("export: there is no low-rank adapter to export; use --merged for the model itself")
    common = max(ranks.values())
    odd = {site: r for site, r in ranks.items() if r != common}
    magnitudes = {k.site: v for k, v in deltas.items() if k.part == "m"}
    config = LoraConfig(
        r=common,
        lora_alpha=common,
        use_dora=bool(magnitudes),
        target_modules=sorted(ranks),
        rank_pattern={f"^{site}$": r for site, r in odd.items()},
        alpha_pattern={f"^{site}$": r for site, r in odd.items()},
        modules_to_save=sorted({h.split(".")[0] for h in head}) or None,
        fan_in_fan_out=_transposed(base, ranks),
        task_type=TaskType[TASKS[task].peft_type],
    )
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = source
    inner = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for site, (a, b) in factors.items():
            inner[site].lora_A["default"].weight.copy_(a)
            inner[site].lora_B["default"].weight.copy_(b)
        for site, m in magnitudes.items():
            inner[site].lora_magnitude_vector["default"].weight.add_(m)  # the base's norms already
        _save_head(inner, deltas)
    return model


def _transposed(base: nn.Module, sites: Iterable[str]) -> bool:
    """Whether the sites keep their weights as [in, out], as GPT-2's Conv1D does."""
    modules = dict(base.named_modules())
    return any(type(modules[s]).__name__ == "Conv1D" for s in sites)


def _factors(deltas: Params) -> dict[str, tuple[Tensor, Tensor]]:
    """site -> (A [r i], B [o r]), all low-rank adapters of a site side by side."""
    import torch

    out: dict[str, tuple[Tensor, Tensor]] = {}
    for k, a in deltas.items():
        if k.part == "A" and "d" not in {x.part for x in deltas if x.adapter == k.adapter}:
            b = deltas[k._replace(part="B")]
            old = out.get(k.site)
            out[k.site] = (a, b) if old is None else (torch.cat([old[0], a]), torch.cat([old[1], b], 1))
    return out


def to_peft_vera(base: nn.Module, head: Sequence[str], deltas: Params, task: str, source: str) -> Any:
    """As to_peft, for VeRA: our projections take the place of PEFT's, and are saved with the vectors."""
    import torch
    from peft import TaskType, VeraConfig, get_peft_model

    sites = sorted({k.site for k in deltas if k.part == "d"})
    first = {k.part: v for k, v in deltas.items() if k.site == sites[0] and k.adapter != "head"}
    config = VeraConfig(
        r=len(first["d"]),
        target_modules=sites,
        save_projection=True,
        fan_in_fan_out=_transposed(base, sites),
        modules_to_save=sorted({h.split(".")[0] for h in head}) or None,
        task_type=TaskType[TASKS[task].peft_type],
    )
    model = get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = source
    inner = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for site in sites:
            layer = inner[site]
            layer.vera_A["default"][: len(first["A"]), : first["A"].shape[1]].copy_(first["A"])
            layer.vera_B["default"][: first["B"].shape[0], : first["B"].shape[1]].copy_(first["B"])
            for k, v in deltas.items():
                if k.site == site and k.part in ("d", "b"):
                    getattr(layer, f"vera_lambda_{k.part}")["default"].copy_(v)
        _save_head(inner, deltas)
    return model


def _save_head(inner: dict[str, Any], deltas: Params) -> None:
    """Base plus delta, in the modules that PEFT saves whole."""
    for k, v in deltas.items():
        if k.adapter == "head":
            top, _, rest = k.site.partition(".")
            module = inner[f"{top}.modules_to_save.default" + (f".{rest}" if rest else "")]
            getattr(module, k.part).add_(v.to(getattr(module, k.part)))


def export(
    make_base: Callable[[], nn.Module], head: Sequence[str], deltas: Params, task: str, source: str, out: Path,
    merged: bool = False, tokenizer: Any = None,
) -> Path:  # fmt: skip
    """Write a PEFT folder (adapter_config.json, adapter_model.safetensors), or the merged model, to `out`."""
    if merged:
        plain: Any = merge(make_base(), deltas)
        plain.save_pretrained(out)
    else:
        hold = to_peft_vera if any(k.part == "d" for k in deltas) else to_peft
        # no embedding is adapted; asked to find that out by itself, PEFT would look for the base on the hub
        hold(make_base(), head, deltas, task, source).save_pretrained(out, save_embedding_layers=False)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return out
