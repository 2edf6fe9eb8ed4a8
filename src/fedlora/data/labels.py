"""Targets: class names in a fixed order and a number for each row, or real values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError, near
from .columns import class_names, codes, full
from .lines import place

if TYPE_CHECKING:
    import pyarrow as pa


def classes(
    table: pa.Table, name: str, known: Sequence[str] | None = None, field: str = "data.label"
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class ids int64 [n] and the class names.

    Names are the ClassLabel names of `datasets` where the column has them, else the distinct values, sorted (whole numbers
    as numbers). known: the names that training data has; then a label outside them raises DataError, which names it.
    """
    values = full(table, name, field)
    names = class_names(table, name)
    found, distinct = codes(values, name, field, lambda i: place(table, i))
    if names is not None:
        ids = np.asarray(distinct, np.int64)[found] if distinct else found
        outside = np.flatnonzero((ids < 0) | (ids >= len(names)))
        if len(outside):
            raise DataError(f"{field}: column {name!r} holds {ids[outside[0]]} in {place(table, int(outside[0]))}, expected 0 to {len(names) - 1}; "
                            "-1 marks data without labels (the test split of many hub data sets): choose a labelled split")  # fmt: skip
    else:
        ids, names = found, [str(d) for d in distinct]
    if known is None:
        return ids, tuple(names)
    position = {label: i for i, label in enumerate(known)}
    translated = np.array([position.get(label, -1) for label in names], np.int64)[ids] if len(names) else ids
    unknown = np.flatnonzero(translated < 0)
    if len(unknown):
        label = names[ids[unknown[0]]]
        whose = "is not in data.classes" if field == "data.label" else "occurs only here and not in the training data"
        raise DataError(f"{field}: label {label!r} ({place(table, int(unknown[0]))}, {len(unknown)} rows in all) {whose}, "
                        f"expected one of its {len(known)} labels; {near(label, known)} or remove those rows")  # fmt: skip
    return translated, tuple(known)


def reals(table: pa.Table, name: str, field: str = "data.label") -> np.ndarray:
    """Regression targets float32 [n]. Raises DataError for text and for values that are not finite."""
    import pyarrow as pa

    values = full(table, name, field)
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_decimal(values.type)):
        raise DataError(
            f"{field}: column {name!r} holds {values.type}, expected numbers; for classes set model.task to classification"
        )
    numbers = values.cast(pa.float64()).to_numpy()
    broken = np.flatnonzero(~(np.abs(numbers) <= np.finfo(np.float32).max))
    if len(broken):
        raise DataError(
            f"{field}: column {name!r} holds {numbers[broken[0]]} in {place(table, int(broken[0]))}, expected a finite number that "
            "float32 holds; remove that row"
        )
    return numbers.astype(np.float32)


def lists(table: pa.Table, name: str, field: str) -> tuple[pa.ChunkedArray, np.ndarray]:
    """A column of lists: all items behind each other, and where each row's begin, int64 [n+1].

    Raises DataError for another type, for a missing list and for a missing item.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    values = full(table, name, field)
    kind = values.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DataError(
            f"{field}: column {name!r} holds {kind}, expected a list in every row; use JSONL or Parquet, which can hold lists"
        )
    sizes = np.asarray(pc.list_value_length(values).to_numpy(), np.int64)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    items = pc.list_flatten(values)
    empty = pc.index(pc.is_null(items, nan_is_null=True), True).as_py()
    if empty >= 0:
        row = place(table, int(np.searchsorted(offsets, empty, side="right")) - 1)
        raise DataError(
            f"{field}: the list in {row} of column {name!r} has an item without a value, expected a value in every item; "
            "fill or remove it"
        )
    if pa.types.is_null(items.type):
        items = pa.chunked_array([], pa.string())
    return (items.cast(items.type.value_type) if pa.types.is_dictionary(items.type) else items), offsets


def _of_item(table: pa.Table, offsets: np.ndarray) -> Callable[[int], str]:
    """The place of the row that holds an item."""
    return lambda i: place(table, int(np.searchsorted(offsets, i, side="right")) - 1)


def listed(
    tables: Mapping[int, pa.Table], name: str, known: Sequence[str] | None, field_of: Callable[[int], str], what: str
) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """Labels in lists, as numbers: of every table (int64 [items], offsets [rows+1]), and the names of the labels.

    Names are `known`, or those that `datasets` keeps, or the distinct values of the first table, sorted. what: a label in
    errors. Raises DataError for a label that is none of them.
    """
    names: list[str] | None = None if known is None else list(known)
    out = []
    for origin, table in tables.items():
        field = field_of(origin)
        items, offsets = lists(table, name, field)
        at = _of_item(table, offsets)
        ids, distinct = codes(items, name, field, at)
        own = class_names(table, name)
        if own is not None and (outside := [d for d in distinct if not 0 <= int(d) < len(own)]):
            raise DataError(f"{field}: column {name!r} holds {outside[0]}, expected 0 to {len(own) - 1}")
        said = [str(d) for d in distinct] if own is None else [own[int(d)] for d in distinct]
        if names is None:
            names = said if own is None else list(own)
        position = {label: i for i, label in enumerate(names)}
        number = np.array([position.get(label, -1) for label in said], np.int64)
        found = number[ids] if len(said) else ids
        odd = np.flatnonzero(found < 0)
        if len(odd):
            label = said[ids[odd[0]]]
            whose = "is not in data.classes" if known is not None else "occurs only here and not in the training data"
            raise DataError(
                f"{field}: {what} {label!r} ({at(int(odd[0]))}, {len(odd)} in all) {whose}, expected one of {len(names)}; "
                f"{near(label, names)} or remove those rows"
            )
        out.append((found, offsets))
    return out, tuple(names or ())
