"""Where a row stands. Two hidden columns keep the file and the line that each row was read from, so that errors name them
after rows were left out, drawn or joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

CLIENT = "__client__"  # the file of each row, where client="file" asks for it
FILE = "__file__"  # what a line is counted in, such as "notes.csv, line"
LINE = "__line__"  # counted from 1; null where a file is one row
HIDDEN = (CLIENT, FILE, LINE)


def placed(table: pa.Table, counted: str, lines: Sequence[int] | np.ndarray | None) -> pa.Table:
    """The table with the place of each row. counted: what lines are counted in; lines: int64 [n], None where there are none."""
    import pyarrow as pa

    n = table.num_rows
    index = pa.array(np.zeros(n, np.int32))
    where = pa.DictionaryArray.from_arrays(index, pa.array([counted]))
    numbers = pa.nulls(n, pa.int64()) if lines is None else pa.array(np.asarray(lines, np.int64))
    return table.append_column(FILE, where).append_column(LINE, numbers)


def place(table: pa.Table, row: int) -> str:
    """Where row `row` (counted from 0) of a table stands: "notes.csv, line 7", or "row 7" of a table that was no file."""
    if FILE not in table.column_names or LINE not in table.column_names:
        return f"row {row + 1}"
    file, line = table.column(FILE)[row].as_py(), table.column(LINE)[row].as_py()
    return str(file) if line is None else f"{file} {line}"


def shown(table: pa.Table) -> list[str]:
    """The names of the columns that a user has written."""
    return [n for n in table.column_names if n not in HIDDEN]
