"""What server and sites say to each other: a JSON header and one encoded message per client.

Every packet names its run and round, so that one of another run, or one that is sent again, is seen to be foreign.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import UploadError

Kind = Literal["join", "train", "evaluate"]
KINDS: tuple[Kind, ...] = ("join", "train", "evaluate")
EVERYBODY = ""  # the part that all clients of a packet read, where a method sends all of them the same
PROTOCOL = 1  # of packets; both sides must speak the same


@dataclass(frozen=True)
class Packet:
    """header: JSON. parts: bytes of `wire.encode` by client id.

    A server's header: run, protocol, recipe, round, rounds, clients (id -> round of its last accepted upload, or null).
    A site's: run, round, clients (id -> facts), and what the kind asks for; or error, why it cannot answer.
    """

    kind: Kind
    header: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, bytes] = field(default_factory=dict)


def same(header: Mapping[str, Any], **expected: Any) -> None:
    """Refuse a header that is not of this run and round. Raises UploadError."""
    for name, want in expected.items():
        got = header.get(name)
        if got != want:
            raise UploadError(
                f"message is of {name} {got!r}, expected {want!r}: it was sent again or belongs to another run"
            )
