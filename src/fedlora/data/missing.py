"""Rows without a value that a recipe needs: left out, counted and said, where data.missing is "drop". Else the first is an error."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from . import template
from .lines import place

if TYPE_CHECKING:
    import pyarrow as pa


def complete(
    tables: Mapping[int, pa.Table], data: Mapping[str, Any], more: Sequence[str | None]
) -> dict[int, pa.Table]:
    """The rows that have a value in every column that section `data` names, and in the columns `more`.

    A text, label or completion of blanks alone is none: CSV writes a missing value so. Warns with the counts. Raises DataError if no
    row is left.
    """
    out, lost, total, first = {}, Counter[str](), sum(t.num_rows for t in tables.values()), ""
    for origin, table in tables.items():
        keep = np.ones(table.num_rows, bool)
        for name, blank in dict(_needed(data, more)).items():
            if name in table.column_names:
                gone = keep & _empty(table, name, blank)
                if gone.any():
                    lost[name] += int(gone.sum())
                    first = first or place(table, int(np.flatnonzero(gone)[0]))
                    keep &= ~gone
        out[origin] = table if keep.all() else table.filter(keep)
        if not out[origin].num_rows:
            raise DataError(f"data.missing: none of {table.num_rows} rows has a value in every column ({_said(lost)}), expected one at "
                            "least; name other columns, or fill them")  # fmt: skip
    if lost:
        warnings.warn(
            f"data.missing: {lost.total()} of {total} rows are left out: {_said(lost)}; the first is {first}",
            stacklevel=2,
        )
    return out


def _said(lost: Mapping[str, int]) -> str:
    return ", ".join(f"{n} without {name!r}" for name, n in lost.items())


def _needed(data: Mapping[str, Any], more: Sequence[str | None]) -> Iterator[tuple[str, bool]]:
    """Columns, and whether blanks there are no value."""
    if data.get("template"):
        try:
            named = template.names(data["template"])
        except ValueError:
            named = []  # which the template's own error says
        yield from ((data[n] if isinstance(data.get(n), str) else n, False) for n in sorted(named))
    prompt = data.get("prompt")  # of several columns only the first must have a value
    first = prompt if isinstance(prompt, str | None) else prompt[0]
    yield from ((n, False) for n in (first, data.get("messages"), *more) if n)
    text = data.get("text")
    yield from ((n, True) for n in ([text] if isinstance(text, str) else text or ()))
    yield from ((n, True) for n in (data.get("completion"), data.get("label")) if n)


def _empty(table: pa.Table, name: str, blank: bool) -> np.ndarray:
    """Whether each row has no value, bool [n]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = table.column(name)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    empty = pc.is_null(values, nan_is_null=True)
    if blank and (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        empty = pc.or_kleene(empty, pc.equal(pc.utf8_trim_whitespace(values), ""))
    return np.asarray(pc.fill_null(empty, True).to_numpy(), bool)
