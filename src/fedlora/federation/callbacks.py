"""What a run tells whoever watches it: the command line's progress bars, JSON lines, or nobody."""

from __future__ import annotations

from typing import Any

from .records import Line


class Callback:
    """All calls do nothing; override what you want to see."""

    def start(self, name: str, done: int, rounds: int) -> None:
        """The run begins with `done` of `rounds` rounds committed."""

    def resumed(self, sent: int) -> None:
        """The run goes on after an interruption; `sent` bytes have gone up and down before."""

    def round_start(self, round: int, clients: int) -> None:
        """Round `round` (1-based) trains `clients` clients."""

    def steps_done(self, done: int, steps: int) -> None:
        """The clients that are trained at this moment have done `done` of their `steps` local steps."""

    def clients_done(self, n: int) -> None:
        """`n` more clients of this round are trained."""

    def lowered(self, block: int, clients: int) -> None:
        """A block of `clients` clients did not fit into memory: from now on blocks hold `block`."""

    def evaluating(self, round: int) -> None:
        """Evaluation after `round` begins."""

    def record(self, line: Line) -> None:
        """One line of metrics.jsonl (records.py); `line.to_json()` is its text."""

    def round_done(self, round: int, facts: dict[str, Any]) -> None:
        """The round is committed; facts: seconds, bytes, metric."""

    def end(self, summary: dict[str, Any]) -> None:
        """All rounds are done."""


class Several(Callback):
    """Tells each of several watches everything."""

    def __init__(self, *watches: Callback):
        self.watches = watches

    def start(self, name: str, done: int, rounds: int) -> None:
        for w in self.watches:
            w.start(name, done, rounds)

    def resumed(self, sent: int) -> None:
        for w in self.watches:
            w.resumed(sent)

    def steps_done(self, done: int, steps: int) -> None:
        for w in self.watches:
            w.steps_done(done, steps)

    def round_start(self, round: int, clients: int) -> None:
        for w in self.watches:
            w.round_start(round, clients)

    def clients_done(self, n: int) -> None:
        for w in self.watches:
            w.clients_done(n)

    def lowered(self, block: int, clients: int) -> None:
        for w in self.watches:
            w.lowered(block, clients)

    def evaluating(self, round: int) -> None:
        for w in self.watches:
            w.evaluating(round)

    def record(self, line: Line) -> None:
        for w in self.watches:
            w.record(line)

    def round_done(self, round: int, facts: dict[str, Any]) -> None:
        for w in self.watches:
            w.round_done(round, facts)

    def end(self, summary: dict[str, Any]) -> None:
        for w in self.watches:
            w.end(summary)
