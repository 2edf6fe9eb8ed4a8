"""Columns of a table, with errors that name the column, the place of the row and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError, near
from .lines import place, shown

if TYPE_CHECKING:
    import pyarrow as pa


def column(table: pa.Table, name: str, field: str = "data.text") -> pa.ChunkedArray:
    """The column `name`, which the recipe's `field` asks for; dictionaries are decoded. Raises DataError if it is missing."""
    import pyarrow as pa

    if name not in table.column_names:
        raise DataError(f"{field}: no column {name!r} among the columns {shown(table)}; {near(name, shown(table))}")
    if table.column_names.count(name) > 1:
        raise DataError(
            f"{field}: {table.column_names.count(name)} columns are called {name!r}, expected one; rename the others"
        )
    found = table.column(name)
    return found.cast(found.type.value_type) if pa.types.is_dictionary(found.type) else found


def full(table: pa.Table, name: str, field: str) -> pa.ChunkedArray:
    """`column`, and no value of it is missing. Raises DataError with the first row that is."""
    import pyarrow.compute as pc

    values = column(table, name, field)
    empty = pc.is_null(values, nan_is_null=True)
    at = pc.index(empty, True).as_py()
    if at >= 0:
        count = pc.sum(empty).as_py()
        raise DataError(f"{field}: column {name!r} has no value in {place(table, at)} ({count} of {len(values)} rows are empty), "
                        "expected a value in every row; fill or remove those rows, or leave them out by data.missing: drop")  # fmt: skip
    return values


def strings(table: pa.Table, name: str, field: str) -> list[str]:
    """The column as text [n]; numbers and booleans are written out. Raises DataError for missing values and nested types."""
    out: list[str] = _texts(full(table, name, field), name, field).to_pylist()
    return out


def _texts(values: pa.ChunkedArray, name: str, field: str) -> pa.ChunkedArray:
    """A column as text. Raises DataError for nested types and bytes."""
    import pyarrow as pa

    kind = values.type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise DataError(f"{field}: column {name!r} holds {kind}, expected text; choose another column")
    return values if pa.types.is_string(kind) or pa.types.is_large_string(kind) else values.cast(pa.string())


def under(table: pa.Table, names: str | Sequence[str], field: str) -> list[str]:
    """The columns of each row under each other, as instruction and input are. Raises DataError as `strings` does; only the first
    column needs a value in every row."""
    first, *more = [names] if isinstance(names, str) else names
    parts = [strings(table, first, field)]
    parts += [["" if v is None else v for v in _texts(column(table, n, field), n, field).to_pylist()] for n in more]
    return [below(row) for row in zip(*parts, strict=True)]


def below(parts: Sequence[str]) -> str:
    """Texts with an empty line between, without those that are blank; a single one stays as it is."""
    return parts[0] if len(parts) == 1 else "\n\n".join(p for p in parts if p.strip())


def lists(table: pa.Table, name: str, field: str) -> list[list[str]]:
    """The column as one list of texts a row; a column of text has one in each. Raises DataError for other types and empty lists."""
    import pyarrow as pa

    kind = column(table, name, field).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return [[t] for t in strings(table, name, field)]
    inner = kind.value_type
    if not (pa.types.is_string(inner) or pa.types.is_large_string(inner)):
        raise DataError(
            f"{field}: column {name!r} holds {kind}, expected texts or lists of texts; choose another column"
        )
    found: list[list[str]] = full(table, name, field).to_pylist()
    for i, texts in enumerate(found):
        if not texts or any(t is None for t in texts):
            what = "an empty list" if not texts else "a list with a missing text"
            raise DataError(
                f"{field}: column {name!r} has {what} in {place(table, i)}, expected one text or more; fill or remove it"
            )
    return found


def codes(
    values: pa.ChunkedArray, name: str, field: str, at: Callable[[int], str] = lambda i: f"row {i + 1}"
) -> tuple[np.ndarray, list[Any]]:
    """Distinct values by number: int64 [n] and the sorted values (integers as integers, dates as text).

    at: the place of a value, counted from 0. Raises DataError for other types, and for an empty text: CSV and TSV write a missing value so.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = values.type
    if pa.types.is_floating(kind):
        numbers = values.to_numpy()
        broken = np.flatnonzero((numbers != np.floor(numbers)) | (np.abs(numbers) >= 2**63))
        if len(broken):
            raise DataError(f"{field}: column {name!r} holds {numbers[broken[0]]} in {at(int(broken[0]))}, expected classes (text or "
                            "whole numbers); for real values set model.task to regression")  # fmt: skip
        values = pa.chunked_array([numbers.astype(np.int64)])
    elif pa.types.is_temporal(kind) or pa.types.is_string_view(kind):
        values = values.cast(pa.string())
    elif not (
        pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
    ):
        raise DataError(f"{field}: column {name!r} holds {kind}, expected text or whole numbers; choose another column")
    encoded = values.combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    found, distinct = number[encoded.indices.to_numpy()], encoded.dictionary.take(order).to_pylist()
    if distinct and distinct[0] == "":
        rows = np.flatnonzero(found == 0)
        raise DataError(f"{field}: column {name!r} is empty in {at(int(rows[0]))} ({len(rows)} of {len(found)} rows are), "
                        "expected a value in every row; fill or remove those rows, or leave them out by data.missing: drop")  # fmt: skip
    return found, distinct


def class_names(table: pa.Table, name: str) -> list[str] | None:
    """The names that `datasets` keeps for a ClassLabel column, or one of lists of them; None for any other column."""
    raw = (table.schema.metadata or {}).get(b"huggingface")
    feature = json.loads(raw).get("info", {}).get("features", {}).get(name, {}) if raw else {}
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]  # older releases of datasets described a list in this way
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    return feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
