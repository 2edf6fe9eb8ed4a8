"""One sheet of an Excel workbook into a table. Its first row that is not blank names the columns."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, near
from . import values
from .lines import placed

if TYPE_CHECKING:
    import pyarrow as pa


def workbook(path: Path | str, raw: bytes, sheet: str | None) -> pa.Table:
    """The rows of a sheet; formulas count as the value they had when the workbook was saved, errors (#N/A) as no value.

    sheet: its name; None for the only one. Raises DataError for a workbook with several sheets if none is named.
    """
    try:
        import openpyxl
    except ModuleNotFoundError as e:
        raise DataError(
            f"data.source: {path} is a workbook, and openpyxl is not installed: pip install 'fedlora[excel]'"
        ) from e
    with warnings.catch_warnings():  # about styles and menus, which are no data
        warnings.simplefilter("ignore")
        try:
            book = openpyxl.load_workbook(io.BytesIO(raw), read_only=True, data_only=True)
            name = _chosen(path, [w.title for w in book.worksheets], sheet)
            rows = [[None if c.data_type == "e" else c.value for c in row] for row in book[name].iter_rows()]
        except (zipfile.BadZipFile, KeyError, ValueError, OSError, EOFError, SyntaxError) as e:
            raise DataError(f"data.source: {path} ({len(raw)} bytes) is no whole workbook ({type(e).__name__}: {e}); it was cut off, is "
                            "protected by a password, or is something else: save it again as .xlsx") from e  # fmt: skip
    return _table(f"{path}, sheet {name!r}", rows)


def _chosen(path: Path | str, names: Sequence[str], sheet: str | None) -> str:
    if sheet is None and len(names) != 1:
        raise DataError(
            f"data.sheet: {path} holds {len(names)} sheets: {', '.join(map(repr, names))}; expected one, or data.sheet to say which it is"
        )
    if sheet is not None and sheet not in names:
        raise DataError(f"data.sheet: {path} has no sheet {sheet!r}; {near(sheet, names)}")
    return names[0] if sheet is None else sheet


def _table(where: str, rows: Sequence[Sequence[Any]]) -> pa.Table:
    from openpyxl.utils import get_column_letter

    filled = [(n, row) for n, row in enumerate(rows, 1) if any(v not in (None, "") for v in row)]
    if not filled:
        raise DataError(f"data.sheet: {where} is empty, expected the names of the columns and a row at least")
    (first, header), *body = filled
    width = max(i + 1 for _, row in filled for i, v in enumerate(row) if v not in (None, ""))
    names = [*header, *[None] * width][:width]
    for i, name in enumerate(names):
        if name in (None, ""):
            at = f"{get_column_letter(i + 1)}{first}"
            raise DataError(f"data.sheet: {where}, cell {at} is blank, expected the name of the column below it; "
                            "row {0} must name every column".format(first))  # fmt: skip
    cut = [[*row, *[None] * width][:width] for _, row in body]
    return placed(values.table([str(n) for n in names], cut), f"{where}, row", [n for n, _ in body])
