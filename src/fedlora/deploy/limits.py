"""What a server's recipe asks for beyond a site's policy; decided from the recipe alone, so that no row is read for it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..adapters import Sparse
from ..errors import Problem
from ..methods.contract import Method
from ..recipe import Recipe

if TYPE_CHECKING:
    from .policy import Policy

PLAIN = re.compile(r"[\w.-]+")  # the end of a layer's name; another regular expression could be made to run for years


def problems(policy: Policy, r: Recipe) -> list[Problem]:
    """Everything at once. r: the recipe over this site's data."""
    return [*_kinds(policy, r), *_sizes(policy, r)]


def _kinds(policy: Policy, r: Recipe) -> Iterator[Problem]:
    """Task, model, method, and the form of its updates."""
    allow = policy.allow
    yield from _one_of("model.task", r.model.task, allow.tasks)
    for name in _names(r.resolved()["method"]):
        yield from _one_of("method.name", name, allow.methods)
    for form in forms(r.method_object()):
        yield from _one_of("method.adapter", form, allow.adapters)
    yield from _one_of("method.head", getattr(r.method_object(), "head", "shared"), allow.heads)
    if policy.model.folder is None:
        yield from _one_of("model.name", r.model.name, sorted(policy.names()))
    if policy.data.classes is not None:
        for c in r.data.classes or ():
            yield from _one_of("data.classes", c, policy.data.classes)
    if r.model.targets != "auto":
        yield from _plain("model.targets", r.model.targets)


def _sizes(policy: Policy, r: Recipe) -> Iterator[Problem]:
    """Ranks, steps, rows and rounds."""
    least, most, t = policy.least, policy.most, r.train
    for name, value in _options(r.resolved()["method"]):
        field = f"method.{name}"
        if "pattern" in name:
            yield from _plain(field, [pair[0] for pair in value or ()])
        if "rank" in name:
            yield from _bound(field, _largest(value), 0, most.rank)
        if name == "tune" or name.endswith("steps"):
            yield from _bound(field, _largest(value), 0, most.steps)
    if t.steps is not None:
        yield from _bound("train.steps", t.steps, max(least.steps, math.ceil(least.rows / t.batch_size)), most.steps)
    if t.epochs is not None:
        yield from _bound("train.epochs", t.epochs, 0, most.epochs)
    yield from _bound("train.batch_size", t.batch_size, least.batch, most.batch)
    yield from _bound("evaluation.batch_size", r.evaluation.batch_size, 1, most.batch)
    if r.generation.scores:
        yield from _bound("generation.new_tokens", r.generation.new_tokens, 1, most.tokens)
    yield from _bound("data.max_length", r.data.max_length, 1, most.tokens)
    yield from _bound("federation.rounds", r.federation.rounds, 1, most.rounds)


def _options(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Hyperparameters by name, those of a method inside a method too."""
    for name, value in given.items():
        if isinstance(value, Mapping) and "name" in value:
            yield from _options(value)
        else:
            yield name, value


def _names(given: Mapping[str, Any]) -> Iterator[str]:
    """The method's name, and that of a method inside it."""
    yield given["name"]
    for value in given.values():
        if isinstance(value, Mapping) and "name" in value:
            yield from _names(value)


def forms(method: Method) -> set[str]:
    """The forms of a method's updates, by the names of adapters and "sparse"; those of all its stages."""
    stages = getattr(method, "stages", None)
    if stages is not None:
        return {f for m in stages for f in forms(m)}
    form = getattr(method, "form", None)
    if isinstance(form, Sparse):
        return {"sparse"}
    return {"unknown" if form is None else getattr(method, "adapter", "unknown")}


def _one_of(field: str, got: str, allowed: Any) -> Iterator[Problem]:
    if got not in allowed:
        yield Problem(field, got, f"of this site's policy: {', '.join(allowed) or 'nothing'}")


def _bound(field: str, got: float, low: float, high: float) -> Iterator[Problem]:
    if not low <= got <= high:
        yield Problem(field, got, f"{low} to {high}, as this site's policy says")


def _plain(field: str, patterns: Any) -> Iterator[Problem]:
    for p in (patterns,) if isinstance(patterns, str) else patterns:
        if not PLAIN.fullmatch(p):
            yield Problem(
                field, p, "ends of layers' names, as this site's policy says", "it takes no other expressions"
            )


def _largest(value: Any) -> float:
    """The largest number in a hyperparameter, however deep."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return max(map(_largest, value), default=0)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0
