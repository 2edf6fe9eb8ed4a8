"""Targets: class names in a fixed order and a number for each row, or real values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError, near
from .columns import class_names, codes, full

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
    found, distinct = codes(values, name, field)
    if names is not None:
        ids = np.asarray(distinct, np.int64)[found] if distinct else found
        outside = np.flatnonzero((ids < 0) | (ids >= len(names)))
        if len(outside):
            raise DataError(f"{field}: column {name!r} holds {ids[outside[0]]} in row {outside[0] + 1}, expected 0 to {len(names) - 1}; "
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
        raise DataError(f"{field}: label {label!r} (row {unknown[0] + 1}, {len(unknown)} rows in all) {whose}, "
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
            f"{field}: column {name!r} holds {numbers[broken[0]]} in row {broken[0] + 1}, expected a finite number that float32 holds; remove that row"
        )
    return numbers.astype(np.float32)
