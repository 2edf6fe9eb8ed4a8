"""JSON into a table: one object a line, or one list of objects."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError
from .lines import placed
from .separated import LARGEST_BLOCK, first_line, short

if TYPE_CHECKING:
    import pyarrow as pa

EXPECTED = "expected one JSON object a line, or in a .json file one list of objects; correct it, or set data.format"
BLANK = re.compile(r"[ \t\r\n]*")


def json_rows(path: Path | str, data: bytes, lists: bool) -> pa.Table:
    """The table in `data` (UTF-8). lists: the file may be one list of objects. Raises DataError with the line at fault."""
    listed = lists and data.lstrip()[:1] == b"["
    begins = [(n, line[:1]) for n, line in enumerate(map(bytes.lstrip, data.split(b"\n")), 1) if line]
    if not begins:
        raise DataError(f"data.source: {path} has no rows, expected at least one; write the file again or leave it out")
    if not listed and all(first == b"{" for _, first in begins):
        lines = np.array([n for n, _ in begins], np.int64)
        table = _table(path, data, lines)
        if table.num_rows == len(lines):
            return placed(table, f"{path}, line", lines)
    # A list, or objects that are not one a line. pyarrow ends the process where the first row is null, so it sees none.
    objects, lines = _objects(path, data.decode(), listed)
    return placed(_table(path, b"\n".join(objects), lines), f"{path}, line", lines)


def _table(path: Path | str, data: bytes, lines: np.ndarray) -> pa.Table:
    import pyarrow as pa
    from pyarrow import json as arrow_json

    block = arrow_json.ReadOptions(use_threads=False, block_size=min(len(data) + 1, LARGEST_BLOCK))
    try:
        return arrow_json.read_json(pa.BufferReader(data), read_options=block)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        raise _bad_line(path, data) or _mixed(path, lines, e) from e


def _objects(path: Path | str, text: str, listed: bool) -> tuple[list[bytes], np.ndarray]:
    """The objects of a list, or one after another, each as one line, and the line at which each begins. Raises DataError."""
    decoder = json.JSONDecoder()
    objects: list[bytes] = []
    lines: list[int] = []
    line, seen = 1, 0
    at = _past(text, text.index("[") + 1 if listed else 0)
    while text[at : at + 1] not in ("]" if listed else "", ""):
        line, seen = line + text.count("\n", seen, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as e:
            raise _at(path, e.lineno, f"not JSON ({e.msg})", text, e.pos) from e
        except RecursionError as e:
            raise _at(path, line, "not JSON (nested too deeply)", text, at) from e
        if not isinstance(value, dict):
            raise _at(path, line, f"a {type(value).__name__}, not an object", text, at)
        # A line break inside a text is written as \\n, so those that stand here are blanks between words of JSON.
        objects.append(re.sub(r"[\r\n]", " ", text[at:end]).encode())
        lines.append(line)
        at = _past(text, end)
        if listed:
            if text[at : at + 1] not in (",", "]"):
                raise _at(path, _line(text, at), "no comma and no end of the list", text, at)
            at = _past(text, at + 1) if text[at] == "," else at
    if listed:
        if text[at : at + 1] != "]":
            raise _at(path, _line(text, at), "the list does not end; was the file cut off?", text, at)
        after = _past(text, at + 1)
        if after < len(text):
            raise _at(path, _line(text, after), "something follows the end of the list", text, after)
        if not objects:
            raise DataError(f"data.source: {path} has no rows (an empty list), expected at least one")
    return objects, np.array(lines, np.int64)


def _past(text: str, at: int) -> int:
    """The next place that is not blank."""
    return BLANK.match(text, at).end()  # type: ignore[union-attr]  # it matches anywhere


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _at(path: Path | str, line: int, problem: str, text: str, at: int) -> DataError:
    around = text[max(0, at - 20) : at + 40].strip()
    return DataError(f"data.source: {path}, line {line}: {problem}: {short(around)}; {EXPECTED}")


def _bad_line(path: Path | str, data: bytes) -> DataError | None:
    """The first line that is no JSON object."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
                problem = "" if isinstance(value, dict) else f"a {type(value).__name__}, not an object"
            except ValueError as e:
                problem = f"not JSON ({e})"
            if problem:
                return DataError(f"data.source: {path}, line {number}: {problem}: {short(line.decode())}; {EXPECTED}")  # fmt: skip
    return None


def _mixed(path: Path | str, lines: np.ndarray, e: Exception) -> DataError:
    """The error for a column whose type changes. pyarrow counts rows from 0 and leaves out blank lines."""
    found = re.search(r"in row (\d+)", str(e))
    where = f", line {lines[int(found[1])]}" if found and int(found[1]) < len(lines) else ""
    reason = re.sub(r" in row \d+", "", first_line(e))
    return DataError(f"data.source: {path}{where}: {reason}; expected one type in each column; correct the line")
