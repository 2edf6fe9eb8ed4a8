"""JSON schema of a recipe file, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from .core import Recipe
from .hyperparameters import default, hints, own_fields, table
from .problems import UNTYPED


def schema() -> dict[str, Any]:
    """Sections with their fields, each method with its hyperparameters, and the sweep."""
    out = Recipe.model_json_schema()
    out["title"] = "fedlora recipe"
    out["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    out["$defs"]["MethodSection"] = {
        "title": "Method",
        "oneOf": [{"type": "string", "enum": sorted(table())}, *(_method(n, m) for n, m in table().items())],
    }
    out["properties"]["sweep"] = {
        "description": "Paths with the values they take; one run for each combination.",
        "type": "object",
        "properties": {"variants": {"type": "array", "items": {"type": "object"}, "minItems": 1}},
        "additionalProperties": {"type": "array", "minItems": 1},
    }
    return out


def _method(name: str, cls: type) -> dict[str, Any]:
    types = hints(cls)
    fields: dict[str, Any] = {}
    for f in own_fields(cls):
        fields[f] = TypeAdapter(types[f]).json_schema()
        if default(cls, f) is not UNTYPED:
            fields[f]["default"] = default(cls, f)
    required = ["name", *(f for f in own_fields(cls) if default(cls, f) is UNTYPED)]
    return {
        "title": name,
        "type": "object",
        "description": (cls.__doc__ or "").strip().split("\n")[0],
        "properties": {"name": {"const": name}, **fields},
        "required": required,
        "additionalProperties": False,
    }
