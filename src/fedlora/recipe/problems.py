"""pydantic's errors in our words: the field, what came, what was expected, what to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from ..errors import ConfigError, Problem, near
from . import hints

EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of fields",
    "none_required": "null",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
    "missing": "a value",
}
BOUNDS = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
UNTYPED = object()  # stands for the default of a field that has none


def expectation(error: ErrorDetails, meaning: str = "") -> str:
    """What would have been right, as a noun phrase. meaning: the field's description, used where the type says too little."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in BOUNDS:
        (bound,) = context.values()
        return f"{'an integer' if isinstance(bound, int) else 'a number'} {BOUNDS[kind]} {bound}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "string_pattern_mismatch":
        return meaning or f"text that matches {context['pattern']}"
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    if kind == "too_long":
        return f"a list of at most {context['max_length']}"
    return EXPECTED.get(kind, error["msg"][:1].lower() + error["msg"][1:])


def either(errors: Sequence[ErrorDetails], meaning: str = "") -> str:
    """All that would have been right: "an integer or 'auto'". Wrong items of a list are told as such."""
    inside = [e for e in errors if isinstance(e["loc"][-1] if e["loc"] else "", int)]
    whole = [e for e in errors if e not in inside and not (inside and e["type"] == "too_short")]
    parts = [expectation(e, meaning) for e in whole]
    if inside:
        lacking = [e for e in inside if e["type"] == "missing"]
        items = dict.fromkeys(expectation(e) for e in inside if e not in lacking)
        parts.append(f"a list of {' or '.join(items)}" if items else f"a list of {max(map(_place, lacking)) + 1}")
    return " or ".join(dict.fromkeys(parts))


def _place(error: ErrorDetails) -> int:
    return int(error["loc"][-1])


def remedy(value: Any, errors: Sequence[ErrorDetails], default: Any, meaning: str = "") -> str:
    """What to do about a wrong value."""
    for e in errors:
        if e["type"] == "literal_error" and isinstance(e["input"], str):
            words = str(e["ctx"]["expected"]).replace(" or ", ", ").split(", ")
            return near(e["input"], [w.strip("'") for w in words])
    wanted = {e["type"] for e in errors}
    if isinstance(value, str) and wanted & {"int_type", "float_type", "bool_type"}:
        return "write it without quotes"
    if isinstance(value, int | float) and "string_type" in wanted:
        return f"put it in quotes: {json.dumps(str(value))}"
    shown = f"the default is {json.dumps(default)}" if default is not UNTYPED else "correct it"
    return f"{shown} ({meaning})" if meaning and "string_pattern_mismatch" not in wanted else shown


def of_fields(
    prefix: str,
    error: ValidationError,
    raw: Mapping[str, Any],
    defaults: Mapping[str, Any],
    meanings: Mapping[str, str],
) -> list[Problem]:
    """One problem per field of a section, however many types were tried for it.

    defaults: the JSON form of each known field's default; UNTYPED for a field without one. meanings: what fields are.
    """
    by_field: dict[str, list[ErrorDetails]] = {}
    for e in error.errors(include_url=False):
        by_field.setdefault(str(e["loc"][0]) if e["loc"] else "", []).append(e)
    problems = []
    for field, errors in by_field.items():
        path = f"{prefix}.{field}" if field else prefix
        meaning = meanings.get(field, "")
        kinds = {e["type"] for e in errors if len(e["loc"]) <= 1}
        if "extra_forbidden" in kinds:
            problems.append(unknown(path, raw[field], f"section {prefix}", defaults))
        elif "missing" in kinds:
            problems.append(Problem(path, None, meaning or "a value", f"add {field} to the section {prefix}"))
        else:
            value = raw.get(field) if field else raw
            default = defaults.get(field, UNTYPED)
            problems.append(Problem(path, value, either(errors, meaning), remedy(value, errors, default, meaning)))
    return problems


def unknown(path: str, value: Any, owner: str, known: Iterable[str]) -> Problem:
    """A field that its owner does not have."""
    return Problem(path, value, f"a field of the {owner}", hints.remedy(path.rsplit(".", 1)[-1], known))


def of_value(path: str, hint: Any, value: Any, default: Any) -> tuple[Any, list[Problem]]:
    """`value` as the type `hint`; JSON's types are taken strictly ("8" is not 8), lists stand for tuples."""
    try:
        return TypeAdapter(hint).validate_json(dumps(path, value), strict=True), []
    except ValidationError as e:
        errors = e.errors(include_url=False)
        return None, [Problem(path, value, either(errors), remedy(value, errors, default))]
    except ConfigError as e:
        return None, list(e.problems)


def dumps(path: str, value: Any) -> str:
    """JSON of a value that YAML or Python gave us; paths become text. Raises ConfigError for anything else."""

    def other(v: Any) -> Any:
        if isinstance(v, PurePath):
            return str(v)
        raise TypeError(f"{type(v).__name__} value {v!r}")

    try:
        return json.dumps(value, default=other)
    except (TypeError, ValueError, RecursionError) as e:
        what = "text, numbers, true, false, null, lists and mappings of these"
        raise ConfigError([Problem(path, value, what, f"found a {e}")]) from e
