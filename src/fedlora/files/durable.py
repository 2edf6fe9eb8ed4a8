"""Files written whole or not at all, readable by their owner alone, and on the disk itself where it matters."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

FOLDER, FILE = 0o700, 0o600  # what others may not read: personal leaves, tokens of private texts, keys
FEW = 8  # files that are synced one by one; for more, one call for the whole file system is quicker
REPORTS_ERRORS = (5, 8)  # Linux from here on: syncfs says when something could not be written
_BINARY = getattr(os, "O_BINARY", 0)  # Windows would translate line ends


def write(path: Path, data: bytes, sync: bool = True, mode: int = FILE, mark: str = "") -> None:
    """Write a file by way of a temporary one, so that a crash leaves the old file or the new one.

    sync: have it on the disk before this returns. mark: tells apart the temporary files of several processes that may write the
    same file; what a crash leaves of one without a mark is overwritten next time. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}{mark}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, mode), "wb") as f:
            f.write(data)
            if sync:
                f.flush()
                os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_one(path.parent)


def make(folder: Path, root: Path) -> None:
    """Make a folder under `root` and those between, for their owner alone. Raises OSError."""
    for path in reversed([folder, *folder.parents]):
        if root in path.parents and not path.is_dir():
            path.mkdir(mode=FOLDER, exist_ok=True)


def append(path: Path, data: bytes, sync: bool = True) -> int:
    """Append to a file; returns its length in bytes. Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _BINARY, FILE)
    with os.fdopen(fd, "ab") as f:
        f.write(data)
        f.flush()
        if sync:
            os.fsync(f.fileno())
        return f.tell()


def sync_one(path: Path) -> None:
    """Have one file, or the names in one folder, on the disk. Raises OSError."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_all(root: Path, paths: Sequence[Path]) -> None:
    """Have these files under `root`, and their names, on the disk. Raises OSError.

    Many files take one call (syncfs) for the whole file system instead of one for each: a disk is waited for once.
    """
    if len(paths) > FEW and _syncfs(root):
        return
    for path in paths:
        sync_one(path)
    folders = {f for p in paths for f in p.parents if f == root or root in f.parents}
    for folder in sorted(folders, key=lambda f: -len(f.parts)):
        sync_one(folder)


@cache
def _libc() -> ctypes.CDLL | None:
    """The C library, where it has a syncfs that reports errors."""
    if not sys.platform.startswith("linux"):
        return None
    release = tuple(int(n) for n in os.uname().release.split("-")[0].split(".")[:2] if n.isdigit())
    library = ctypes.CDLL(None, use_errno=True)
    return library if release >= REPORTS_ERRORS and hasattr(library, "syncfs") else None


def _syncfs(root: Path) -> bool:
    """Sync the file system that holds `root`; False where the system cannot. Raises OSError where the disk could not."""
    library = _libc()
    if library is None:
        return False
    fd = os.open(root, os.O_RDONLY)
    try:
        if library.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(root))
    finally:
        os.close(fd)
    return True
