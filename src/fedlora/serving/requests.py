"""Requests from lines of text or from a data file, read and checked before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import sources
from ..data.columns import column, lists, strings, under
from ..data.files import format_of, is_data_file, missing
from ..errors import DataError
from .predict import Request, asked_columns, worded

if TYPE_CHECKING:
    import pyarrow as pa

PAIR = " ||| "  # stands between the two texts of a pair on one line


def of_lines(lines: Sequence[str], data: Mapping[str, Any]) -> list[Request]:
    """One request a line: a text; two with ' ||| ' between them for pairs; a JSON object where a template names several columns.

    data: the recipe's section. Raises DataError.
    """
    columns = asked_columns(data)
    if data.get("template") and len(columns) > 1:
        return [_object(t, i + 1, columns) for i, t in enumerate(lines)]
    if data.get("template") or isinstance(data.get("text"), str) or data.get("text") is None:
        return list(lines)
    if data.get("completion"):  # a line is a whole question, however many columns its parts had in training
        return list(lines)
    pairs = [tuple(t.split(PAIR, 1)) for t in lines]
    if any(len(p) != 2 for p in pairs):
        raise DataError("predict: this model takes pairs; put ' ||| ' between the two texts")
    return list(pairs)


def of_bytes(raw: bytes, what: str, data: Mapping[str, Any]) -> list[Request]:
    """`of_lines` for the lines of a text that are not blank. what: whose text, for errors."""
    encoding = data.get("encoding") or "utf-8"
    try:
        text = raw.decode("utf-8-sig" if encoding == "utf-8" else encoding)
    except UnicodeDecodeError as e:
        raise DataError(
            f"predict: {what} is not {encoding} (byte 0x{raw[e.start]:02x} at offset {e.start}); save it as {encoding}"
        ) from e
    return of_lines([t for t in text.splitlines() if t.strip()], data)


def of_file(path: Path, data: Mapping[str, Any]) -> list[Request]:
    """Every row of a data file (CSV, JSON lines, Parquet, ...) by the columns of training; of any other file every line.

    data: the recipe's section. Raises DataError for a file that cannot be read, and for a column that is not there.
    """
    if not path.is_file():
        raise _named(missing(path))
    if not is_data_file(path) or format_of(path) == "txt":
        try:
            return of_bytes(path.read_bytes(), str(path), data)
        except OSError as e:
            raise DataError(f"predict: cannot read {path} ({e.strerror}); check its permissions") from e
    try:
        table = sources.read(str(path), encoding=data.get("encoding") or "utf-8")
    except DataError as e:
        raise _named(e) from e
    columns = asked_columns(data)
    if data.get("template"):
        values = [strings(table, c, "predict") for c in columns]
        return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]
    if data.get("completion"):
        return list(under(table, columns, "predict"))
    if len(columns) > 1:
        return list(zip(*(strings(table, c, "predict") for c in columns), strict=True))
    return list(
        lists(table, columns[0], "predict") if _nested(table, columns[0]) else strings(table, columns[0], "predict")
    )


def check(requests: Sequence[Request], data: Mapping[str, Any]) -> None:
    """Raise DataError for no request, and for one that does not fit the recipe's columns."""
    if not requests:
        raise DataError(
            "predict: got no text, expected at least one; give it as an argument, with --file, or on standard input"
        )
    for i, r in enumerate(requests):
        worded(r, data, i + 1)


def _named(e: DataError) -> DataError:
    """The same error about the file of a request, which is not the recipe's source."""
    return DataError("predict: " + str(e).removeprefix("data.source: "))


def _nested(table: pa.Table, name: str) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_nested(column(table, name, "predict").type))


def _object(text: str, number: int, columns: Sequence[str]) -> dict[str, Any]:
    """A request of several columns, written as a JSON object."""
    try:
        row = json.loads(text)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        shape = ", ".join(f'"{c}": "..."' for c in columns)
        raise DataError(
            f"predict: request {number} is {text[:40]!r}, expected a JSON object, since data.template names several columns: "
            f"{{{shape}}}"
        )
    return row
