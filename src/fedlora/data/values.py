"""Rows of Python values, as a workbook or a database gives them, into a table with one type in each column."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

# Types that Arrow takes as they are, if a column holds no other.
PLAIN = (bool, int, float, str, bytes, decimal.Decimal, datetime.datetime, datetime.date, datetime.time)


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> pa.Table:
    """A table of the rows. A column of whole and broken numbers is of broken ones. Any other mixture is of text, as a CSV file
    would hold it."""
    import pyarrow as pa

    columns = list(zip(*rows, strict=True)) if rows else [() for _ in names]
    return pa.table([_array(c) for c in columns], names=list(names))


def _array(values: Sequence[Any]) -> pa.Array:
    import pyarrow as pa

    kinds = {type(v) for v in values if v is not None}
    whole = kinds <= {int, float} or kinds == {list} or kinds == {dict} or (len(kinds) == 1 and kinds <= set(PLAIN))
    if whole:
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
            pass  # such as a number of more than 64 bits, or lists of several types
    return pa.array([None if v is None else _text(v) for v in values], pa.string())


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    return str(value)
