"""Text with separated fields (CSV, TSV) into a table, with the line of every row and of what is wrong."""

from __future__ import annotations

import csv
import io
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError
from .delimiters import DELIMITERS, WORDS
from .lines import placed

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE, ROWS = 1 << 20, 1000  # bytes and rows that are looked at to tell the delimiter
LARGEST_BLOCK = 1 << 30  # bytes in a block; pyarrow takes the type of a column from the first block


def separated(path: Path | str, data: bytes, delimiter: str, quoted: bool) -> pa.Table:
    """The table in `data` (UTF-8). delimiter: a character, "tab" or "auto"; quoted: a text may stand in quotation marks.

    Raises DataError with the line of an unclosed quotation mark or of a row with another number of fields.
    """
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    delimiter = WORDS.get(delimiter, delimiter)
    if delimiter == "auto":
        delimiter = sniffed(path, data) if quoted else "\t"
    spans = _quoted(path, data, delimiter) if quoted else []
    bad: list[arrow_csv.InvalidRow] = []

    def note(row: arrow_csv.InvalidRow) -> str:
        bad.append(row)
        return "skip" if len(bad) < 2 else "error"

    parse = arrow_csv.ParseOptions(
        delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted, invalid_row_handler=note
    )
    # One block for the whole file, because a column may begin with numbers and have a text on its last line. No threads,
    # because with threads pyarrow does not number the rows.
    block = arrow_csv.ReadOptions(use_threads=False, block_size=min(len(data) + 1, LARGEST_BLOCK))
    try:
        table = arrow_csv.read_csv(pa.BufferReader(data), read_options=block, parse_options=parse)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as e:
        if not bad:
            raise DataError(f"data.source: {path} cannot be read as {'csv' if quoted else 'tsv'} ({first_line(e)}); "
                            "correct the file, or set data.format") from e  # fmt: skip
    if bad:
        row = bad[0]
        hint = f"quote the texts that hold {spoken(delimiter)}" if quoted else "a text must not hold a tab"
        raise DataError(f"data.source: {path}, line {_line_of(data, row.text)}: {row.actual_columns} fields, expected {row.expected_columns} as in the "
                        f"first line: {short(row.text)}; {hint}, or set data.delimiter or data.format")  # fmt: skip
    return placed(table, f"{path}, line", row_lines(data, spans)[1:])  # without the names of the columns


def sniffed(path: Path | str, data: bytes) -> str:
    """The delimiter of a CSV file: the one in its first line. Where that holds several, the one that cuts every row into as many
    fields as the first. Raises DataError where that is not exactly one."""
    sample, cut = data[:SAMPLE].decode(errors="ignore"), len(data) > SAMPLE
    counts = {d: _fields(sample, d, cut) for d in DELIMITERS}
    found = [d for d in DELIMITERS if counts[d][:1] > [1]]
    if len(found) < 2:
        return found[0] if found else ","  # one column, and any will do
    even = [d for d in found if len(set(counts[d])) == 1]
    if len(even) != 1:
        why = "each of them cuts all rows alike" if even else "none of them cuts all rows alike"
        raise DataError(f"data.delimiter: the first line of {path} holds {' and '.join(map(spoken, found))}, and {why}; say which "
                        "it is with data.delimiter, e.g. delimiter: \";\"")  # fmt: skip
    return even[0]


def spoken(delimiter: str) -> str:
    """The plural of a delimiter's name."""
    names = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
    return names.get(delimiter, repr(delimiter))


def _fields(sample: str, delimiter: str, cut: bool) -> list[int]:
    """The number of fields of each row. cut: the last row may not be whole."""
    out = []
    try:
        for row in itertools.islice(csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter), ROWS):
            if row:
                out.append(len(row))
    except csv.Error:  # a field of 128 KiB: this delimiter cuts nothing there
        out.append(-1)
    return out[:-1] if cut and len(out) > 1 else out


def _quoted(path: Path | str, data: bytes, delimiter: str) -> list[tuple[int, int]]:
    """Where quoted texts with line breaks stand. Raises DataError for one that is never closed: pyarrow would read the rest of
    the file as one text."""
    if b'"' not in data:
        return []
    # A quoted field. Group 1 matches if the quote is never closed.
    field = re.compile(rb"(?:\A|(?<=[" + re.escape(delimiter.encode()) + rb'\r\n]))"(?:[^"]++|"")*+(?:"|(\Z))')
    out = []
    for m in field.finditer(data):
        if m[1] is not None:
            line, text = data.count(b"\n", 0, m.start()) + 1, data[m.start() :].partition(b"\n")[0].decode()
            raise DataError(f"data.source: {path}, line {line}: a quotation mark opens a text here and none closes it: "
                            f"{short(text)}; close it, or double it inside quotation marks")  # fmt: skip
        if b"\n" in m[0] or b"\r" in m[0]:
            out.append(m.span())
    return out


def row_lines(data: bytes, spans: list[tuple[int, int]]) -> np.ndarray:
    """The line at which each row begins, int64 [rows], as an editor counts them. Blank lines are no rows; line breaks within
    `spans` end none."""
    raw = np.frombuffer(data, np.uint8)
    ends = raw == 10
    mac = raw == 13
    mac[:-1] &= raw[1:] != 10  # the line break of old Macs, without the first half of Windows's
    at = np.flatnonzero(ends | mac)
    starts = np.concatenate([[0], at + 1])
    stops = np.concatenate([at, [len(raw)]])
    stops = np.where((stops > starts) & (raw[np.minimum(stops - 1, len(raw) - 1)] == 13), stops - 1, stops)
    row = stops > starts
    for a, b in spans:
        row[np.searchsorted(starts, a, side="right") : np.searchsorted(starts, b, side="left")] = False
    return np.flatnonzero(row) + 1


def _line_of(data: bytes, row: str) -> int:
    """The line that is `row`: pyarrow counts rows, and a quoted text may hold line breaks."""
    found = re.search(rb"(?m)^" + re.escape(row.encode()) + rb"\r?$", data)
    return data.count(b"\n", 0, found.start() if found else 0) + 1


def first_line(e: Exception) -> str:
    """What a library says of its error, in one line."""
    return str(e).strip().splitlines()[0].rstrip(".")


def short(text: str) -> str:
    """A text in quotation marks, cut to a line."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
