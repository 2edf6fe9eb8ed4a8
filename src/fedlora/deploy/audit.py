"""A site's own record of what a server has asked and what has left: audit.jsonl in its state folder, one JSON object a line.

Nothing of it is ever sent. Every line is on the disk before the reply leaves, so that what cannot be recorded is not done.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..federation import wire
from .packets import Packet

FILE = "audit.jsonl"
DAY = 24 * 3600.0


class Audit:
    """The file in `folder`. clock: seconds since 1970."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time):
        self.path, self.clock = folder / FILE, clock
        self._asked: list[tuple[float, str, str]] = [
            (x["at"], x["kind"], x["run"]) for x in self.lines() if x.get("event") == "asked"
        ]

    def write(self, event: str, **facts: Any) -> None:
        """Append a line. Raises OSError where that cannot be."""
        now = self.clock()
        line = {
            "at": now,
            "time": datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
            "event": event,
            **facts,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as f:
            f.write(json.dumps(line).encode() + b"\n")  # a line of ASCII: nothing in it can act on a terminal
            f.flush()
            os.fsync(f.fileno())
        if event == "asked":
            self._asked.append((now, facts["kind"], facts["run"]))

    def lines(self) -> Iterator[dict[str, Any]]:
        """What is written; a last line that a crash has cut off is passed over."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8", errors="replace") as f:
            for text in f:
                try:
                    found = json.loads(text)
                except ValueError:
                    continue
                if isinstance(found, dict):
                    yield found

    def today(self, kind: str) -> int:
        """Orders of a kind that were taken up in the last 24 hours."""
        return sum(k == kind and self.clock() - at < DAY for at, k, _ in self._asked)

    def runs(self) -> set[str]:
        """Runs that asked for anything in the last 24 hours."""
        return {run for at, _, run in self._asked if self.clock() - at < DAY}

    def of_run(self, kind: str, run: str) -> int:
        """Orders of a kind that were taken up for a run, ever."""
        return sum((k, r) == (kind, run) for _, k, r in self._asked)


def contents(packet: Packet) -> dict[str, Any]:
    """What of a packet leaves: its header, and each client's leaves by name and shape with bytes and digest."""
    leaves: dict[str, list[int]] = {}
    parts: dict[str, Any] = {}
    for client, message in packet.parts.items():
        params, _ = wire.decode(message)
        leaves |= {str(k): list(v.shape) for k, v in params.items()}
        parts[client] = {"bytes": len(message), "sha256": hashlib.sha256(message).hexdigest()}
    return {"header": dict(packet.header), "leaves": leaves, "parts": parts}


def digest(recipe: Mapping[str, Any]) -> str:
    """sha256 of a recipe as sites are told it. A recipe's short hash is no promise: its writer can find two that share it."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
