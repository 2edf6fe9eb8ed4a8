"""The server's side of a deployment: rounds and evaluation over sites, as a `Runtime` of an ordinary `Federation`.

What a client sends is checked against what was declared before it touches the server's state. Uploads are summed in the
order of a simulation, whatever the order of their arrival, so the two agree in every bit.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .. import wire
from ..channel import Declared, Sent
from ..data.federated import roster
from ..engine import RoundLog, enough, in_order
from ..errors import TrainingError, UploadError, printable
from ..federation import Federation
from ..method import Client, Order, Server, Upload
from ..pretrained import fingerprint
from ..records import EvalLine, Line
from ..tree import Params
from ..views import scored
from ..watch import Watch
from .packets import EVERYBODY, PROTOCOL, Kind, Packet, same
from .refusal import heard

SPLITS = ("train", "validation", "test")
MOST_CLIENTS = 10_000  # of one site
LONGEST_ID = 200  # characters of a client's id


class Link(Protocol):
    """How packets reach sites."""

    def nodes(self) -> Mapping[int, str | None]:
        """Nodes that are online, and the name each has proved by its key; None where nobody proves anything."""

    def exchange(self, packets: Mapping[int, Packet], deadline: float) -> Iterator[tuple[int, Packet | str]]:
        """Send, and yield each reply (or the reason why there is none) as it arrives, for `deadline` seconds at most."""


@dataclass(frozen=True)
class Terms:
    """Whom a round waits for (a recipe's section deployment). clients: how many the first round waits for. Seconds."""

    clients: int = 1
    deadline: float = 3600.0
    over_selection: float = 1.0
    attempts: int = 3
    poll: float = 0.5


class Remote:
    """Clients at their sites. say: what a person at the server should know at once."""

    block = 1  # of the server; sites have their own

    def __init__(
        self, fed: Federation, watch: Watch, link: Link, terms: Terms, recipe: Mapping[str, Any],
        say: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.fed, self.watch, self.link, self.terms, self.recipe, self.say = fed, watch, link, terms, recipe, say
        self.sites: dict[int, dict[str, dict[str, Any]]] = {}  # node -> client id -> rows of each split
        self.failed: dict[int, str] = {}
        self.needed = 0  # uploads that end a round early, where more clients than that were asked
        self.metric: tuple[str, float] | None = None
        self._base: str | None = None  # fingerprint of the server's own, once somebody joins
        # Under another id the sites would start their personal leaves anew, so the server's state holds it too.
        known = fed.store.facts.get("run") or fed.store.read_json("deployment.json").get("run")
        self.run: str = known or f"{fed.recipe_hash}-{secrets.token_hex(4)}"
        fed.store.facts["run"] = self.run
        if known is None:
            fed.store.write_json("deployment.json", {"run": self.run})
        fed.store.renew_json("deployment.json", {"run": self.run})
        self.wait(self.terms.clients)

    # who is there -------------------------------------------------------------------------------------------------
    def wait(self, least: int) -> list[str]:
        """Ids of the clients that are online, as soon as there are `least`."""
        told = -1
        while True:
            online = self.online()
            if len(online) >= least:
                return online
            if len(online) != told:
                told = len(online)
                self.say(f"waiting for clients: {told} of {least} are here")
                self.status("waiting", have=told, need=least)
            time.sleep(self.terms.poll)

    def online(self) -> list[str]:
        """Ids of the clients whose site is online, sorted; sites not seen before are asked what they hold."""
        nodes = self.link.nodes()
        for node in [n for n in self.failed if n not in nodes]:
            del self.failed[node]  # one that comes back is asked again
        new = [n for n in nodes if n not in self.sites and n not in self.failed]
        if new:
            packet = Packet("join", self._header(0) | {"histograms": self._asks})
            for node, reply in self.link.exchange(dict.fromkeys(new, packet), self.terms.deadline):
                try:
                    header = self._checked(reply, "join", 0)
                    self._same_base(header)
                    facts = self._welcome(nodes[node], header)
                except UploadError as e:
                    self.failed[node] = str(e)
                    self.say(f"site {nodes[node] or node} cannot join: {e}")
                    continue
                self.sites[node] = facts
                self.say(f"site {nodes[node] or node} joins with {len(facts)} client(s)")
            self._enrol()
        return sorted(c for n, facts in self.sites.items() if n in nodes for c in facts)

    @property
    def _asks(self) -> bool:
        return bool(self.recipe.get("deployment", {}).get("histograms"))

    def _same_base(self, header: Mapping[str, Any]) -> None:
        """Raise UploadError for a site whose base has other weights, unless the recipe allows it."""
        if not self.recipe.get("deployment", {}).get("same_base", True):
            return
        if self._base is None:
            self._base = fingerprint(self.fed.model.base, [s.name for s in self.fed.model.groups.get("head", ())])
        if header.get("base") != self._base:
            theirs = printable(header.get("base"), 64)
            raise UploadError(
                f"its base has the weights {theirs}, the server's {self._base}; load the same model on both sides, or "
                "set deployment.same_base to false"
            )

    def _welcome(self, name: str | None, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """A site's clients with their rows. Raises UploadError for names that are not its own, and for nonsense."""
        facts = header.get("clients")
        if not isinstance(facts, Mapping) or not 1 <= len(facts) <= MOST_CLIENTS:
            raise UploadError(f"it names no clients, expected 1 to {MOST_CLIENTS}")
        others = {c for held in self.sites.values() for c in held}
        out: dict[str, dict[str, Any]] = {}
        for id, rows in facts.items():
            if not id.isprintable() or len(id) > LONGEST_ID:
                raise UploadError(
                    f"client {printable(id, 80)} is no id, expected up to {LONGEST_ID} printable characters"
                )
            if name is not None and id != name and not id.startswith(f"{name}/"):
                raise UploadError(
                    f"client {id!r} is not of site {name!r}, whose key it uses; start it with --id {name}"
                )
            if id in others:
                raise UploadError(f"client {id!r} is already here from another site; give each site its own --id")
            sizes = {s: rows.get(s, 0) for s in SPLITS}
            if not all(isinstance(n, int) and n >= 0 for n in sizes.values()) or not sizes["train"]:
                raise UploadError(f"client {id!r} has {sizes} rows, expected some to train on")
            out[id] = sizes | ({"histogram": rows["histogram"]} if self._asks and "histogram" in rows else {})
        return out

    def _enrol(self) -> None:
        """Let the federation know its clients."""
        known = {c: sizes for held in self.sites.values() for c, sizes in held.items()}
        ids = sorted(known)
        sizes = {s: [known[c][s] for c in ids] for s in SPLITS}
        sizes = {s: n for s, n in sizes.items() if s == "train" or any(n)}
        self.fed.enrol(roster(ids, sizes))
        shown: dict[str, Any] = {"ids": ids, "label_names": [], "unseen": 0, "sizes": sizes}
        names = list(self.recipe["data"].get("classes") or ())
        if names and all("histogram" in known[c] for c in ids):
            shown |= {
                "label_names": names,
                "histogram": {s: [known[c]["histogram"].get(s, [0] * len(names)) for c in ids] for s in sizes},
            }
        self.described = shown | {"truncated": 0, "recipe": {}}

    # a round ------------------------------------------------------------------------------------------------------
    def cohort(self, round: int) -> Sequence[Client]:
        """Clients asked in a round: a sample of those online, more than needed where the terms say so."""
        online = self.wait(max(self.fed.sampling.min_clients, 1))
        self.needed = self.fed.sampling.size(len(online), most=True)
        chosen = self.fed.sampling.members(len(online), self.fed.seed, round, self.terms.over_selection)
        return [self.fed.client(self.fed.index[online[i]]) for i in chosen]

    def round(
        self, server: Server, rounds: int, cohort: Sequence[Client], see: Callable[[Upload], None]
    ) -> tuple[Server, RoundLog]:
        attempt = 1
        while True:
            try:
                return self._round(server, rounds, cohort, see)
            except TrainingError as e:
                if attempt >= self.terms.attempts:
                    raise
                attempt += 1
                self.say(f"{e}; trying it again ({attempt} of {self.terms.attempts})")
                cohort = self.cohort(server.round)

    def _round(
        self, server: Server, rounds: int, cohort: Sequence[Client], see: Callable[[Upload], None]
    ) -> tuple[Server, RoundLog]:
        fed, order = self.fed, Order(server.round, rounds)
        log = RoundLog(cohort=[c.id for c in cohort])
        sent, packets = self._orders("train", server, order, cohort, log)
        declared = Declared(fed.method, fed.scene, order)
        arrived: dict[str, tuple[Params, dict[str, float]]] = {}
        state = {c.id: "training" for c in cohort}
        where = {c: n for n, held in self.sites.items() for c in held}
        clients = {c.id: c for c in cohort}
        self.status("training", server, clients=state)
        for node, reply in self.link.exchange(packets, self.terms.deadline):
            mine = [c for c in clients if where[c] == node]
            try:
                facts = self._checked(reply, "train", order.round)["clients"]
                assert isinstance(reply, Packet)
            except UploadError as e:
                log.refused |= dict.fromkeys(mine, str(e))
                state |= dict.fromkeys(mine, "failed")
                self.say(f"{', '.join(mine[:3])}: {e}")
                continue
            for c in mine:
                try:
                    params, message = self._upload(reply, clients[c], sent[c].params, declared)
                except UploadError as e:
                    log.refused[c], state[c] = printable(e), "refused"
                    self.say(f"upload of {c} refused: {log.refused[c]}")
                    continue
                log.up += message
                metrics = {"loss": _number(facts.get(c, {}).get("metrics", {}).get("loss"))}
                log.losses[c], state[c] = metrics["loss"], "done"
                log.tokens += int(_number(facts.get(c, {}).get("tokens"), 0.0))
                arrived[c] = params, metrics
            self.watch.clients_done(len(mine))
            self.status("training", server, clients=state)
            if len(arrived) >= self.needed and self.terms.over_selection > 1:
                break
        late = [c for c in clients if state[c] == "training"]
        log.refused |= dict.fromkeys(late, "late: no reply in time")
        if late:
            self.say(f"round {order.round + 1}: late: {', '.join(late[:5])}")
        enough(order.round, len(arrived), len(cohort), fed.sampling.min_clients, log.refused)
        chosen = in_order([clients[c] for c in clients if c in arrived])
        log.losses = {c.id: log.losses[c.id] for c in chosen}  # their mean, too, is that of a simulation
        log.examples = sum(c.examples for c in chosen)
        self.status("aggregating", server, clients=state | dict.fromkeys(late, "late"))

        def uploads() -> Iterator[Upload]:
            for c in chosen:
                u = Upload(c, *arrived[c.id])
                see(u)
                yield u

        new = fed.sampling.channel.aggregate(fed.method, fed.scene, server, uploads())
        accepted = server.notes.get("accepted", {}) | dict.fromkeys(arrived, order.round)
        return replace(new, notes=new.notes | {"accepted": accepted}), log

    def _orders(
        self, kind: Kind, server: Server, order: Order, cohort: Sequence[Client], log: RoundLog
    ) -> tuple[dict[str, Sent], dict[int, Packet]]:
        """What each client receives, and the packet of each node."""
        method, scene = self.fed.method, self.fed.scene
        each: dict[str, Sent] = {}
        packets: dict[int, Packet] = {}
        shared: tuple[Sent, bytes] | None = None
        for node, held in sorted(self.sites.items()):
            mine = [c for c in cohort if c.id in held]
            parts: dict[str, bytes] = {}
            for c in mine:
                if shared is None or method.per_client:
                    sent = self.fed.sampling.channel.down(method.broadcast(scene, server, c), order)
                    shared = sent, sent.encode()
                sent, text = shared
                each[c.id] = sent
                name = c.id if method.per_client else EVERYBODY
                if name not in parts:
                    log.down += sent.traffic
                parts[name] = text
            if mine:
                accepted = server.notes.get("accepted", {})
                head = self._header(order.round) | {
                    "rounds": order.rounds,
                    "clients": {c.id: accepted.get(c.id) for c in mine},
                }
                packets[node] = Packet(kind, head, parts)
        return each, packets

    def _header(self, round: int) -> dict[str, Any]:
        return {"run": self.run, "protocol": PROTOCOL, "round": round, "recipe": self.recipe}

    def _checked(self, reply: Packet | str, kind: Kind, round: int) -> Mapping[str, Any]:
        """The header of a reply to this run's order. Raises UploadError for all others, and for a site's own failure."""
        if isinstance(reply, str):
            raise UploadError(printable(reply))
        if "error" in reply.header:
            raise UploadError(heard(reply.header["error"]))
        same({**reply.header, "kind": reply.kind}, kind=kind, run=self.run, round=round, protocol=PROTOCOL)
        if kind == "train" and not isinstance(reply.header.get("clients"), Mapping):
            raise UploadError("reply says nothing of its clients, expected what each has done")
        return reply.header

    def _upload(self, reply: Packet, client: Client, down: Params, declared: Declared) -> tuple[Params, wire.Traffic]:
        """The leaves of a client that received `down`, and their bytes. Raises UploadError for other than declared ones."""
        if client.id not in reply.parts:
            raise UploadError("the reply has no leaves of this client")
        text = reply.parts[client.id]
        message, header = wire.decode(text)
        same(header, round=reply.header["round"])
        leaves = self.fed.sampling.channel.read(message, down, declared(down, client))
        return leaves, wire.measure(message, text)

    # evaluation ---------------------------------------------------------------------------------------------------
    def evaluate(self, server: Server) -> list[Line]:
        """Scores that sites measure on their own rows; a site that is not online is missing from the lines."""
        online = self.wait(1)
        self.fed.store.write_json("partition.json", self.described)
        cohort = [self.fed.client(self.fed.index[c]) for c in online]
        order = Order(server.round, self.fed.sampling.rounds)
        self.status("evaluating", server, clients=dict.fromkeys(online, "evaluating"))
        _, packets = self._orders("evaluate", server, order, cohort, RoundLog())
        found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        for node, reply in self.link.exchange(packets, self.terms.deadline):
            try:
                for line in self._checked(reply, "evaluate", order.round)["lines"]:
                    scores = {
                        c: {m: _number(x) for m, x in s.items()}
                        for c, s in line["clients"].items()
                        if c in self.sites[node]
                    }
                    found.setdefault((line["view"], line["split"]), {}).update(scores)
            except (UploadError, KeyError, TypeError, AttributeError) as e:
                self.say(f"evaluation at {', '.join(list(self.sites[node])[:3])}: {e}")
        lines: list[EvalLine] = []
        for view in self.fed.evaluation.views:
            for split in ("validation", "test"):
                scores = {c: found[view, split][c] for c in self.fed.data.ids if c in found.get((view, split), {})}
                if scores:
                    missing = len(self._expected(server, split) - scores.keys())
                    lines.append(scored(self.fed, server.round, view, split, scores, missing))
        name = self.fed.task.metric
        for line in lines[:1]:
            self.metric = (f"{line.view} {line.split} {name}", line.mean.get(name, math.nan))
        self.status("done" if server.round == order.rounds else "evaluated", server)
        return [*lines]

    def _expected(self, server: Server, split: str) -> set[str]:
        """Clients that a whole evaluation has: those with rows in the split, and those that trained and are not here now."""
        here = {c: rows for held in self.sites.values() for c, rows in held.items()}
        return {c for c, rows in here.items() if rows[split]} | (server.notes.get("accepted", {}).keys() - here.keys())

    # status -------------------------------------------------------------------------------------------------------
    def status(
        self, state: str, server: Server | None = None, clients: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        """Write status.json, which `fedlora status` shows."""
        facts = {
            "state": state,
            "run": self.run,
            "round": None if server is None else server.round + (state in ("training", "aggregating")),
            "rounds": self.fed.sampling.rounds,
            "clients": dict(clients or {}),
            "sites": {str(n): sorted(held) for n, held in self.sites.items()},
            "failed": {str(n): e for n, e in self.failed.items()},
            "metric": self.metric,
            "updated": time.time(),
        }
        self.fed.store.write_json("status.json", facts | more)


def _number(x: Any, otherwise: float = math.nan) -> float:
    """A number that a site has sent, or `otherwise` where it has not."""
    return x if isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e15 else otherwise
