"""Which layers of a base a recipe's `targets` name."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from ..errors import ModelError, near
from ..layers import layer_of


def matching(base: nn.Module, targets: str | Iterable[str]) -> list[str]:
    """Module paths that `targets` names, as PEFT reads them: a list of name endings, or one regular expression.

    Raises ModelError with the near misses for a target that matches nothing.
    """
    names = {n: m for n, m in base.named_modules() if n and (s := layer_of(n, m)) is not None and s.kind == "linear"}
    if isinstance(targets, str):
        try:
            found = [n for n in names if re.fullmatch(targets, n)]
        except re.error as e:
            raise ModelError(f"model.targets: pattern {targets!r} is not a regular expression: {e}") from e
        endings = sorted({n.rsplit(".", 1)[-1] for n in names})
        if not found:
            raise ModelError(f"model.targets: pattern {targets!r} matches no layer; {near(targets, endings)}")
        return found
    found = []
    for t in targets:
        mine = [n for n in names if n == t or n.endswith("." + t)]
        if not mine:
            endings = sorted({n.rsplit(".", 1)[-1] for n in names} | set(names))
            raise ModelError(f"model.targets: {t!r} matches no layer of {type(base).__name__}; {near(t, endings)}")
        found += [n for n in mine if n not in found]
    order = {n: i for i, n in enumerate(names)}
    return sorted(found, key=order.__getitem__)
