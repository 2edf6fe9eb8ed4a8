"""A run folder: written atomically, verified when read, resumable after `kill -9` at any moment.

Order of a round: client states, metrics, then the server state, which names how long metrics.jsonl is and its digest, and whose
leaves of which round belong to it. Until that last rename the round has not happened; afterwards it has. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from ..errors import StateError
from ..files import durable, sealed
from ..tree import Params
from .claim import KEPT_SERVERS, Claimed, states_in
from .personal import Personal
from .states import name_of, opened, rounds_in, seal

BEST = "best.safetensors"  # the server's state of the best round so far
Which = Literal["best", "last"]


class Store(Claimed, Personal):
    """The folder `root`. keep: "last" holds what resuming needs and the best round's states, "all" every round's."""

    def __init__(self, root: str | Path, keep: Literal["last", "all"] = "last"):
        Claimed.__init__(self, root)
        Personal.__init__(self, root, keep)
        self._owned: dict[str, int] | None = (
            None  # client id -> round, of the leaves that the newest server state names
        )
        self._tally: sealed.Tally | None = None  # of metrics.jsonl
        self._passed: set[Path] = set()  # server states that belong to something damaged

    # whose folder it is -----------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time writes here; the lock dies with its process. Raises StateError."""
        with self.writing(self.root):
            self.root.mkdir(mode=durable.FOLDER, parents=True, exist_ok=True)
            lock = FileLock(self.root / ".lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise StateError(
                    f"{self.root}: another process is running in this folder; wait for it, or give another output folder"
                ) from None
        try:
            yield
        finally:
            lock.release()

    # server -----------------------------------------------------------------------------------------------------
    def save_server(
        self,
        round: int,
        params: Params,
        notes: Mapping[str, Any],
        metrics_bytes: int,
        best: int | None = None,
        hold: bool = False,
    ) -> None:
        """Commit a round: from here on it counts. best: the best round so far; hold: this very state is that round's."""
        self.sync()
        if self._owned is None:
            self._owned = self._known_owners()
        owned = (self._owned or {}) | self.pending
        if self._tally is None or self._tally.length != metrics_bytes:
            self._tally = sealed.tally(self.root / "metrics.jsonl", metrics_bytes)
        folder = self.root / "server"
        with self.writing(folder):
            new = not folder.exists()
            folder.mkdir(mode=durable.FOLDER, exist_ok=True)
            if new:
                durable.sync_one(self.root)
        header = {
            "round": round,
            "notes": dict(notes),
            "metrics_bytes": metrics_bytes,
            "metrics_digest": self._tally.hex,
            "leaves": owned,
            "facts": self.facts,
            "best": best,
            "held": hold,
        }
        self.write(folder / name_of(round), seal(params, header))
        if hold:
            self._hold(folder / name_of(round), owned)
        self._owned = owned
        self.pending.clear()
        self._passed.discard(folder / name_of(round))
        if self.keep == "last":
            for old in states_in(self.root)[KEPT_SERVERS:]:
                with self.writing(old):
                    old.unlink(missing_ok=True)

    def _hold(self, path: Path, owned: Mapping[str, int]) -> None:
        """Keep a server's state as that of the best round; its clients' leaves stay as long as it is."""
        mine, half = self.root / BEST, self.root / f".{BEST}.tmp"
        with self.writing(mine):
            half.unlink(missing_ok=True)
            try:
                os.link(path, half)  # the file is never changed, so a second name costs nothing
                os.replace(half, mine)
                durable.sync_one(self.root)
            except OSError:  # a file system without second names
                durable.write(mine, path.read_bytes())
        self.held = dict(owned)

    def load_state(self, which: Which) -> tuple[int, Params, dict[str, Any]] | None:
        """(rounds done, leaves, notes) of the best or the last committed round, None where there is none.

        From here on `load_client` gives the leaves that belong to it. Raises StateError where the best round's state is damaged.
        """
        found = self._newest()
        if which == "best" and found is not None and found[1].get("best") is not None:
            if not (self.root / BEST).exists():
                raise StateError(
                    f"{self.root / BEST}: is gone, the state of the best round; restore it, or ask for the last round"
                )
            params, header = opened(self.root / BEST)
            if header["round"] != found[1]["best"]:
                raise StateError(
                    f"{self.root / BEST}: is of round {header['round']}, the best one is {found[1]['best']}; resume the run, which "
                    "mends it, or ask for the last round"
                )
            found = params, header
        if found is None:
            return None
        self._owned = found[1]["leaves"]
        return found[1]["round"], found[0], found[1]["notes"]

    def load_server(self) -> tuple[int, Params, dict[str, Any]] | None:
        """(rounds done, leaves, notes) of the newest committed round, None before the first.

        A newest state that is damaged is passed over with a warning: the round before it is taken up instead and trained
        again, with the same result. Raises StateError if that one is damaged too.
        """
        found = self._newest()
        return None if found is None else (found[1]["round"], found[0], found[1]["notes"])

    def _newest(self, whole: bool = False) -> tuple[Params, dict[str, Any]] | None:
        """The newest state that is whole. whole: with its lines of metrics.jsonl and its round's client leaves."""
        damage: StateError | None = None
        for path in states_in(self.root)[:KEPT_SERVERS]:
            try:
                if not whole and path in self._passed:
                    continue
                params, header = opened(path)
                if whole:
                    tally = sealed.check_metrics(self.root / "metrics.jsonl", header)
                    for id, round in header["leaves"].items():
                        if round == header["round"] - 1:
                            self.load_round(id, round)
                    self._tally = tally
            except StateError as e:
                damage = damage or e
                self._passed.add(path)
                continue
            if damage is not None:
                warnings.warn(f"{damage} Going on from round {header['round']}, the one before.", stacklevel=3)
            return params, header
        if damage is not None:
            raise damage
        return None

    def _known_owners(self) -> dict[str, int] | None:
        """Client id -> round of the leaves that belong to the newest committed round; None before the first."""
        found = self._newest()
        return None if found is None else found[1]["leaves"]

    def rewind(self) -> None:
        """Go back to the newest committed round that is whole: its state, the lines of metrics.jsonl and its client leaves.

        Lines of rounds that were dropped go. Raises StateError where the two newest states are damaged, or what belongs to them.
        """
        self._passed.clear()
        self.pending.clear()
        path = self.root / "metrics.jsonl"
        found = self._newest(whole=True)
        if found is None:
            self._nothing_is_lost()
            self._tally = sealed.Tally()
        self._owned = found[1]["leaves"] if found else {}
        self._rehold(found[1] if found else {})
        self.facts = (found[1]["facts"] if found else {}) | self.facts
        if self._owned and not (self.root / "clients").is_dir():
            raise StateError(
                f"{self.root / 'clients'}: is gone, with the personal leaves of {len(self._owned)} clients; restore it, or run the "
                "recipe in another folder"
            )
        length = found[1]["metrics_bytes"] if found else 0
        if path.exists() and path.stat().st_size > length:
            with self.writing(path), open(path, "r+b") as f:
                f.truncate(length)
        self._mend_timings()

    def _rehold(self, newest: Mapping[str, Any]) -> None:
        """Take up the best round's state again; written anew where it was not written before the process died."""
        self.held = {}
        if newest.get("held"):
            self._hold(self.root / "server" / name_of(newest["round"]), newest["leaves"])
        elif newest.get("best") is not None and (self.root / BEST).exists():
            with contextlib.suppress(StateError):  # said when somebody asks for it
                self.held = dict(opened(self.root / BEST)[1]["leaves"])

    def _nothing_is_lost(self) -> None:
        """Raise StateError where a run without any server state has traces of committed rounds."""
        traces = [n for n in ("clients", "timings.jsonl", "summary.json") if (self.root / n).exists()]
        if traces:
            raise StateError(
                f"{self.root / 'server'}: holds no state, but {' and '.join(traces)} show that rounds were committed; restore it, "
                "or run the recipe in another folder"
            )

    def block(self) -> int | None:
        """The block size the run is trained with, None before its start."""
        with contextlib.suppress(StateError):
            facts = sealed.read(self.root / "environment.json")
            if facts and "block" in facts:
                return int(facts["block"])
        return self.facts.get("block")

    def load_client(self, id: str, before: int) -> Params | None:
        """The leaves of the client's last round before `before`, None if there is none. Raises StateError if damaged.

        Which round that is the newest server state says. Where there is no server state (at a site) the files say it.
        """
        round = self.pending.get(id, before)
        if round >= before:
            if self._owned is None:
                self._owned = self._known_owners()
            if self._owned is not None:
                if id not in self._owned:
                    return None
                round = self._owned[id]
        if round >= before:
            earlier = [n for n in rounds_in(self.client_folder(id)) if n < before]
            if not earlier:
                return None
            round = earlier[-1]
        return self.load_round(id, round)

    # records ----------------------------------------------------------------------------------------------------
    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> int:
        """Append lines to metrics.jsonl; returns its length in bytes, for save_server."""
        path = self.root / "metrics.jsonl"
        data = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        tally, self._tally = self._tally, None  # what is on the disk is not known while it is written
        with self.writing(path):
            length = durable.append(path, data)
        if tally is not None:
            tally.add(data)
            self._tally = tally
        return length

    def append_timing(self, facts: Mapping[str, Any]) -> None:
        """Append a line to timings.jsonl, which differs from machine to machine and is no part of the result."""
        path = self.root / "timings.jsonl"
        with self.writing(path):
            durable.append(path, sealed.line(facts), sync=False)

    def _mend_timings(self) -> None:
        """Drop damaged lines of timings.jsonl: a round's seconds cannot be measured again, and nothing follows from them."""
        path = self.root / "timings.jsonl"
        good, bad = sealed.lines(path)
        if bad:
            shown = ", ".join(map(str, bad[:5]))
            warnings.warn(
                f"{path}: cut off or changed in line {shown}: {len(bad)} dropped, {len(good)} left; the seconds of those rounds are "
                "missing from sums.",
                stacklevel=3,
            )
            self.write(path, b"".join(map(sealed.line, good)))
