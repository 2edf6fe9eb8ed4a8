"""`--set a.b=c`: a dotted path of the recipe and a value in YAML."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, Problem, near
from . import hints, reading
from .hyperparameters import table
from .sections import SECTIONS

# Passes over the rows, or steps: a recipe gives one of them.
EITHER = {"train.epochs": "train.steps", "train.steps": "train.epochs"}


def paths() -> list[str]:
    """Every path that can be set; the hyperparameters of the method are not among them, they depend on its name."""
    return ["name", "method.name", *(f"{s}.{f}" for s, kind in SECTIONS.items() for f in kind.model_fields)]


def split(text: str) -> tuple[str, Any]:
    """ "a.b=c" as path and value. Raises ConfigError."""
    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals or not path:
        raise ConfigError([Problem("--set", text, "path=value", "for example --set train.lr=1e-3")])
    return path, reading.parse(value, f"--set {path}")


def check(path: str, value: Any) -> Problem | None:
    """A problem if no recipe has this path."""
    whole = path in SECTIONS or path == "method"
    if whole or path in paths() or _hyperparameter(path):
        return None
    last = path.rpartition(".")[2]
    alike = [p for p in paths() if p.rpartition(".")[2] == last]
    remedy = hints.meant(path) or (f"did you mean {' or '.join(map(repr, alike))}?" if alike else near(path, paths()))
    return Problem(path, value, "a field of the recipe", remedy)


def _hyperparameter(path: str) -> bool:
    """Whether a path can be one of the method's, or of a method that it holds."""
    section, *fields = path.split(".")
    if section != "method" or not fields or not all(fields):
        return False
    holds = {f for m in table().values() for f in m.inner}
    return len(fields) == 1 or (len(fields) == 2 and fields[0] in holds)


def put(raw: Mapping[str, Any], path: str, value: Any, method: bool = False) -> dict[str, Any]:
    """`raw` with the value at a path; sections that are missing are made. `raw` stays as it is.

    method: `raw` is a method's section, in which a method's bare name stands for a section too.
    """
    head, dot, rest = path.partition(".")
    if not dot:
        return {**raw, head: value}
    inner = raw.get(head)
    method = method or head == "method"
    if isinstance(inner, str) and method:
        inner = {"name": inner}
    if inner is None:
        inner = {}
    if not isinstance(inner, Mapping):  # the section is no mapping; that is reported elsewhere
        return dict(raw)
    return {**raw, head: put(inner, rest, value, method)}


def _without(raw: Mapping[str, Any], path: str) -> dict[str, Any]:
    """`raw` without the field at a path of two parts, if it is there."""
    section, _, field = path.partition(".")
    inner = raw.get(section)
    if not isinstance(inner, Mapping) or field not in inner:
        return dict(raw)
    return {**raw, section: {k: v for k, v in inner.items() if k != field}}


def assign(raw: Mapping[str, Any], pairs: Iterable[tuple[str, Any]]) -> tuple[dict[str, Any], list[Problem]]:
    """Put each value in its place, in order; paths that do not exist are problems and change nothing.

    Of two fields that exclude each other, the one that is given here takes the place of the one in `raw`.
    """
    pairs = list(pairs)
    out, problems = dict(raw), []
    given = {path for path, value in pairs if value is not None}
    for path, other in EITHER.items():
        if path in given and other not in given:
            out = _without(out, other)
    for path, value in pairs:
        wrong = check(path, value)
        if wrong:
            problems.append(wrong)
        else:
            out = put(out, path, copy.deepcopy(value))
    return out, problems


def parsed(sets: Sequence[str]) -> tuple[list[tuple[str, Any]], list[Problem]]:
    """All overrides as pairs, and what is wrong with the others."""
    pairs: list[tuple[str, Any]] = []
    problems: list[Problem] = []
    for text in sets:
        try:
            pairs.append(split(text))
        except ConfigError as e:
            problems += e.problems
    return pairs, problems


def apply(raw: Mapping[str, Any], sets: Sequence[str]) -> tuple[dict[str, Any], list[Problem]]:
    """`raw` with the overrides; the later of two wins."""
    pairs, problems = parsed(sets)
    out, wrong = assign(raw, pairs)
    return out, problems + wrong
