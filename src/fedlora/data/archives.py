"""Files packed by gzip or zip: the one data file inside, in memory."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from pathlib import Path

from ..errors import DataError

PACKED = (".gz", ".zip")


def inner_suffix(path: Path) -> str:
    """The ending of a path in small letters; of rows.csv.gz it is .csv."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def unpacked(path: Path) -> tuple[Path, bytes]:
    """The name and the bytes of a file, unpacked where it is packed. Raises DataError for one that is damaged, protected by a
    password, or holds several files."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise DataError(f"data.source: {path} cannot be read ({e.strerror}); check its permissions") from e
    suffix = path.suffix.lower()
    try:
        if suffix == ".gz":
            return path, gzip.decompress(raw) if raw else b""
        if suffix == ".zip":
            return _member(path, raw)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as e:
        raise DataError(
            f"data.source: {path} ({len(raw)} bytes) is no whole {suffix[1:]} file ({e}); it was cut off or is something else: "
            "fetch it again, or unpack it"
        ) from e
    return path, raw


def _member(path: Path, raw: bytes) -> tuple[Path, bytes]:
    with zipfile.ZipFile(io.BytesIO(raw)) as z:
        # Macs add files of their own.
        files = [i for i in z.infolist() if not i.is_dir() and not i.filename.startswith("__MACOSX/")
                 and not Path(i.filename).name.startswith(".")]  # fmt: skip
        if len(files) != 1:
            names = ", ".join(i.filename for i in files[:5]) + (", ..." if len(files) > 5 else "")
            raise DataError(f"data.source: {path} holds {len(files)} files{': ' if files else ''}{names}; expected one; unpack it "
                            "and name the file or the folder")  # fmt: skip
        if files[0].flag_bits & 1:
            raise DataError(f"data.source: {path} is protected by a password; unpack it and name the file inside")
        return path / files[0].filename, z.read(files[0])
