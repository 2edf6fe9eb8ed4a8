"""The user's cache: tokens of texts and compiled libraries. One place for all of it, private, and verified when it is read.

FEDLORA_CACHE names the folder, or is `off`; without it, $XDG_CACHE_HOME/fedlora, by default ~/.cache/fedlora.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from . import durable

Kind = Literal["tokens", "compiled"]
KINDS: tuple[Kind, ...] = ("tokens", "compiled")
OFF = "off"
MARK = b"fedlora cache 1\n"  # stands before the digest at the end of every file
DIGEST = 32  # bytes


@dataclass(frozen=True)
class Entry:
    """One file. age: seconds since it was written."""

    kind: str
    path: Path
    size: int
    age: float


def folder() -> Path | None:
    """Where the cache is; None where it is switched off or nobody's home is known."""
    said = os.environ.get("FEDLORA_CACHE")
    if said:
        return None if said.lower() == OFF else Path(said).expanduser().absolute()
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # no HOME, and the system does not know this user
        return None
    return base / "fedlora"


def room(kind: Kind, root: Path | None = None) -> Path | None:
    """The folder of a kind of files, made if need be; None where there is none that is private.

    root: instead of `folder()`. A folder that belongs to somebody else, or that others may write to and we cannot close, is not
    used: what lies there may be anybody's.
    """
    root = root or folder()
    if root is None:
        return None
    place = root / kind
    try:
        place.mkdir(mode=durable.FOLDER, parents=True, exist_ok=True)
        for path in (root, place):
            if not _ours(path.stat()):
                return None
        for path in (root, place):
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                path.chmod(durable.FOLDER)
    except OSError:
        return None
    return place


def read(path: Path) -> bytes | None:
    """What `seal` wrote; None where there is nothing, or what is there is damaged or not of this user's making."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    except OSError:
        return None
    with os.fdopen(fd, "rb") as f:
        facts = os.fstat(f.fileno())
        if not _ours(facts) or stat.S_IMODE(facts.st_mode) & 0o022:
            return None
        data = f.read()
    return _opened(data)


def write(path: Path, payload: bytes) -> None:
    """Raises OSError."""
    durable.write(path, payload + _seal(payload), mark=f".{os.getpid()}")


def _seal(payload: bytes) -> bytes:
    return MARK + hashlib.blake2b(payload, digest_size=DIGEST).digest()


def _opened(data: bytes) -> bytes | None:
    end = len(data) - DIGEST - len(MARK)
    payload = data[: max(end, 0)]
    return payload if end >= 0 and data[end:] == _seal(payload) else None


def _ours(facts: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or facts.st_uid == os.geteuid()


def entries(root: Path | None = None) -> list[Entry]:
    """Every file of the cache, the newest first; also what earlier versions left there."""
    root = root or folder()
    if root is None or not root.is_dir():
        return []
    found: list[Entry] = []
    for kind, pattern in ((KINDS[0], "tokens/*"), (KINDS[1], "compiled/*"), (KINDS[1], "*.so")):
        for path in root.glob(pattern):
            with contextlib.suppress(OSError):
                facts = path.lstat()
                if stat.S_ISREG(facts.st_mode) or stat.S_ISLNK(facts.st_mode):
                    found.append(Entry(kind, path, facts.st_size, max(0.0, time.time() - facts.st_mtime)))
    return sorted(found, key=lambda e: e.age)


def clear(root: Path | None = None) -> list[Entry]:
    """Delete every file of the cache; returns what was there. Raises OSError."""
    gone = entries(root)
    for entry in gone:
        entry.path.unlink(missing_ok=True)
    return gone
