"""The server's side of a deployment: rounds and evaluation over sites, as a `Runtime` of an ordinary `Federation`.

What a client sends is checked against what was declared before it touches the server's state. Uploads are summed in the
order of a simulation, whatever the order of their arrival, so the two agree in every bit.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoints.pretrained import fingerprint
from ..data.federated import roster
from ..errors import TrainingError, UploadError
from ..federation import wire
from ..federation.callbacks import Callback
from ..federation.channel import Declared, Sent
from ..federation.engine import RoundLog, enough, in_order
from ..federation.records import EvalLine, Line
from ..federation.run import Federation
from ..federation.views import scored
from ..methods.contract import Client, RoundInfo, ServerState, Upload
from ..tree import Params
from . import claims, schema
from .attendance import Attendance, Link
from .notes import Note
from .packets import EVERYBODY, PROTOCOL, Kind, Packet, reply_of

SPLITS = ("train", "validation", "test")
LINES = 12  # most entries of a list that is printed for a person
FORMS = 8  # leaves of a message for each leaf that is declared, at most: guards and int8 send more than one


@dataclass(frozen=True)
class Terms:
    """Whom a round waits for (a recipe's section deployment). clients: how many the first round waits for. Seconds."""

    clients: int = 1
    deadline: float = 3600.0
    over_selection: float = 1.0
    attempts: int = 3
    poll: float = 0.5
    pause: float = 5.0  # before a site that did not join is asked again


class Remote:
    """Clients at their sites. say: what a person at the server should know at once."""

    block = 1  # the server trains nobody; each site chooses the size of its own blocks

    def __init__(
        self, fed: Federation, watch: Callback, link: Link, terms: Terms, recipe: Mapping[str, Any],
        say: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.fed, self.watch, self.link, self.terms, self.recipe, self.say = fed, watch, link, terms, recipe, say
        self.needed = 0  # uploads that end a round early, where more clients than that were asked
        self.metric: tuple[str, float] | None = None
        # Under another id the sites would start their personal leaves anew, so the server's state holds it too.
        known = fed.store.facts.get("run") or fed.store.read_json("deployment.json").get("run")
        self.run: str = known or f"{fed.recipe_hash}-{secrets.token_hex(4)}"
        fed.store.facts["run"] = self.run
        if known is None:
            fed.store.write_json("deployment.json", {"run": self.run})
        fed.store.renew_json("deployment.json", {"run": self.run})
        asked = recipe.get("deployment", {})
        header = self._header(0) | {"histograms": bool(asked.get("histograms"))}
        base = self._base if asked.get("same_base", True) else None
        self.here = Attendance(link, header, terms.deadline, terms.pause, len(self._classes), say, base)
        self.wait(self.terms.clients)

    # who is there -------------------------------------------------------------------------------------------------
    def wait(self, least: int) -> list[str]:
        """Ids of the clients that are online, as soon as there are `least`."""
        told: tuple[int, list[str]] | None = None
        while True:
            online = self.online()
            if len(online) >= least:
                return online
            missing = self.here.missing()
            if (len(online), missing) != told:
                told = len(online), missing
                more = f"; missing: {', '.join(missing[:LINES])}" if missing else ""
                facts = {"have": len(online), "need": least, "missing": missing}
                self.say(Note(f"waiting for clients: {len(online)} of {least} are here{more}", "waiting", **facts))
                self.status("waiting", have=len(online), need=least)
            time.sleep(self.terms.poll)

    def online(self) -> list[str]:
        """Ids of the clients whose site is online, sorted; sites not seen before are asked what they hold."""
        nodes, joined = self.here.refresh()
        if joined:
            self._enrol()
        return sorted(c for n, facts in self.sites.items() if n in nodes for c in facts)

    @property
    def sites(self) -> dict[int, dict[str, dict[str, Any]]]:
        return self.here.sites

    def _base(self) -> str:
        """The fingerprint of the server's own base."""
        return fingerprint(self.fed.model.base, [s.name for s in self.fed.model.groups.get("head", ())])

    @property
    def _classes(self) -> list[str]:
        return list(self.recipe["data"].get("classes") or ())

    def _enrol(self) -> None:
        """Let the federation know its clients."""
        known = {c: sizes for held in self.sites.values() for c, sizes in held.items()}
        ids = sorted(known)
        sizes = {s: [known[c][s] for c in ids] for s in SPLITS}
        sizes = {s: n for s, n in sizes.items() if s == "train" or any(n)}
        self.fed.enrol(roster(ids, sizes))
        shown: dict[str, Any] = {"ids": ids, "label_names": [], "unseen": 0, "sizes": sizes}
        names = self._classes
        if names and all("histogram" in known[c] for c in ids):
            shown |= {
                "label_names": names,
                "histogram": {s: [known[c]["histogram"].get(s, [0] * len(names)) for c in ids] for s in sizes},
            }
        self.described = shown | {"truncated": 0, "recipe": {}}
        for text in claims.odd({c: float(known[c]["train"]) for c in ids}, "rows"):
            self.say(f"odd: {text}")

    # a round ------------------------------------------------------------------------------------------------------
    def cohort(self, round: int) -> Sequence[Client]:
        """Clients asked in a round: a sample of those online, more than needed where the terms say so."""
        online = self.wait(max(self.fed.sampling.min_clients, 1))
        self.needed = self.fed.sampling.size(len(online), most=True)
        chosen = self.fed.sampling.members(len(online), self.fed.seed, round, self.terms.over_selection)
        return [self.fed.client(self.fed.index[online[i]]) for i in chosen]

    def round(
        self, server: ServerState, rounds: int, cohort: Sequence[Client], see: Callable[[Upload], None]
    ) -> tuple[ServerState, RoundLog]:
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
        self, server: ServerState, rounds: int, cohort: Sequence[Client], see: Callable[[Upload], None]
    ) -> tuple[ServerState, RoundLog]:
        fed, info = self.fed, RoundInfo(server.round, rounds)
        log = RoundLog(cohort=[c.id for c in cohort])
        sent, packets = self._orders("train", server, info, cohort, log)
        declared = Declared(fed.method, fed.context, info)
        arrived: dict[str, Upload] = {}
        state = {c.id: "training" for c in cohort}
        where = {c: n for n, held in self.sites.items() for c in held}
        clients = {c.id: c for c in cohort}
        self.status("training", server, clients=state)
        for node, reply in self.link.exchange(packets, self.terms.deadline):
            mine = [c for c in clients if where[c] == node]
            try:
                said = reply_of(reply, schema.Trained, "train", self.run, info.round)
                assert isinstance(reply, Packet)
            except Exception as e:  # an error in one site's reply must not end the round
                why = schema.reason(e)
                log.refused |= dict.fromkeys(mine, why)
                state |= dict.fromkeys(mine, "failed")
                name = self.here.name(node)
                self.say(Note(f"site {name}: {why}", "failed", site=name, why=why, round=info.round + 1))
                continue
            for c in mine:
                try:
                    params, message = self._upload(reply, clients[c], sent[c].params, declared)
                    done = schema.parsed(schema.Done, said.clients.get(c), "reply, its clients")
                except Exception as e:
                    log.refused[c], state[c] = schema.reason(e), "refused"
                    facts = {"client": c, "why": log.refused[c], "round": info.round + 1}
                    self.say(Note(f"upload of {c} refused: {log.refused[c]}", "refused", **facts))
                    continue
                log.up += message
                log.losses[c], state[c] = done.metrics.loss, "done"
                log.tokens += done.tokens
                arrived[c] = Upload(clients[c], params, {"loss": done.metrics.loss})
            self.watch.clients_done(len(mine))
            self.status("training", server, clients=state)
            if len(arrived) >= self.needed and self.terms.over_selection > 1:
                break
        late = [c for c in clients if state[c] == "training"]
        log.refused |= dict.fromkeys(late, "late: no reply in time")
        if late:
            text = f"round {info.round + 1}: late: {', '.join(late[:5])}"
            self.say(Note(text, "late", round=info.round + 1, clients=late))
        # Whom dp counts may not depend on what others have sent; it clips everybody instead.
        distant = claims.distant(list(arrived.values()), server.params) if arrived and not fed.private else {}
        for c, why in distant.items():
            self._drop(c, why, arrived, log)
        enough(info.round, len(arrived), len(cohort), fed.sampling.min_clients, log.refused)
        self.status("aggregating", server, clients=state | dict.fromkeys(late, "late"))
        chosen = in_order([clients[c] for c in clients if c in arrived])
        most = None if fed.private else claims.bound(fed.sampling.norm_bound, server, list(arrived.values()))
        new, used, left = claims.aggregated(
            lambda uploads: fed.channel.aggregate(fed.method, fed.context, server, iter(uploads)),
            [arrived[c.id] for c in chosen], fed.sampling.min_clients, most,
        )  # fmt: skip
        for c, why in left.items():
            self._drop(c, why, arrived, log)
        for u in used:
            see(u)
        # In this order their mean has the bits of a simulation's.
        log.losses = {u.client.id: log.losses[u.client.id] for u in used}
        log.examples = sum(u.client.examples for u in used)
        for text in claims.odd_uploads(fed.method, used):
            self.say(f"odd: {text}")
        accepted = server.notes.get("accepted", {}) | dict.fromkeys(arrived, info.round)
        return replace(new, notes=new.notes | {"accepted": accepted}), log

    def _drop(self, client: str, why: str, arrived: dict[str, Upload], log: RoundLog) -> None:
        del arrived[client]
        log.refused[client] = why
        self.say(Note(f"upload of {client} refused: {why}", "refused", client=client, why=why))

    def _orders(
        self, kind: Kind, server: ServerState, info: RoundInfo, cohort: Sequence[Client], log: RoundLog
    ) -> tuple[dict[str, Sent], dict[int, Packet]]:
        """What each client receives, and the packet of each node."""
        method, context = self.fed.method, self.fed.context
        each: dict[str, Sent] = {}
        packets: dict[int, Packet] = {}
        shared: tuple[Sent, bytes] | None = None
        for node, held in sorted(self.sites.items()):
            mine = [c for c in cohort if c.id in held]
            parts: dict[str, bytes] = {}
            for c in mine:
                if shared is None or method.per_client:
                    sent = self.fed.channel.down(method.broadcast(context, server, c), info)
                    shared = sent, sent.encode()
                sent, text = shared
                each[c.id] = sent
                name = c.id if method.per_client else EVERYBODY
                if name not in parts:
                    log.down += sent.traffic
                parts[name] = text
            if mine:
                accepted = server.notes.get("accepted", {})
                head = self._header(info.round) | {
                    "rounds": info.rounds,
                    "clients": {c.id: accepted.get(c.id) for c in mine},
                }
                packets[node] = Packet(kind, head, parts)
        return each, packets

    def _header(self, round: int) -> dict[str, Any]:
        return {"run": self.run, "protocol": PROTOCOL, "round": round, "recipe": self.recipe}

    def _upload(self, reply: Packet, client: Client, down: Params, declared: Declared) -> tuple[Params, wire.Traffic]:
        """The leaves of a client that received `down`, and their bytes. Raises UploadError for other than declared ones."""
        if client.id not in reply.parts:
            raise UploadError("the reply has no leaves of this client")
        text, spec = reply.parts[client.id], declared(down, client)
        message, header = wire.decode(text, most=FORMS * len(spec))
        schema.same(header, round=reply.header["round"])
        return self.fed.channel.read(message, down, spec), wire.measure(message, text)

    # evaluation ---------------------------------------------------------------------------------------------------
    def evaluate(self, server: ServerState) -> list[Line]:
        """Scores that sites measure on their own rows; a site that is not online is missing from the lines."""
        online = self.wait(1)
        self.fed.store.write_json("partition.json", self.described)
        cohort = [self.fed.client(self.fed.index[c]) for c in online]
        info = RoundInfo(server.round, self.fed.sampling.rounds)
        self.status("evaluating", server, clients=dict.fromkeys(online, "evaluating"))
        _, packets = self._orders("evaluate", server, info, cohort, RoundLog())
        found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        for node, reply in self.link.exchange(packets, self.terms.deadline):
            try:
                said = reply_of(reply, schema.Evaluated, "evaluate", self.run, info.round)
            except Exception as e:  # an error in one site's reply must not end the evaluation
                self.say(f"evaluation at site {self.here.name(node)}: {schema.reason(e)}")
                continue
            for one in said.lines:
                for c, given in one.clients.items():
                    rows = self.sites[node].get(c)
                    if rows is None:
                        continue  # a site speaks for its own clients
                    try:
                        taken = claims.scores(given, rows[one.split], self.fed.task.metric)
                    except Exception as e:
                        self.say(f"scores of {c} refused ({one.view}, {one.split}): {schema.reason(e)}")
                        continue
                    found.setdefault((one.view, one.split), {})[c] = taken
        lines: list[EvalLine] = []
        for view in self.fed.evaluation.views:
            for split in ("validation", "test"):
                all_scores = found.get((view, split), {})
                scores, left = claims.alike({c: all_scores[c] for c in self.fed.data.ids if c in all_scores})
                for c, why in left.items():
                    self.say(f"scores of {c} left out ({view}, {split}): {why}")
                if scores:
                    missing = len(self._expected(server, split) - scores.keys())
                    lines.append(scored(self.fed, server.round, view, split, scores, missing))
        name = self.fed.task.metric
        for line in lines[:1]:
            self.metric = (f"{line.view} {line.split} {name}", line.mean.get(name, math.nan))
        self.status("done" if server.round == info.rounds else "evaluated", server)
        return [*lines]

    def _expected(self, server: ServerState, split: str) -> set[str]:
        """Clients that a whole evaluation has: those with rows in the split, and those that trained and are not here now."""
        here = {c: rows for held in self.sites.values() for c, rows in held.items()}
        return {c for c, rows in here.items() if rows[split]} | (server.notes.get("accepted", {}).keys() - here.keys())

    # status -------------------------------------------------------------------------------------------------------
    def status(
        self, state: str, server: ServerState | None = None, clients: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        """Write status.json, which `fedlora status` shows."""
        sites: dict[str, list[str]] = {}
        for n, held in self.sites.items():  # without keys two sites may have one name
            sites.setdefault(self.here.name(n), []).extend(sorted(held))
        facts = {
            "state": state,
            "run": self.run,
            "round": None if server is None else server.round + (state in ("training", "aggregating")),
            "rounds": self.fed.sampling.rounds,
            "clients": dict(clients or {}),
            "sites": sites,
            "failed": {self.here.name(n): f.why for n, f in self.here.failed.items()},
            "metric": self.metric,
            "updated": time.time(),
        }
        self.fed.store.write_json("status.json", facts | more)
