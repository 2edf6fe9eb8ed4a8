"""One site: its clients' data, their personal leaves on its own disk, and what it does when the server asks.

A site is stateless between orders but for those leaves: every order carries the recipe, so a site that was killed goes on
with the next one. Only the declared shared leaves, scores and row counts leave it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoints import pretrained
from ..checkpoints.pretrained import fingerprint
from ..errors import ConfigError, FedloraError, Problem, StateError, UploadError
from ..federation import inputs, wire
from ..federation.callbacks import Callback
from ..federation.engine import Engine
from ..federation.memory import kept
from ..federation.records import EvalLine
from ..federation.run import Federation
from ..federation.views import evaluate, served
from ..files import durable
from ..methods.contract import Client, RoundInfo, ServerState
from ..recipe import Recipe, build
from ..tree import Params
from . import schema
from .audit import digest
from .gate import Ask, Gate
from .packets import EVERYBODY, PROTOCOL, Packet, order_of
from .policy import SHAPE, Policy, Rows
from .refusal import Refusal, told
from .schema import PacketError

SHOWN = ("personal", "global")  # the views that need nobody else's data
COLUMNS = ("text", "label", "template", "prompt", "completion", "messages", *SHAPE)
FOLDER_OF_SERVER = "(a folder of the server) "  # begins the name of a model that only the server can load


@dataclass(frozen=True)
class Holding:
    """What a site holds and grants; none of it comes from the server.

    id: the site. data: a file, or several. columns: fields of the recipe's section data that are other ones here (COLUMNS).
    clients: a column that names the client of each row, or None for one client that is the site. model: a folder to load
    the base from instead of the recipe's name. block: clients trained at once.
    """

    id: str
    data: str | Sequence[str]
    columns: Mapping[str, Any]
    clients: str | None = None
    model: str | None = None
    device: str = "auto"
    block: int | None = None
    threads: int | None = None
    policy: Policy | None = None  # without one the server chooses columns and model

    def recipe(self, given: Mapping[str, Any]) -> Recipe:
        """The server's recipe over this site's data. Raises ConfigError."""
        raw = {k: dict(v) if isinstance(v, Mapping) else v for k, v in given.items()}
        unknown = [
            Problem(f"data.{k}", v, f"one of {', '.join(COLUMNS)}") for k, v in self.columns.items() if k not in COLUMNS
        ]
        foreign = str(raw["model"]["name"]).startswith(FOLDER_OF_SERVER)
        if foreign and self.model is None and self.policy is None:  # a policy says itself which models it knows
            name = raw["model"]["name"].removeprefix(FOLDER_OF_SERVER)
            unknown.append(
                Problem("--model", None, f"this site's copy of the server's folder {name}", "copy it here and name it")
            )
        if unknown:
            raise ConfigError(unknown)
        elsewhere = {
            "client": self.clients,
            "site": self.id,
            "test": None,
            "validation": None,
            "split": None,
            "subset": None,
            "limit": None,
        }
        own = {"source": self.data, **elsewhere}
        # A server that is trusted may know the encoding; how else the site's rows are written, it cannot.
        usual = {k: Rows.model_fields[k].default for k in SHAPE if k != "encoding"}
        raw["data"] = (
            {**raw["data"], **usual, **self.columns} if self.policy is None else self.policy.overlay(raw["data"])
        ) | own
        shares = {k: raw["partition"].get(k) for k in ("validation", "test", "group")}
        raw["partition"] = {"kind": "column" if self.clients else "iid", "clients": 1, "column": self.clients, **shares}
        raw["federation"] |= {"clients_per_round": None, "min_clients": 1}
        views = [v for v in raw["evaluation"]["views"] if v in SHOWN]
        raw["evaluation"] |= {"views": views or ["personal"], "analyses": []}
        raw["generation"] = {**raw.get("generation", {}), "samples": 0}  # texts stay at their site
        raw["model"] |= {"device": self.device, **({"name": self.model} if self.model else {})}
        raw["run"] |= {
            "threads": self.threads,
            "block": self.block or "auto",
            "keep": "all",
            "tensorboard": False,
            "trackers": [],
        }
        return Recipe.from_dict(raw)

    def federation(self, recipe: Mapping[str, Any], folder: Path) -> Federation:
        """The run's model and method over this site's data; personal leaves are kept in `folder`."""
        r = self.recipe(recipe)
        if self.policy is not None:
            self._known_base(r, self.policy.wanted(r.model.name))
        return build.federation(r, folder)

    def _known_base(self, r: Recipe, wanted: str | None) -> None:
        """Raise Refusal unless the base has the weights that the policy names; asked before any row is read."""
        if wanted is None or self.model:
            return
        with (
            warnings.catch_warnings()
        ):  # the head, of which there might be something to say, is no part of a fingerprint
            warnings.simplefilter("ignore")
            loaded = pretrained.load(
                r.model.name,
                r.model.task,
                dtype="fp32" if r.numbers.dtype == "int8" else r.numbers.dtype,
                revision=r.model.revision,
                seed=r.run.seed,
            )
        found = fingerprint(loaded.base, loaded.head)
        if found != wanted:
            raise Refusal(
                "base", f"the weights of {r.model.name!r} are {found}, the policy names {wanted}", "model.name"
            )


class Site:
    """Answers packets. make: a run's federation over this site's data (`Holding.federation`). folder: where personal leaves
    are kept, a subfolder for each run. histograms: consent to send class histograms. gate: the site's policy, consent and
    audit log; None trusts the server and records nothing, for trials within one process."""

    def __init__(
        self, make: Callable[[Mapping[str, Any], Path], Federation], folder: str | Path, histograms: bool = False,
        say: Callable[[str], None] = lambda text: None, gate: Gate | None = None,
    ):  # fmt: skip
        self.make, self.folder, self.histograms, self.say, self.gate = make, Path(folder), histograms, say, gate
        self._run: tuple[str, str] | None = None
        self._fed: Federation | None = None

    def answer(self, packet: Packet) -> Packet:
        """The reply to an order. What goes wrong comes back as the reply's header field `error`, never as an exception:
        whatever a server sends, this site goes on with its next order."""
        head: dict[str, Any] = {"run": None, "round": None, "protocol": PROTOCOL}
        try:
            order = order_of(packet)
            head |= {"run": order.run, "round": order.round}
            with kept():
                return self._answer(packet, order, head)
        except Exception as e:  # any error: the server learns a code, and this site goes on with its next order
            self.say(f"failed: {particulars(e)}")
            if self.gate is not None:
                self.gate.refused(packet, e)
            return Packet(packet.kind, head | {"error": told(e)})

    def _answer(self, packet: Packet, order: schema.JoinOrder | schema.WorkOrder, head: dict[str, Any]) -> Packet:
        if self.gate is not None:
            self.gate.admit(packet)
        fed = self.federation(order.run, order.recipe)
        if isinstance(order, schema.JoinOrder):
            reply = self._joined(fed, order, head)
        else:
            reply = self._done(packet, order, fed, head)
        return reply if self.gate is None else self.gate.leave(reply, fed)

    def _joined(self, fed: Federation, order: schema.JoinOrder, head: dict[str, Any]) -> Packet:
        base = fingerprint(fed.model.base, [s.name for s in fed.model.groups.get("head", ())])
        return Packet("join", head | {"clients": self._facts(fed, order.histograms), "base": base})

    def _done(self, packet: Packet, order: schema.WorkOrder, fed: Federation, head: dict[str, Any]) -> Packet:
        accepted = dict(order.clients)
        foreign = sorted(set(accepted) - set(fed.data.ids))
        if foreign:
            raise PacketError(
                f"order names clients that are not here: {foreign[:3]}, expected {list(fed.data.ids)[:3]}"
            )
        part = {c: c if c in packet.parts else EVERYBODY for c in accepted}
        read = {name: self._received(packet.parts.get(name, b"")) for name in set(part.values())}
        down = {c: read[name] for c, name in part.items()}
        work = self._train if packet.kind == "train" else self._evaluate
        return work(fed, RoundInfo(order.round, order.rounds), accepted, down, head)

    @staticmethod
    def _received(message: bytes) -> Params:
        """What the server has sent. Raises UploadError for leaves with which nobody can train."""
        params = wire.unpack(wire.decode(message)[0])
        if why := wire.finite_state(params):
            raise PacketError(f"order, leaves: {why}")
        return params

    def federation(self, run: str, recipe: Mapping[str, Any]) -> Federation:
        """The run's model, method and this site's data, loaded once and kept for the next order."""
        name = run, digest(recipe)  # a run whose recipe has changed is another one
        if self._fed is None or self._run != name:
            self.say(f"run {run}: loading model and data")
            fed = self.make(recipe, self.folder / run)
            if self.gate is not None:
                self.gate.holds(fed)
            fed.store.root.mkdir(mode=durable.FOLDER, parents=True, exist_ok=True)
            fed.store.claim(fed.recipe_hash, dict(fed.recipe), inputs.of(fed))
            self._fed, self._run = fed, name
        return self._fed

    def _facts(self, fed: Federation, asked: bool) -> dict[str, Any]:
        facts: dict[str, Any] = {
            c: {s: int(rows.sizes[k]) for s, rows in fed.data.splits.items()} for k, c in enumerate(fed.data.ids)
        }
        if asked and self.histograms and fed.data.label_names:
            counts = {s: fed.data.histogram(s) for s in fed.data.splits}
            for k, c in enumerate(fed.data.ids):
                facts[c]["histogram"] = {s: v[k].tolist() for s, v in counts.items()}
        return facts

    def _engine(self, fed: Federation, accepted: Mapping[str, int | None], down: Mapping[str, Params]) -> Engine:
        """The engine of a simulation, whose broadcasts have come by post and whose stored leaves follow accepted uploads."""

        def load(id: str, before: int) -> Params | None:
            round = accepted[id]
            if round is None:
                return None
            if fed.store.has_round(id, round):
                return fed.store.load_round(id, round)
            personal = fed.channel.remembers or fed.method.keep(fed.context, Client(id, 1))
            if personal or fed.store.load_client(id, round) is not None:
                raise StateError(
                    f"client {id!r}: its personal leaves of round {round + 1} are gone from {fed.store.root}; restore that "
                    "folder: the server has accepted what they belong to"
                )
            return None

        engine = fed.engine(Callback())
        pace = engine.pace if self.gate is None else self.gate.pace(engine.pace)
        return replace(engine, load=load, received=lambda client: down[client.id], pace=pace)

    def _train(
        self, fed: Federation, info: RoundInfo, accepted: Mapping[str, int | None], down: Mapping[str, Params], head: dict[str, Any]
    ) -> Packet:  # fmt: skip
        engine = self._engine(fed, accepted, down)
        cohort = [fed.client(fed.index[c]) for c in accepted]
        parts: dict[str, bytes] = {}
        facts: dict[str, Any] = {}
        for client, done, effort in engine.train(info, cohort, lambda c: down[c.id]):
            fed.store.save_client(client.id, info.round, done.kept)
            assert done.sent is not None
            parts[client.id] = done.sent.encode()
            facts[client.id] = {"examples": client.examples, "metrics": done.metrics, "tokens": effort.tokens}
        fed.store.sync()  # one sync for all clients, before the server hears of their uploads
        for client in cohort:
            fed.store.forget(client.id, accepted[client.id], info.round)
        losses = ", ".join(f"{f['metrics'].get('loss', float('nan')):.3f}" for f in list(facts.values())[:4])
        self.say(f"round {info.round + 1} of {info.rounds}: trained {len(parts)} client(s), loss {losses}")
        return Packet("train", head | {"clients": facts}, parts)

    def _evaluate(
        self, fed: Federation, info: RoundInfo, accepted: Mapping[str, int | None], down: Mapping[str, Params], head: dict[str, Any]
    ) -> Packet:  # fmt: skip
        if set(accepted) != set(fed.data.ids):
            raise UploadError(
                f"order evaluates {len(accepted)} clients, expected all {len(fed.data.ids)} that are here"
            )
        engine = self._engine(fed, accepted, down)
        server = ServerState(info.round, {})
        if info.round == info.rounds:
            for k, client in enumerate(fed.data.ids):
                fed.store.save_served(client, served(fed, engine, server, [k], "personal")[0])
            self.say(
                f"run {fed.store.root.name} is done; the models of {len(accepted)} client(s) are in {fed.store.root}"
            )
        lines = evaluate(fed, engine, server)
        kept = [{"view": x.view, "split": x.split, "clients": x.clients} for x in lines if isinstance(x, EvalLine)]
        return Packet("evaluate", head | {"lines": kept})


def guarded(
    holding: Holding, folder: Path, *, accept: Sequence[str] = (), ask: Ask | None = None,
    say: Callable[[str], None] = lambda text: None, histograms: bool = False,
) -> Site:  # fmt: skip
    """A site behind its gate: with the holding's policy, or without one a server that is trusted; with an audit log always.

    histograms: consent to class histograms where there is no policy to give it.
    """
    policy = holding.policy
    if policy is not None:
        histograms = policy.send.histograms
        if policy.model.folder and not holding.model:
            holding = replace(holding, model=policy.model.folder)
    gate = Gate(policy, folder, holding.recipe, accept=accept, ask=ask, say=say)
    return Site(holding.federation, folder, histograms, say, gate)


def particulars(e: Exception) -> str:
    """What went wrong, for the site's own eyes."""
    if isinstance(e, FedloraError):
        return str(e)
    if isinstance(e, MemoryError):
        return "out of memory; give this site fewer clients at once (fedlora client --block), or more memory"
    if isinstance(e, OSError):
        return f"{e.strerror or e} ({e.filename})" if e.filename else str(e)
    return f"{type(e).__name__}: {e}"
