"""One site: its clients' data, their personal leaves on its own disk, and what it does when the server asks.

A site is stateless between orders but for those leaves: every order carries the recipe, so a site that was killed goes on
with the next one. Only the declared shared leaves, scores and row counts leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import build, wire
from ..engine import Engine
from ..errors import ConfigError, DataError, FedloraError, ModelError, Problem, StateError, UploadError
from ..federation import Federation
from ..memory import kept
from ..method import Client, Order, Server
from ..recipe import Recipe
from ..records import EvalLine
from ..tree import Params
from ..views import evaluate, served
from ..watch import Watch
from . import schema
from .packets import EVERYBODY, PROTOCOL, Packet, order_of
from .schema import PacketError

SHOWN = ("personal", "global")  # the views that need nobody else's data
COLUMNS = ("text", "label", "template", "prompt", "completion", "encoding")
CODES = {
    ConfigError: "recipe",
    DataError: "data",
    ModelError: "model",
    StateError: "state",
    MemoryError: "memory",
    OSError: "disk",
}


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

    def recipe(self, given: Mapping[str, Any]) -> Recipe:
        """The server's recipe over this site's data. Raises ConfigError."""
        raw = {k: dict(v) if isinstance(v, Mapping) else v for k, v in given.items()}
        unknown = [
            Problem(f"data.{k}", v, f"one of {', '.join(COLUMNS)}") for k, v in self.columns.items() if k not in COLUMNS
        ]
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
        raw["data"] |= {"source": self.data, "format": "auto", **elsewhere, **self.columns}
        shares = {k: raw["partition"][k] for k in ("validation", "test")}
        raw["partition"] = {"kind": "column" if self.clients else "iid", "clients": 1, "column": self.clients, **shares}
        raw["federation"] |= {"clients_per_round": None, "min_clients": 1}
        views = [v for v in raw["evaluation"]["views"] if v in SHOWN]
        raw["evaluation"] |= {"views": views or ["personal"], "analyses": []}
        raw["model"] |= {"device": self.device, **({"name": self.model} if self.model else {})}
        raw["run"] |= {"threads": self.threads, "block": self.block or "auto", "keep": "all", "tensorboard": False}
        return Recipe.from_dict(raw)

    def federation(self, recipe: Mapping[str, Any], folder: Path) -> Federation:
        """The run's model and method over this site's data; personal leaves are kept in `folder`."""
        return build.federation(self.recipe(recipe), folder)


class Site:
    """Answers packets. make: a run's federation over this site's data (`Holding.federation`). folder: where personal leaves
    are kept, a subfolder for each run. histograms: consent to send class histograms."""

    def __init__(
        self, make: Callable[[Mapping[str, Any], Path], Federation], folder: str | Path, histograms: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ):  # fmt: skip
        self.make, self.folder, self.histograms, self.say = make, Path(folder), histograms, say
        self._run: str | None = None
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
        except Exception as e:
            failed = failure(e)
            self.say(f"failed: {failed['text']} ({failed['code']})")
            return Packet(packet.kind, head | {"error": failed})

    def _answer(self, packet: Packet, order: schema.JoinOrder | schema.WorkOrder, head: dict[str, Any]) -> Packet:
        fed = self.federation(order.run, order.recipe)
        if isinstance(order, schema.JoinOrder):
            return Packet("join", head | {"clients": self._facts(fed, order.histograms)})
        accepted = dict(order.clients)
        foreign = sorted(set(accepted) - set(fed.data.ids))
        if foreign:
            raise PacketError(
                f"order names clients that are not here: {foreign[:3]}, expected {list(fed.data.ids)[:3]}",
                field="clients",
            )
        part = {c: c if c in packet.parts else EVERYBODY for c in accepted}
        read = {name: self._received(packet.parts.get(name, b"")) for name in set(part.values())}
        down = {c: read[name] for c, name in part.items()}
        work = self._train if packet.kind == "train" else self._evaluate
        return work(fed, Order(order.round, order.rounds), accepted, down, head)

    @staticmethod
    def _received(message: bytes) -> Params:
        """What the server has sent. Raises UploadError for leaves with which nobody can train."""
        params = wire.unpack(wire.decode(message)[0])
        if why := wire.finite_state(params):
            raise PacketError(f"order, leaves: {why}")
        return params

    def federation(self, run: str, recipe: Mapping[str, Any]) -> Federation:
        """The run's model, method and this site's data, loaded once and kept for the next order."""
        if self._fed is None or self._run != run:
            self.say(f"run {run}: loading model and data")
            fed = self.make(recipe, self.folder / _name(run))
            fed.store.root.mkdir(parents=True, exist_ok=True)
            fed.store.claim(fed.recipe_hash, dict(fed.recipe))
            self._fed, self._run = fed, run
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
            found = fed.store.load_client(id, round + 1)
            personal = fed.sampling.channel.remembers or fed.method.keep(fed.scene, Client(id, 1))
            if found is None and personal:
                raise StateError(
                    f"client {id!r}: its personal leaves of round {round + 1} are gone from {fed.store.root}; restore that "
                    "folder: the server has accepted what they belong to"
                )
            return found

        engine = fed.engine(Watch())
        return replace(engine, load=load, received=lambda client: down[client.id])

    def _train(
        self, fed: Federation, order: Order, accepted: Mapping[str, int | None], down: Mapping[str, Params], head: dict[str, Any]
    ) -> Packet:  # fmt: skip
        engine = self._engine(fed, accepted, down)
        cohort = [fed.client(fed.index[c]) for c in accepted]
        parts: dict[str, bytes] = {}
        facts: dict[str, Any] = {}
        for client, done, tokens in engine.train(order, cohort, lambda c: down[c.id]):
            fed.store.save_client(client.id, order.round, done.kept)
            fed.store.sync()
            fed.store.forget(client.id, accepted[client.id])
            assert done.sent is not None
            parts[client.id] = done.sent.encode()
            facts[client.id] = {"examples": client.examples, "metrics": done.metrics, "tokens": tokens}
        losses = ", ".join(f"{f['metrics'].get('loss', float('nan')):.3f}" for f in list(facts.values())[:4])
        self.say(f"round {order.round + 1} of {order.rounds}: trained {len(parts)} client(s), loss {losses}")
        return Packet("train", head | {"clients": facts}, parts)

    def _evaluate(
        self, fed: Federation, order: Order, accepted: Mapping[str, int | None], down: Mapping[str, Params], head: dict[str, Any]
    ) -> Packet:  # fmt: skip
        if set(accepted) != set(fed.data.ids):
            raise UploadError(
                f"order evaluates {len(accepted)} clients, expected all {len(fed.data.ids)} that are here"
            )
        engine = self._engine(fed, accepted, down)
        server = Server(order.round, {})
        if order.round == order.rounds:
            for k, client in enumerate(fed.data.ids):
                fed.store.save_served(client, served(fed, engine, server, [k], "personal")[0])
            self.say(
                f"run {fed.store.root.name} is done; the models of {len(accepted)} client(s) are in {fed.store.root}"
            )
        lines = evaluate(fed, engine, server)
        kept = [{"view": x.view, "split": x.split, "clients": x.clients} for x in lines if isinstance(x, EvalLine)]
        return Packet("evaluate", head | {"lines": kept})


def failure(e: Exception) -> dict[str, Any]:
    """What a site tells of an error: its code, the field of the order that is at fault, and a sentence."""
    if isinstance(e, PacketError):
        return {"code": e.code, "field": e.field, "text": schema.line(str(e))}
    code = next((code for kind, code in CODES.items() if isinstance(e, kind)), "refused")
    if isinstance(e, MemoryError):
        text = "out of memory; give this site fewer clients at once (fedlora client --block), or more memory"
    elif isinstance(e, FedloraError):
        text = str(e)
    elif isinstance(e, OSError):
        text = f"{e.strerror or e} ({e.filename})" if e.filename else str(e)
    else:
        code = "internal"
        text = (
            f"what the order asks cannot be done ({type(e).__name__}); do both sides have the same version of fedlora?"
        )
    return {"code": code, "field": None, "text": schema.line(text)}


def _name(run: str) -> str:
    """A run's id as a folder. Raises UploadError for one that a server of ours has not made."""
    if not run.replace("-", "").isalnum() or len(run) > 64:
        raise UploadError(f"run {run[:64]!r} is no run id, expected letters, digits and dashes")
    return run
