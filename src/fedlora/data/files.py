"""One file into a table, by its format. Every error names the file and, where there is one, the line or byte."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ConfigError, DataError, Problem, near
from .archives import PACKED, inner_suffix, unpacked
from .lines import placed, shown
from .separated import first_line

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS: Mapping[str, str] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".xlsx": "xlsx",
    ".xlsm": "xlsx",
    ".txt": "txt",
}
MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # what only this encoding begins with


@dataclass(frozen=True)
class Shape:
    """How a source is written: the recipe's fields of these names in section data."""

    format: str = "auto"
    encoding: str = "utf-8"
    delimiter: str = "auto"
    sheet: str | None = None
    query: str | None = None


def is_data_file(path: Path) -> bool:
    """Whether the ending of a path, or of what is packed in it, is that of a data file."""
    return inner_suffix(path) in FORMATS or path.suffix.lower() == ".zip"


def format_of(path: Path, format: str = "auto") -> str:
    """The format as said, or by the file's ending. Raises ConfigError for a format that does not exist."""
    names = sorted(set(FORMATS.values()))
    if format == "auto":
        suffix = inner_suffix(path)
        if suffix == ".xls":
            raise DataError(
                f"data.source: {path} is a workbook of Excel 97 to 2003, expected .xlsx; open it and save it as .xlsx"
            )
        if suffix not in FORMATS:
            raise DataError(f"data.source: {path} ends in {suffix or 'nothing'!r}, expected one of {', '.join([*FORMATS, *PACKED])}; "
                            f"say which format it has with data.format ({', '.join(names)})")  # fmt: skip
        return FORMATS[suffix]
    if format not in names:
        raise ConfigError([Problem("data.format", format, f"auto or one of {', '.join(names)}", near(format, names))])
    return format


def read_file(path: Path, shape: Shape = Shape()) -> pa.Table:
    """The file as a table, with the place of each row (`lines`).

    Raises DataError for a file that is missing, empty, malformed, or not in the encoding said. A TSV has no quoting (as in
    IANA's text/tab-separated-values and in GLUE's files): a quotation mark is a character.
    """
    if not path.is_file():
        raise missing(path)
    name, raw = unpacked(path)
    format = format_of(name, shape.format)
    if not raw:
        raise DataError(
            f"data.source: {name} is empty (0 bytes), expected {format}; write the file again or leave it out"
        )
    table = _table(name, raw, format, shape)
    if table.num_rows == 0:
        raise DataError(
            f"data.source: {name} has no rows (columns {shown(table)}), expected at least one; write the file again or leave it out"
        )
    names = shown(table)
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DataError(
            f"data.source: {name} has more than one column {twice[0]!r}, expected distinct names in the first line; rename one"
        )
    return table


def _table(name: Path, raw: bytes, format: str, shape: Shape) -> pa.Table:
    if format == "parquet":
        return _parquet(name, raw)
    if format == "xlsx":
        from .workbook import workbook

        return workbook(name, raw, shape.sheet)
    data = utf8(name, raw, shape.encoding)
    if format in ("json", "jsonl"):
        from .json_rows import json_rows

        return json_rows(name, data, lists=format == "json")
    if format == "txt":
        import pyarrow as pa

        return placed(pa.table({"text": [data.decode()]}), str(name), None)
    from .separated import separated

    return separated(name, data, shape.delimiter, quoted=format == "csv")


def missing(path: Path) -> DataError:
    """The error for a path that does not exist, with the near misses in the deepest folder that does."""
    folder, name = path.parent, path.name
    while not folder.is_dir() and folder != folder.parent:
        folder, name = folder.parent, folder.name
    around = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return DataError(
        f"data.source: {path} does not exist, expected a file or folder; in {folder}: {near(name, around)}"
    )


def utf8(path: Path, raw: bytes, encoding: str) -> bytes:
    """Text as UTF-8 bytes without a byte order mark. Raises DataError with the position of the first bad byte."""
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
        marked = next((m for start, m in MARKS.items() if raw.startswith(start)), None)
        hint = f"its first two bytes mark it as {marked}: set data.encoding to {marked}" if marked else \
               "set data.encoding to the file's encoding, e.g. encoding: latin-1 or cp1252"  # fmt: skip
        raise DataError(f"data.source: {path} is not {encoding}: byte {e.start} (line {line}) is 0x{raw[e.start]:02x}; "
                        f"{hint}, or save it as UTF-8") from None  # fmt: skip
    except UnicodeError as e:  # some encodings do not say which byte is wrong
        raise DataError(
            f"data.source: {path} is not {encoding} ({e}); set data.encoding to the file's encoding"
        ) from None
    # UTF-7 can spell half of a character.
    text = text.encode(errors="replace").decode() if name.startswith("utf-7") else text
    return (raw if name == "utf-8" and not text.startswith("\ufeff") else text.removeprefix("\ufeff").encode()) or b"\n"


def _parquet(path: Path, raw: bytes) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(pa.BufferReader(raw))
    except (pa.ArrowInvalid, OSError) as e:
        raise DataError(f"data.source: {path} ({len(raw)} bytes) is no whole Parquet file ({first_line(e)}); "
                        "it was cut off or is something else: fetch or write it again, or set data.format") from e  # fmt: skip
    return placed(table, f"{path}, row", np.arange(1, table.num_rows + 1))
