"""The personal leaves of each client, in a folder of its own, readable by the owner of the run alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from ..errors import StateError
from ..files import durable
from ..tree import Params
from .states import Folder, name_of, opened, rounds_in, seal

OLDER = 2  # states of a client before the one at hand: those that the two server states name
SERVED = "served.deltas"


class Personal(Folder):
    """The part of a run folder, or of a site's, that holds them. keep: "last" what resuming needs, "all" every round's."""

    def __init__(self, root: str | Path, keep: Literal["last", "all"] = "last"):
        super().__init__(root)
        self.keep = keep
        self.pending: dict[str, int] = {}  # client id -> round, of leaves that no server state names yet
        self.held: dict[str, int] = {}  # client id -> round, of the leaves that belong to the best round so far
        self._unsynced: list[Path] = []

    def client_folder(self, id: str) -> Path:
        """Folder of one client: sharded, and safe for any id on any file system."""
        digest = hashlib.blake2b(id.encode(), digest_size=4).hexdigest()
        return self.root / "clients" / digest[:2] / f"{quote(id, safe='')[:80]}-{digest}"

    def save_client(self, id: str, round: int, params: Params) -> None:
        """Personal leaves of a client after training `round` (0-based). A client that keeps nothing gets no file."""
        if not params:
            return
        folder = self.client_folder(id)
        path = folder / name_of(round)
        with self.writing(path):
            self.root.mkdir(mode=durable.FOLDER, parents=True, exist_ok=True)
            durable.make(folder, self.root)
        self.write(path, seal(params, {"client": id, "round": round}), sync=False)
        self._unsynced.append(path)
        self.pending[id] = round
        if self.keep == "last":  # this round may yet be dropped, and the newest server state may be found damaged
            for old in [n for n in rounds_in(folder) if n < round][:-OLDER]:
                if old == self.held.get(id):
                    continue
                with self.writing(folder / name_of(old)):
                    (folder / name_of(old)).unlink(missing_ok=True)

    def has_round(self, id: str, round: int) -> bool:
        """Whether there are leaves of this very round."""
        return round in rounds_in(self.client_folder(id))

    def load_round(self, id: str, round: int) -> Params:
        """The client's leaves after this very round (0-based). Raises StateError if they are damaged or gone."""
        path = self.client_folder(id) / name_of(round)
        if not path.exists():
            raise StateError(
                f"{path}: the personal leaves of client {id!r} after round {round + 1} are gone; restore this file, or run the "
                "recipe in another folder"
            )
        params, header = opened(path)
        if header.get("client") != id:
            raise StateError(f"{path}: holds the state of client {header.get('client')!r}, not of {id!r}; restore it")
        if header.get("round") != round:
            raise StateError(
                f"{path}: holds the state after round {header.get('round', -1) + 1}, not {round + 1}; restore it"
            )
        return params

    def save_served(self, id: str, params: Params) -> None:
        """At a site: the model-ready deltas that a client serves when a run is done."""
        with self.writing(self.root):
            self.root.mkdir(mode=durable.FOLDER, parents=True, exist_ok=True)
            durable.make(self.client_folder(id), self.root)
        # VeRA's layers share tensors, and a file holds each under one name.
        apart = {k: v.clone() for k, v in params.items()}
        self.write(self.client_folder(id) / SERVED, seal(apart, {"client": id}))

    def load_served(self, id: str) -> Params | None:
        """What save_served wrote, None if it did not."""
        path = self.client_folder(id) / SERVED
        return opened(path)[0] if path.exists() else None

    def forget(self, id: str, accepted: int | None, round: int) -> None:
        """At a site that has trained `round`: remove what it no longer needs of a client.

        Kept are its last accepted round and the newest one before, which a server with a damaged state goes back to. What was
        trained between the accepted round and this one was never accepted.
        """
        folder, last = self.client_folder(id), -1 if accepted is None else accepted
        have = rounds_in(folder)
        for old in [n for n in have if n < last][:-1] + [n for n in have if last < n < round]:
            with self.writing(folder / name_of(old)):
                (folder / name_of(old)).unlink(missing_ok=True)

    def sync(self) -> None:
        """Have client states on the disk itself, not only in the system's memory."""
        with self.writing(self.root):
            durable.sync_all(self.root, self._unsynced)
        self._unsynced.clear()
