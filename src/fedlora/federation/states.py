"""State files and the folder they are in: sealed when written, verified when read, every error with its remedy."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import StateError, UploadError
from ..files import durable, sealed
from ..tree import Params
from . import wire

DIGEST = 32  # bytes


class Folder:
    """A folder `root` that is written to."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a value as a sealed JSON file, whole or not at all. Raises StateError."""
        self.write(self.root / name, sealed.dumps(value))

    def read_json(self, name: str) -> dict[str, Any]:
        """What write_json wrote, {} if it did not. Raises StateError if damaged."""
        return sealed.read(self.root / name) or {}

    def renew_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a file that can be made again where it is damaged or gone, and say so."""
        if self.damaged(name):
            self.mended(name, "it was written anew")
            self.write_json(name, value)

    def damaged(self, name: str) -> bool:
        """Whether a file of `write_json` is gone or not as it was written."""
        try:
            return sealed.read(self.root / name) is None
        except StateError:
            return True

    def mended(self, name: str, how: str) -> None:
        """Say that a file is written again."""
        was = "is damaged" if (self.root / name).exists() else "is gone"
        warnings.warn(f"{self.root / name} {was}: {how}.", stacklevel=3)

    def write(self, path: Path, data: bytes, sync: bool = True) -> None:
        """Write a file whole or not at all."""
        with self.writing(path):
            durable.write(path, data, sync)

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[None]:
        """Give a failed write its remedy. Raises StateError."""
        try:
            yield
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                reason, remedy = "the disk is full", "free some space"
            elif e.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
                reason, remedy = "writing is not permitted", "give a folder you may write to"
            else:
                reason, remedy = e.strerror or str(e), "look at the disk"
            raise StateError(
                f"{path}: cannot be written: {reason}; {remedy} and resume: committed rounds are kept in {self.root}"
            ) from e


def name_of(round: int) -> str:
    """A state's file."""
    return f"{round:06d}.safetensors"


def rounds_in(folder: Path) -> list[int]:
    """Rounds whose states are in a folder, ascending."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return sorted(int(n.split(".")[0]) for n in names if n.endswith(".safetensors") and not n.startswith("."))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def seal(params: Params, header: Mapping[str, Any]) -> bytes:
    """A state file: safetensors whose header holds the digest of everything else in it."""
    body = wire.encode(params, header)
    return wire.encode(params, {**header, "digest": _digest(body).hex()})


def opened(path: Path) -> tuple[Params, dict[str, Any]]:
    """Leaves and header of a state file that is what was written. Raises StateError otherwise."""
    try:
        params, header = wire.decode(path.read_bytes())
        digest = header.pop("digest")
        whole = _digest(wire.encode(params, header)).hex() == digest
    except (UploadError, KeyError, AttributeError):
        whole = False
    except OSError as e:
        raise StateError(f"{path}: cannot be read: {e.strerror}; restore it") from e
    if not whole:
        raise StateError(
            f"{path}: its checksum does not match: it was cut off or changed after it was written. Restore this file, or run "
            "the recipe in another folder."
        )
    return params, header
