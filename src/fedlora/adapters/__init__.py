"""The delta forms, one short file each. A file put here is found: FORMS maps the names in recipes to the classes.

Every file holds all about its form (base.py says what that is); nothing else asks which form a delta has by its parts' names.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ..registry import classes
from ..tree import Params
from .base import Densities, Form, Held, Parts, Pattern, pattern_problems
from .full import init_head
from .lora import LoRA
from .sparse import Sparse
from .vera import VeRA

__all__ = [
    "FORMS", "KINDS", "PARTS", "AdapterName", "Densities", "Form", "Held", "LoRA", "Parts", "Pattern", "Sparse", "VeRA", "apply",
    "at_layers", "described", "form_of", "init_head", "low_rank", "make", "named", "pattern_problems",
]  # fmt: skip


def _check(form: type[Form]) -> None:
    """A form must say all that will be asked of it: found out here, not by a user's export."""
    for can, why in (("merge", "no_merge"), ("hold", "no_peft")):
        has = getattr(form, can).__func__ is not getattr(Form, can).__func__
        assert has != bool(getattr(form, why)), f"{form.__name__}: state either {can} or, in {why}, why there is none"
    if form.low_rank:
        assert form.first | form.second == {"A", "B"}, f"{form.__name__}.low_rank: its leaves are not A and B"


KINDS: tuple[type[Form], ...] = tuple(classes(__name__, __path__, Form))  # type: ignore[type-abstract]
for _form in KINDS:
    _check(_form)
FORMS: dict[str, type[Form]] = {name: kind for kind in KINDS for name in kind.names}
_BY_PARTS: dict[frozenset[str], type[Form]] = {shape: kind for kind in KINDS for shape in kind.shapes}
assert len(FORMS) == sum(len(kind.names) for kind in KINDS), "two delta forms have one name"
assert len(_BY_PARTS) == sum(len(kind.shapes) for kind in KINDS), "two delta forms have the same parts"
# What deltas are made of; other leaves (a rank, a norm) never reach the model.
PARTS: frozenset[str] = frozenset().union(*_BY_PARTS)

if TYPE_CHECKING:
    AdapterName = str
else:
    AdapterName = Literal[tuple(FORMS)]


def named(has: Callable[[type[Form]], bool], last: str = "or") -> str:
    """The names in recipes of the forms that `has` holds of, for a message: "lora, rslora or vera"."""
    *names, end = [name for name, kind in FORMS.items() if has(kind)]
    return f"{', '.join(names)} {last} {end}" if names else end


def make(name: str, rank: int, alpha: float, pattern: Pattern = (), field: str = "method.rank_pattern") -> Form:
    """The form called `name`: rank is LoRA's and VeRA's rank and the bottlenecks' size; alpha and pattern are LoRA's and its kin's.

    field: what the pattern is called in the recipe, for messages.
    """
    return FORMS[name].make(name, rank, alpha, pattern, field)


def form_of(parts: Iterable[str]) -> type[Form]:
    """The form whose delta at a layer has exactly these parts. Raises ValueError where there is none."""
    found = _BY_PARTS.get(frozenset(parts))
    if found is None:
        known = [" ".join(sorted(shape)) for shape in _BY_PARTS]
        raise ValueError(f"parts {sorted(parts)} form no delta; expected one of {known}")
    return found


def low_rank(parts: Iterable[str]) -> bool:
    """Whether a delta of these parts is the product B A and nothing else."""
    found = _BY_PARTS.get(frozenset(parts))
    return found is not None and found.low_rank


def at_layers(p: Params) -> dict[str, dict[str, dict[str, Tensor]]]:
    """layer -> adapter -> parts of its delta; leaves that are no part of a delta are left out."""
    out: dict[str, dict[str, dict[str, Tensor]]] = {}
    for k, v in p.items():
        if k.part in PARTS:
            out.setdefault(k.layer, {}).setdefault(k.adapter, {})[k.part] = v
    return out


def apply(x: Tensor, y: Tensor, p: Parts, module: Any = None) -> Tensor:
    """Add the delta `p` to y, the output of `module` on x. Raises ValueError for parts that form no delta."""
    return form_of(p).apply(x, y, p, module)


def described() -> str:
    """What `method.adapter` may be, for the docs."""
    lines = [
        textwrap.fill(f"{name:<9}{what}", 100, subsequent_indent=" " * 9)
        for kind in KINDS
        for name, what in kind.names.items()
    ]
    halves = [
        f"{n}: {', '.join(sorted(k.first))} and {', '.join(sorted(k.second))}" for n, k in FORMS.items() if k.first
    ]
    return "\n".join(
        [
            *lines,
            "",
            *textwrap.wrap(f"The half that FedSA-LoRA shares and the half it keeps: {'; '.join(halves)}.", 100),
            "The others have no halves: rules that share one half refuse them.",
        ]
    )
