"""The list federation.guards: names of guards, or each with its fields, as in [clip, {trimmed: {share: 0.2}}]."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, Problem, near
from .hyperparameters import all_fields, default, plain, read
from .problems import unknown

if TYPE_CHECKING:
    from ..federation.guards.guard import Guard
    from ..methods.contract import Method


def table() -> dict[str, type[Guard]]:
    """Guards by name."""
    from ..federation.guards import GUARDS

    return GUARDS


def build(raw: Sequence[Any], path: str = "federation.guards") -> tuple[tuple[Guard, ...], list[Problem]]:
    """The guards that a list describes, and every problem; those that are wrong are left out."""
    out: list[Guard] = []
    problems: list[Problem] = []
    for i, entry in enumerate(raw):
        guard, wrong = _one(entry, f"{path}[{i}]")
        problems += wrong
        if guard is not None:
            out.append(guard)
    return tuple(out), problems


def _one(entry: Any, path: str) -> tuple[Guard | None, list[Problem]]:
    if isinstance(entry, Mapping) and len(entry) == 1:
        [(name, given)] = entry.items()
    else:
        name, given = entry, None
    guards = table()
    if not isinstance(name, str) or name not in guards:
        return None, [Problem(path, name, "a guard by name", near(str(name), guards))]
    if given is not None and not isinstance(given, Mapping):
        return None, [Problem(f"{path}.{name}", given, "a mapping of fields", f"write {name}: {{field: value}}")]
    cls, given = guards[name], given or {}
    known = all_fields(cls)
    problems = [unknown(f"{path}.{name}.{f}", v, f"guard {name}", known) for f, v in given.items() if f not in known]
    values, wrong = read(cls, {f: v for f, v in given.items() if f in known}, f"{path}.{name}")
    problems += wrong
    try:
        guard = cls(**values)
    except ConfigError as e:
        return None, problems + [dataclasses.replace(p, field=f"{path}.{name}.{p.field}") for p in e.problems]
    return (None if problems else guard), problems


def fit(guards: Sequence[Guard], method: Method | None) -> list[Problem]:
    """What is wrong with the guards together, and with them around the method if the method is known."""
    if not guards:
        return []
    from ..federation.channel import together, unserved

    return together(guards) + (unserved(guards, method) if method is not None else [])


def resolved(guards: Sequence[Guard]) -> list[dict[str, Any]]:
    """Each guard with all its fields, as JSON has them."""
    return [{g.name: {f: plain(type(g), f, getattr(g, f)) for f in all_fields(type(g))}} for g in guards]


def schemas() -> list[dict[str, Any]]:
    """JSON schema of an entry of the list, as alternatives."""
    from pydantic import TypeAdapter

    from .hyperparameters import hints

    out: list[dict[str, Any]] = [{"type": "string", "enum": sorted(table())}]
    for name, cls in table().items():
        fields = {f: TypeAdapter(hints(cls)[f]).json_schema() | {"default": default(cls, f)} for f in all_fields(cls)}
        inner = {"type": ["object", "null"], "properties": fields, "additionalProperties": False}
        doc = (cls.__doc__ or "").strip().split("\n")[0]
        out.append(
            {"type": "object", "description": doc, "properties": {name: inner}, "required": [name],
             "additionalProperties": False}
        )  # fmt: skip
    return out
