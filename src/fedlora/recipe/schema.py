"""JSON schema of a recipe file, for editors that complete and check YAML."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import TypeAdapter

from . import guards
from .core import Recipe
from .hyperparameters import all_fields, default, held, hints, own_fields, table
from .problems import UNTYPED
from .search import Search


def schema() -> dict[str, Any]:
    """Sections with their fields, each method with its hyperparameters, and the sweep."""
    out = Recipe.model_json_schema()
    out["title"] = "fedlora recipe"
    out["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    out["$defs"]["MethodSection"] = {
        "title": "Method",
        "oneOf": [{"type": "string", "enum": sorted(table())}, *(_method(n, m) for n, m in table().items())],
    }
    out["$defs"]["Federation"]["properties"]["guards"]["items"] = {"oneOf": guards.schemas()}
    out["properties"]["sweep"] = {
        "description": "Paths with the values they take; one run for each combination.",
        "type": "object",
        "properties": {
            "variants": {"type": "array", "items": {"type": "object"}, "minItems": 1},
            "search": Search.model_json_schema(),
        },
        "additionalProperties": {"type": "array", "minItems": 1},
    }
    return out


def _method(name: str, cls: type, around: Collection[str] = ()) -> dict[str, Any]:
    types = hints(cls)
    fields: dict[str, Any] = {}
    for f in own_fields(cls, around):
        fields[f] = _inner(cls, f) if held(cls, f) else TypeAdapter(types[f]).json_schema()
        if default(cls, f) is not UNTYPED:
            fields[f]["default"] = default(cls, f)
    required = ["name", *(f for f in own_fields(cls, around) if default(cls, f) is UNTYPED)]
    return {
        "title": name,
        "type": "object",
        "description": (cls.__doc__ or "").strip().split("\n")[0],
        "properties": {"name": {"const": name}, **fields},
        "required": required,
        "additionalProperties": False,
    }


def _inner(cls: Any, field: str) -> dict[str, Any]:
    """A hyperparameter that is a method: a name, or a name with the fields that the method around it does not set."""
    names = cls.inner[field]
    return {
        "oneOf": [{"type": "string", "enum": list(names)}, *(_method(n, table()[n], all_fields(cls)) for n in names)]
    }
