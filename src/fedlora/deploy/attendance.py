"""Which sites are here, and what clients they hold. A site that did not join is asked again, whatever the reason was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from ..errors import UploadError, printable
from . import claims, schema
from .notes import Note
from .packets import Kind, Packet, reply_of

PATIENCE, LATER = 60.0, 10.0  # seconds for a site's first answer, which loads model and data, and for later ones
LONGEST_PAUSE = 300.0  # seconds between two questions to a site that does not join


class Link(Protocol):
    """How packets reach sites."""

    def nodes(self) -> Mapping[int, str | None]:
        """Nodes that are online, and the name each has proved by its key; None where nobody proves anything."""

    def exchange(self, packets: Mapping[int, Packet], deadline: float) -> Iterator[tuple[int, Packet | str]]:
        """Send, and yield each reply (or the reason why there is none) as it arrives, for `deadline` seconds at most."""


@dataclass
class Failed:
    """A site that has not joined: why, how often it was asked, and when it is asked again (time.monotonic)."""

    why: str
    times: int
    again: float


class Attendance:
    """sites: node -> client id -> rows of each split, and class counts where they were asked for and granted.

    pause: seconds before a site that did not join is asked again; it doubles with each time. classes: how many the recipe
    has. header: that of a join order, of which run and recipe are read. say: what a person at the server should know at once.
    base: gives the fingerprint that the base of every site must have, and is asked once; None where any base will do.
    """

    def __init__(
        self, link: Link, header: Mapping[str, Any], deadline: float, pause: float, classes: int,
        say: Callable[[str], None] = lambda text: None, base: Callable[[], str] | None = None,
    ):  # fmt: skip
        self.link, self.header, self.deadline, self.pause, self.classes = link, header, deadline, pause, classes
        self.say = say
        self.base = base and cache(base)
        self.sites: dict[int, dict[str, dict[str, Any]]] = {}
        self.failed: dict[int, Failed] = {}
        self._names: dict[int, str] = {}

    def name(self, node: int) -> str:
        """What a person calls a site: the name that its key proves, or else its first client's."""
        if node in self._names:
            return self._names[node]
        held = self.sites.get(node)
        return next(iter(held)).partition("/")[0] if held else f"of node {node}, which has no name yet"

    def missing(self) -> list[str]:
        """Sites whose keys are known and who have not joined, with the reason where there is one."""
        here = {self.name(n) for n in self.sites}
        known: list[str] = sorted(getattr(self.link, "known", ()))
        failed = {self.name(n): f.why for n, f in self.failed.items()}
        away = dict.fromkeys([s for s in known if s not in here] + list(failed))
        return [f"{s} ({failed.get(s, 'not connected')})" for s in away]

    def refresh(self) -> tuple[Mapping[int, str | None], bool]:
        """The nodes that are online, and whether a site has joined since the last time."""
        nodes = self.link.nodes()
        self._names |= {n: printable(name, 64) for n, name in nodes.items() if name is not None}
        now = time.monotonic()
        for node in [n for n in self.failed if n not in nodes]:
            del self.failed[node]  # one that comes back is asked at once
        new = [n for n in nodes if n not in self.sites and (n not in self.failed or self.failed[n].again <= now)]
        if not new:
            return nodes, False
        patience = PATIENCE if any(n not in self.failed for n in new) else LATER
        silent, joined = set(new), False
        for node, reply in self.link.exchange(
            dict.fromkeys(new, Packet("join", self.header)), min(patience, self.deadline)
        ):
            silent.discard(node)
            try:
                self.sites[node] = self._welcome(nodes[node], reply)
            except Exception as e:
                self._put_off(node, schema.reason(e))
                continue
            self.failed.pop(node, None)
            joined = True
            name, held = self.name(node), len(self.sites[node])
            self.say(Note(f"site {name} joins with {held} client(s)", "join", site=name, clients=held))
        for node in silent:
            self._put_off(node, "no answer yet")
        return nodes, joined

    def _put_off(self, node: int, why: str) -> None:
        """Note why a site has not joined, and when to ask it again; the same reason is said once."""
        before = self.failed.get(node)
        times = 1 + (before.times if before else 0)
        pause = min(self.pause * 2 ** min(times - 1, 16), LONGEST_PAUSE)
        self.failed[node] = Failed(why, times, time.monotonic() + pause)
        if before is None or before.why != why:
            name = self.name(node)
            self.say(Note(f"site {name} cannot join: {why}; it is asked again", "no join", site=name, why=why))

    def _welcome(self, name: str | None, reply: Packet | str) -> dict[str, dict[str, Any]]:
        """A site's clients with their rows. Raises UploadError for another base, for names that are not its own, and for
        nonsense."""
        kind: Kind = "join"
        said = reply_of(reply, schema.Joined, kind, self.header["run"], self.header["round"])
        if self.base is not None and said.base != self.base():
            raise UploadError(
                f"its base has the weights {said.base}, the server's {self.base()}; load the same model on both sides, or "
                "set deployment.same_base to false"
            )
        others = {c for held in self.sites.values() for c in held}
        out: dict[str, dict[str, Any]] = {}
        for id, facts in said.clients.items():
            if name is not None and id != name and not id.startswith(f"{name}/"):
                raise UploadError(
                    f"client {id!r} is not of site {name!r}, whose key it uses; start it with --id {name}"
                )
            if id in others:
                raise UploadError(f"client {id!r} is already here from another site; give each site its own --id")
            out[id] = {str(s): n for s, n in facts.sizes().items()}
            if self.header.get("histograms") and self.classes and facts.histogram is not None:
                claims.histogram(facts.histogram, facts.sizes(), self.classes)
                out[id]["histogram"] = facts.histogram
        return out
