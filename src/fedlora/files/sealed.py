"""JSON files and lines that carry their own checksum, so that damage is noticed. No torch: reports read them too.

A JSON object's last entry is `checksum`, that of all the text before it; other programs read such a file as any other. A line's is
`check`, shorter. metrics.jsonl has none in its lines: the server's state holds the digest of all of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import StateError
from . import durable

INDENTED = 100_000  # characters; longer objects stand on one line, which is written and read much faster
_SEAL = re.compile(rb',?\n "checksum": "([0-9a-f]{32})"\n\}\n\Z')
_LINE = re.compile(rb', "check": "([0-9a-f]{8})"\}\Z')
METADATA = "fedlora"  # of a state file's header


def digest(data: bytes, size: int = 16) -> str:
    """Hex digits."""
    return hashlib.blake2b(data, digest_size=size).hexdigest()


# objects ----------------------------------------------------------------------------------------------------------------
def dumps(value: Mapping[str, Any]) -> bytes:
    """A JSON object with its checksum."""
    text = json.dumps(value)
    if len(text) <= INDENTED:
        text = json.dumps(value, indent=1)
    head = text[:-1].rstrip().encode()
    return head + (b",\n" if value else b"\n") + f' "checksum": "{digest(head)}"\n}}\n'.encode()


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Raises OSError."""
    durable.write(path, dumps(value))


def read(path: Path) -> dict[str, Any] | None:
    """What `write` wrote, None where there is no such file. Raises StateError for anything else."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise StateError(f"{path}: cannot be read: {e.strerror}; restore it") from e
    found = _SEAL.search(data)
    if found is None and _plain(data):
        raise StateError(
            f"{path}: has no checksum: it was changed after it was written, or an earlier version of fedlora wrote it; restore it, or "
            "run the recipe in another folder"
        )
    if found is None or digest(data[: found.start()]) != found[1].decode():
        raise StateError(
            f"{path}: its checksum does not match: it was cut off or changed after it was written; restore it"
        )
    value: dict[str, Any] = json.loads(data)
    value.pop("checksum")
    return value


def _plain(data: bytes) -> bool:
    """Whether this is a JSON object without a checksum."""
    try:
        value = json.loads(data)
    except ValueError:
        return False
    return isinstance(value, dict) and "checksum" not in value


# lines ------------------------------------------------------------------------------------------------------------------
def line(value: Mapping[str, Any]) -> bytes:
    """One line of a file of records, with its checksum."""
    head = json.dumps(value)[:-1].encode()
    return head + f', "check": "{digest(head, 4)}"}}\n'.encode()


def lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """(records, numbers of the lines that are damaged, from 1). ([], []) where there is no such file. Raises StateError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], []
    except OSError as e:
        raise StateError(f"{path}: cannot be read: {e.strerror}; restore it") from e
    good: list[dict[str, Any]] = []
    bad: list[int] = []
    for number, text in enumerate(data.splitlines(), 1):
        found = _LINE.search(text)
        if found is None or digest(text[: found.start()], 4) != found[1].decode():
            bad.append(number)
            continue
        value: dict[str, Any] = json.loads(text)
        value.pop("check")
        good.append(value)
    return good, bad


# records of rounds ------------------------------------------------------------------------------------------------------
class Tally:
    """The digest of a file that grows. length: bytes so far."""

    def __init__(self) -> None:
        self._digest, self.length = hashlib.blake2b(digest_size=16), 0

    def add(self, data: bytes) -> None:
        self._digest.update(data)
        self.length += len(data)

    @property
    def hex(self) -> str:
        return self._digest.copy().hexdigest()


def tally(path: Path, length: int) -> Tally:
    """Of a file's first `length` bytes, or of fewer where it is shorter."""
    out = Tally()
    if length and path.exists():
        with path.open("rb") as f:
            while out.length < length and (chunk := f.read(min(1 << 20, length - out.length))):
                out.add(chunk)
    return out


def check_metrics(path: Path, header: Mapping[str, Any]) -> Tally:
    """The tally of the lines that a server's state counts as its own. Raises StateError where they are not as written."""
    length, known = header["metrics_bytes"], header.get("metrics_digest")
    found = tally(path, length)
    if found.length < length:
        raise StateError(
            f"{path}: has {found.length} bytes, the committed rounds wrote {length}; it was cut off: restore it, or start again "
            "in another folder"
        )
    if known is not None and found.hex != known:
        raise StateError(
            f"{path}: was changed after it was written: its checksum is not the one that the committed rounds left; restore it, or "
            "start again in another folder"
        )
    return found


def verify_metrics(path: Path) -> None:
    """Check a run's metrics.jsonl against the newest server's state beside it whose header can be read, if there is one.

    Raises StateError where they do not fit.
    """
    states = sorted((path.parent / "server").glob("*.safetensors"), reverse=True)
    newest = next((h for h in map(header_of, states) if h is not None), None)
    if newest is not None and "metrics_bytes" in newest:
        check_metrics(path, newest)


def header_of(path: Path) -> dict[str, Any] | None:
    """The header of a server's state file, as it stands there; None where it cannot be read."""
    try:
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            text = f.read(min(length, 1 << 30))
        found: dict[str, Any] = json.loads(json.loads(text)["__metadata__"][METADATA])
        return found
    except (OSError, ValueError, KeyError, TypeError):
        return None
