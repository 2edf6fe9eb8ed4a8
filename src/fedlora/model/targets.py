"""Which layers of a base a recipe's `targets` name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import ModelError, near
from ..layers import layer_of

ALL_LINEAR = "all-linear"
# How architectures call the projections to queries and to values, and those that compute queries, keys and values in one.
PAIRS = (
    ("query", "value"), ("q_proj", "v_proj"), ("q", "v"), ("q_lin", "v_lin"), ("query_proj", "value_proj"), ("wq", "wv"),
    ("to_q", "to_v"), ("linear_q", "linear_v"), ("q_linear", "v_linear"), ("q_attn", "v_attn"),
)  # fmt: skip
FUSED = ("query_key_value", "qkv_proj", "Wqkv", "qkv", "c_attn", "in_proj", "att_proj", "qkv_linear")


def usual(base: nn.Module) -> list[str] | str:
    """The layers that LoRA's paper adapts (arXiv:2106.09685, section 4.2), by their names: the projections to queries and values;
    where one layer computes queries, keys and values, that one; "all-linear" for a base without either."""
    names = _linear(base)
    blocks: dict[str, set[str]] = {}
    for n in names:
        parent, _, last = n.rpartition(".")
        blocks.setdefault(parent, set()).add(last)
    for pair in PAIRS:
        if any(held.issuperset(pair) for held in blocks.values()):
            return list(pair)
    fused = [f for f in FUSED if any(f in held for held in blocks.values())]
    return fused[:1] or ALL_LINEAR


def every_linear(base: nn.Module, names: Iterable[str]) -> list[str]:
    """Of these linear layers, all but the output over the vocabulary, as PEFT's "all-linear"."""
    outputs: Any = getattr(base, "get_output_embeddings", None)
    last = outputs() if outputs is not None else None
    modules = dict(base.named_modules())
    return [n for n in names if modules[n] is not last]


def matching(base: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Module paths that `targets` names, as PEFT reads them: a list of name endings, one regular expression, or "all-linear".

    Raises ModelError for targets that match nothing, with their near misses and the layers that there are.
    """
    names = _linear(base)
    if targets == ALL_LINEAR:
        return every_linear(base, names)
    if isinstance(targets, str):
        try:
            found = [n for n in names if re.fullmatch(targets, n)]
        except re.error as e:
            raise ModelError(f"model.targets: pattern {targets!r} is not a regular expression: {e}") from e
        if not found:
            raise ModelError(
                f"model.targets: pattern {targets!r} matches no layer; a pattern must fit a layer's whole name, as in "
                f"'.*\\.query'; linear layers: {counted(base)}"
            )
        return found
    found, lost = [], []
    for t in targets:
        mine = [n for n in names if n == t or n.endswith("." + t)]
        if not mine:
            lost.append(t)
        found += [n for n in mine if n not in found]
    if lost:
        endings = sorted({n.rsplit(".", 1)[-1] for n in names} | set(names))
        close = [m + "; " for m in dict.fromkeys(near(t, endings) for t in lost) if m.startswith("did you mean")]
        which = f"{' and '.join(map(repr, lost))} {'matches' if len(lost) == 1 else 'match'}"
        raise ModelError(
            f"model.targets: {which} no layer of {type(base).__name__}; {''.join(close)}linear layers: {counted(base)}"
        )
    order = {n: i for i, n in enumerate(names)}
    return sorted(found, key=order.__getitem__)


def counted(base: nn.Module) -> str:
    """The last names of a base's linear layers, each with how many there are: "query (12), value (12)"."""
    found = Counter(n.rsplit(".", 1)[-1] for n in _linear(base))
    return ", ".join(f"{name} ({n})" for name, n in found.items()) or "none"


def _linear(base: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in base.named_modules() if n and (s := layer_of(n, m)) is not None and s.kind == "linear"}
