"""Everything that touches PEFT: its table of default targets, and adapters in and out of its on-disk format."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import Form, Parts, at_layers, form_of
from ..errors import ModelError
from ..model.targets import matching, usual
from ..training.tasks import TASKS
from .merge import merge

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..tree import Params

# Architectures that PEFT's table lacks; the query and value projections, as in its entries for their relatives.
ALSO = {"albert": ["query", "value"], "distilbert": ["q_lin", "v_lin"], "deberta-v3": ["query_proj", "value_proj"]}


def default_targets(model_type: str, base: nn.Module | None = None) -> list[str] | str:
    """PEFT's own default LoRA targets of an architecture. For one that PEFT does not know, and where its names are not in `base`, the
    rule of model/targets.py. Raises ModelError without a base to look at."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TABLE

    found: list[str] | str | None = TABLE.get(model_type, ALSO.get(model_type))
    if base is not None:
        try:
            matching(base, found or [])
        except ModelError:
            found = None
        return found or usual(base)
    if found is None:
        raise ModelError(
            f"model.targets: no default targets for architecture {model_type!r}; name the layers yourself, e.g. "
            "model.targets: [query, value]"
        )
    return found


def to_peft(base: nn.Module, head: Sequence[str], deltas: Params, task: str, source: str) -> Any:
    """A PeftModel around `base` (a plain copy, without our hooks) that computes what the model-ready `deltas` compute.

    What it holds is the form's business (`Form.hold`). The head is saved whole: base plus delta. Raises ModelError for deltas that
    PEFT cannot hold, and for deltas of several forms.
    """
    import peft
    import torch

    at, form = _by_form(deltas)
    held = form.hold(at)
    config = getattr(peft, held.config)(
        target_modules=sorted(at),
        modules_to_save=sorted({h.split(".")[0] for h in head}) or None,
        fan_in_fan_out=_transposed(base, at),
        task_type=peft.TaskType[TASKS[task].peft_type],
        **held.options,
    )
    model = peft.get_peft_model(base, config)
    model.peft_config["default"].base_model_name_or_path = source
    inner = model.base_model.model
    with torch.no_grad():
        for path, v in held.leaves.items():
            _at(inner, path).copy_(v)
        for path, v in held.added.items():
            _at(inner, path).add_(v)
        _save_head(dict(inner.named_modules()), deltas)
    return model


def _by_form(deltas: Params) -> tuple[Mapping[str, Sequence[Parts]], type[Form]]:
    """(layer -> its deltas, their form), the head's left out."""
    layers = {
        s: list(each.values())
        for s, each in at_layers({k: v for k, v in deltas.items() if k.adapter != "head"}).items()
    }
    forms = {form_of(parts): s for s, each in layers.items() for parts in each}
    if not forms:
        raise ModelError("export: there is no adapter to export; use --merged for the model itself")
    for form, layer in forms.items():
        if form.no_peft:
            raise ModelError(f"export: {layer!r}: {form.no_peft}")
    if len(forms) > 1:
        names = " and ".join(sorted(f.__name__ for f in forms))
        raise ModelError(
            f"export: the layers have deltas of the forms {names}, and a PEFT folder cannot hold two; use --merged"
        )
    return layers, next(iter(forms))


def _at(inner: nn.Module, path: str) -> Tensor:
    """The tensor at a path through modules and PEFT's dictionaries of tensors."""
    found: Any = inner
    for step in path.split("."):
        found = getattr(found, step) if hasattr(found, step) else found[step]
    return found


def _transposed(base: nn.Module, layers: Iterable[str]) -> bool:
    """Whether the layers keep their weights as [in, out], as GPT-2's Conv1D does."""
    modules = dict(base.named_modules())
    return any(type(modules[s]).__name__ == "Conv1D" for s in layers)


def _save_head(inner: dict[str, Any], deltas: Params) -> None:
    """Base plus delta, in the modules that PEFT saves whole."""
    for k, v in deltas.items():
        if k.adapter == "head":
            top, _, rest = k.layer.partition(".")
            module = inner[f"{top}.modules_to_save.default" + (f".{rest}" if rest else "")]
            getattr(module, k.part).add_(v.to(getattr(module, k.part)))


def _in_order(config: Path, there: Collection[str]) -> None:
    """PEFT writes sets in the order of their hashes, a name twice, and heads of other architectures: write what is `there`, in
    order, so that equal exports are equal bytes."""
    said = json.loads(config.read_text(encoding="utf-8"))
    for field in ("target_modules", "modules_to_save", "feedforward_modules", "exclude_modules"):
        if isinstance(said.get(field), list):
            said[field] = sorted(n for n in set(said[field]) if field != "modules_to_save" or n in there)
    config.write_text(json.dumps(said, indent=2, sort_keys=True), encoding="utf-8")


def export(
    make_base: Callable[[], nn.Module], head: Sequence[str], deltas: Params, task: str, source: str, out: Path,
    merged: bool = False, tokenizer: Any = None, card: str = "", revision: str | None = None,
) -> Path:  # fmt: skip
    """Write a PEFT folder (adapter_config.json, adapter_model.safetensors), or the merged model, to `out`.

    source, revision: where users of the folder find the base. card: the text of README.md.
    """
    if merged:
        plain: Any = merge(make_base(), deltas)
        plain.save_pretrained(out)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PEFT's own use of transformers
            held = to_peft(make_base(), head, deltas, task, source)
            held.peft_config["default"].revision = revision
            # no embedding is adapted; asked to find that out by itself, PEFT would look for the base on the hub
            held.save_pretrained(out, save_embedding_layers=False)
        _in_order(out / "adapter_config.json", {h.split(".")[0] for h in head})
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    if card:
        (out / "README.md").write_text(card, encoding="utf-8")
    return out
