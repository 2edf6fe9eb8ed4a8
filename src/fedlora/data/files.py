"""One file into a table: CSV, TSV, JSONL, Parquet. Every error names the file and, where there is one, the line or byte."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, DataError, Problem, near

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
# A quoted field. Group 1 matches if the quote is never closed.
_QUOTED = re.compile(rb'(?:\A|(?<=[,\r\n]))"(?:[^"]++|"")*+(?:"|(\Z))')
LARGEST_BLOCK = 1 << 30  # bytes in a block; pyarrow takes the type of a column from the first block


def format_of(path: Path, format: str = "auto") -> str:
    """csv, tsv, jsonl or parquet: as said, or by the file's ending. Raises ConfigError for a format that does not exist."""
    names = sorted(set(FORMATS.values()))
    if format == "auto":
        if path.suffix.lower() not in FORMATS:
            raise DataError(f"data.source: {path} ends in {path.suffix or 'nothing'!r}, expected one of {', '.join(FORMATS)}; "
                            f"say which format it has with data.format ({', '.join(names)})")  # fmt: skip
        return FORMATS[path.suffix.lower()]
    if format not in names:
        raise ConfigError([Problem("data.format", format, f"auto or one of {', '.join(names)}", near(format, names))])
    return format


def read_file(path: Path, format: str = "auto", encoding: str = "utf-8") -> pa.Table:
    """The file as a table. Raises DataError for a file that is missing, empty, malformed or not in `encoding`.

    A TSV has no quoting (as in IANA's text/tab-separated-values and in GLUE's files): a quotation mark is a character.
    """
    if not path.is_file():
        raise missing(path)
    format = format_of(path, format)
    if path.stat().st_size == 0:
        raise DataError(
            f"data.source: {path} is empty (0 bytes), expected {format}; write the file again or leave it out"
        )
    if format == "parquet":
        table = _parquet(path)
    else:
        data = utf8(path, encoding)
        table = _jsonl(path, data) if format == "jsonl" else _separated(path, data, "," if format == "csv" else "\t")
    if table.num_rows == 0:
        raise DataError(
            f"data.source: {path} has no rows (columns {table.column_names}), expected at least one; write the file again or leave it out"
        )
    return table


def missing(path: Path) -> DataError:
    """The error for a path that does not exist, with the near misses in the deepest folder that does."""
    folder, name = path.parent, path.name
    while not folder.is_dir() and folder != folder.parent:
        folder, name = folder.parent, folder.name
    around = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return DataError(
        f"data.source: {path} does not exist, expected a file or folder; in {folder}: {near(name, around)}"
    )


def utf8(path: Path, encoding: str) -> bytes:
    """The text of a file as UTF-8 bytes without a byte order mark. Raises DataError with the position of the first bad byte."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise DataError(f"data.source: {path} cannot be read ({e.strerror}); check its permissions") from e
    try:
        name = codecs.lookup(encoding).name
        "".encode(name)  # base64, rot13 and the like are codecs, but not of text
    except LookupError:
        raise ConfigError(
            [Problem("data.encoding", encoding, "an encoding that Python knows", "e.g. utf-8, latin-1, cp1252")]
        ) from None
    try:
        text = raw.decode(name)
    except UnicodeDecodeError as e:
        line = raw.count(b"\n", 0, e.start) + 1
        raise DataError(f"data.source: {path} is not {encoding}: byte {e.start} (line {line}) is 0x{raw[e.start]:02x}; "
                        "set data.encoding to the file's encoding, e.g. encoding: latin-1 or cp1252, or save it as UTF-8") from None  # fmt: skip
    except UnicodeError as e:  # some encodings do not say which byte is wrong
        raise DataError(
            f"data.source: {path} is not {encoding} ({e}); set data.encoding to the file's encoding"
        ) from None
    # UTF-7 can spell half of a character.
    text = text.encode(errors="replace").decode() if name.startswith("utf-7") else text
    return (raw if name == "utf-8" and not text.startswith("\ufeff") else text.removeprefix("\ufeff").encode()) or b"\n"


def _separated(path: Path, data: bytes, delimiter: str) -> pa.Table:
    import pyarrow as pa
    from pyarrow import csv

    bad: list[csv.InvalidRow] = []

    def note(row: csv.InvalidRow) -> str:
        bad.append(row)
        return "skip" if len(bad) < 2 else "error"

    quoted = delimiter == ","
    parse = csv.ParseOptions(
        delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted, invalid_row_handler=note
    )
    # One block for the whole file, because a column may begin with numbers and have a text on its last line. No threads,
    # because with threads pyarrow does not number the rows.
    open_at = next((m.start() for m in _QUOTED.finditer(data) if m[1] is not None), None) if quoted else None
    if open_at is not None:  # pyarrow would read the rest of the file as one text
        line, text = data.count(b"\n", 0, open_at) + 1, data[open_at:].partition(b"\n")[0].decode()
        raise DataError(f"data.source: {path}, line {line}: a quotation mark opens a text here and none closes it: "
                        f"{_short(text)}; close it, or double it inside quotation marks")  # fmt: skip
    block = csv.ReadOptions(use_threads=False, block_size=min(len(data) + 1, LARGEST_BLOCK))
    try:
        table = csv.read_csv(pa.BufferReader(data), read_options=block, parse_options=parse)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as e:
        if not bad:
            raise DataError(f"data.source: {path} cannot be read as {'csv' if quoted else 'tsv'} ({_first(e)}); "
                            "correct the file, or set data.format") from e  # fmt: skip
    if bad:
        row = bad[0]
        hint = "quote the texts that hold commas" if quoted else "a text must not hold a tab"
        raise DataError(f"data.source: {path}, line {_line_of(data, row.text)}: {row.actual_columns} fields, expected {row.expected_columns} as in the "
                        f"first line: {_short(row.text)}; {hint}, or set data.format")  # fmt: skip
    twice = sorted({n for n in table.column_names if table.column_names.count(n) > 1})
    if twice:
        raise DataError(
            f"data.source: {path} has more than one column {twice[0]!r}, expected distinct names in the first line; rename one"
        )
    return table


def _line_of(data: bytes, row: str) -> int:
    """The line that is `row`: pyarrow counts rows, and a quoted text may hold line breaks."""
    found = re.search(rb"(?m)^" + re.escape(row.encode()) + rb"\r?$", data)
    return data.count(b"\n", 0, found.start() if found else 0) + 1


def _jsonl(path: Path, data: bytes) -> pa.Table:
    import pyarrow as pa
    from pyarrow import json as arrow_json

    block = arrow_json.ReadOptions(use_threads=False, block_size=min(len(data) + 1, LARGEST_BLOCK))
    try:
        return arrow_json.read_json(pa.BufferReader(data), read_options=block)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
        raise _bad_line(path, data) or _mixed(path, data, e) from e


def _bad_line(path: Path, data: bytes) -> DataError | None:
    """The first line that is no JSON object."""
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
                problem = "" if isinstance(value, dict) else f"a {type(value).__name__}, not an object"
            except ValueError as e:
                problem = f"not JSON ({e})"
            if problem:
                return DataError(f"data.source: {path}, line {number}: {problem}: {_short(line.decode())}; "
                                 "expected one JSON object a line; correct it, or set data.format")  # fmt: skip
    return None


def _mixed(path: Path, data: bytes, e: Exception) -> DataError:
    """The error for a column whose type changes. pyarrow counts rows from 0 and leaves out blank lines."""
    found = re.search(r"in row (\d+)", str(e))
    lines = [n for n, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    where = f", line {lines[int(found[1])]}" if found and int(found[1]) < len(lines) else ""
    reason = re.sub(r" in row \d+", "", _first(e))
    return DataError(f"data.source: {path}{where}: {reason}; expected one type in each column; correct the line")


def _parquet(path: Path) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.read_table(path)
    except (pa.ArrowInvalid, OSError) as e:
        raise DataError(f"data.source: {path} ({path.stat().st_size} bytes) is no whole Parquet file ({_first(e)}); "
                        "it was cut off or is something else: fetch or write it again, or set data.format") from e  # fmt: skip


def _first(e: Exception) -> str:
    return str(e).strip().splitlines()[0].rstrip(".")


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
