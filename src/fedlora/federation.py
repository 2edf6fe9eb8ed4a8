"""A federation on one machine: rounds, evaluation, the run folder. The same objects a recipe builds can be made by hand.

fl.Federation(model=..., task=..., data=..., method=fl.FedSALoRA(rank=8), output="runs/mine").run()
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from . import inputs
from .analysis import product_error
from .channel import Channel, unserved
from .data.batches import Plan, batch_of, train_batches
from .data.federated import FederatedData
from .engine import Engine, RoundLog, Schedule
from .errors import ConfigError, Problem, StateError
from .guards.guard import Guard
from .memory import auto_block, forget_peak, kept, peak_memory
from .method import Client, Method, Order, Scene, Server, Upload
from .model import Adapted, Batch
from .runtime import InProcess, Runtime
from .seeds import np_rng
from .store import Store
from .tasks import Loss, Task
from .tensorboard import TensorBoard
from .tree import Params, count, select
from .views import View
from .watch import Several, Watch
from .wire import Precision

Analysis = Literal["effective-ranks", "asymmetry"]
POOLED = "all clients"
EXACTNESS_COHORT = 32  # the exactness meter holds a cohort's uploads; above this it is off


@dataclass(frozen=True)
class Sampling:
    """Who takes part: clients_per_round a count, a fraction in (0, 1), or None for all; a new sample each round or one
    fixed cohort. precision: of the messages. norm_bound: an upload whose leaves have a larger norm is refused. guards: what
    is done to uploads around the method (guards/)."""

    rounds: int = 10
    clients_per_round: float | None = None
    cohort: Literal["uniform", "fixed"] = "uniform"
    min_clients: int = 1
    precision: Precision = "fp32"
    norm_bound: float | None = None
    guards: Sequence[Guard] = field(default=(), repr=False)

    @property
    def channel(self) -> Channel:
        """The road of messages. Raises ConfigError for guards that do not fit together."""
        return Channel(self.precision, self.norm_bound, self.guards)

    def size(self, clients: int, most: bool = False) -> int:
        """Clients in a round. most: as many as there are where fewer than that are there; an error otherwise."""
        c = self.clients_per_round
        if c is None:
            return clients
        n = max(1, round(c * clients)) if isinstance(c, float) and 0 < c < 1 else int(c)
        if most:
            return min(n, clients)
        if not 1 <= n <= clients:
            raise ConfigError([Problem("federation.clients_per_round", c, f"1 to {clients} (the clients that train)")])
        return n

    def members(self, clients: int, seed: int, round: int, over: float | None = None) -> list[int]:
        """Client indices of `round`, ascending. over: at a server, how many are asked for each one needed."""
        n = self.size(clients) if over is None else min(clients, math.ceil(over * self.size(clients, most=True)))
        if n == clients:
            return list(range(clients))
        draw = np_rng(seed, "cohort", 0 if self.cohort == "fixed" else round)
        return sorted(draw.choice(clients, n, replace=False).tolist())


@dataclass(frozen=True)
class Evaluation:
    """When and what to evaluate. every: rounds between evaluations (the first, before training, and the last always)."""

    every: int = 1
    views: Sequence[View] = ("personal", "global")
    cross_clients: int = 8
    batch_size: int = 64
    exactness: bool = True
    analyses: Sequence[Analysis] = ()
    threshold: float = 0.05


@dataclass
class Federation:
    """One run: a method over a model and its clients' data.

    block: clients trained at once, or "auto" from memory. output: the run folder.
    """

    model: Adapted
    task: Task
    data: FederatedData
    method: Method
    output: str | Path
    plan: Plan = Plan()
    schedule: Schedule = Schedule()
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    seed: int = 0
    block: int | Literal["auto"] = "auto"
    accumulation: int = 1
    keep: Literal["last", "all"] = "last"
    tensorboard: bool = False
    name: str = "run"
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_hash: str = ""
    runtime: Callable[[Federation, Watch], Runtime] = InProcess

    def __post_init__(self) -> None:
        if bad := unserved(self.sampling.channel.guards, self.method):
            raise ConfigError(bad)
        self.scene = Scene(self.model.groups, self.seed)
        self.loss = Loss(self.model, self.task, self.accumulation)
        self.store = Store(Path(self.output), keep=self.keep)
        self.enrol(self.data)
        if not self.recipe_hash:
            self.recipe_hash = _hash_of(self)

    # clients ----------------------------------------------------------------------------------------------------
    def enrol(self, data: FederatedData) -> None:
        """Take `data` as the federation's: at a server they are known when the sites have said what they hold."""
        self.data = data
        self.index = _Index(data.ids)
        self.training = len(data.ids) - data.unseen

    def client(self, k: int) -> Client:
        """What the server knows of client number k."""
        id = self.data.ids[k]
        return Client(id, int(self.data.splits["train"].sizes[k]))

    def cohort(self, round: int) -> list[Client]:
        """The clients of a round (0-based)."""
        if self.method.pooled:
            return [Client(POOLED, int(self.data.splits["train"].offsets[self.training]))]
        return [self.client(k) for k in self.sampling.members(self.training, self.seed, round)]

    def batches(self, client: Client, order: Order, draws: int) -> list[Batch]:
        """One client's minibatches of a round."""
        k = None if client.id == POOLED else self.index[client.id]
        return train_batches(self.data, k, self.plan, draws, self.seed, order.round, client.id)

    # rounds -----------------------------------------------------------------------------------------------------
    def engine(self, watch: Watch) -> Engine:
        return Engine(
            self.method, self.scene, self.loss, self.batches, lambda id, r: self.store.load_client(id, r),
            lambda id, r, p: self.store.save_client(id, r, p), self.schedule, self.block_size(), self.sampling.min_clients,
            self.sampling.channel, watch.clients_done, lambda b, n: self._lowered(b, n, watch),
        )  # fmt: skip

    def _lowered(self, block: int, clients: int, watch: Watch) -> None:
        """A resumed run starts with the blocks that fitted."""
        facts = self.store.read_json("environment.json")
        if facts:  # a site has none
            self.store.write_json("environment.json", facts | {"block": block})
        self.store.facts["block"] = block
        watch.lowered(block, clients)

    def block_size(self) -> int:
        """Clients trained at once: as set, or what memory allows; 1 for models whose clients cannot share a forward."""
        rows = self.data.splits["train"].rows[:2]
        if not len(rows):
            return 1  # a server has none
        batch = batch_of(self.data, np.zeros(len(rows), np.int64), rows)
        together = self.model.probe({n: v[None].to(self.model.device) for n, v in batch.items()})
        if self.block != "auto":
            return self.block
        # A resumed run must group its clients as before, whatever memory is free today: sums would differ in their last bits.
        return self.store.block() or (auto_block(self) if together else 1)

    def run(self, watch: Watch | None = None) -> dict[str, Any]:
        """Train to the last round from wherever the run folder was left; returns the summary.

        KeyboardInterrupt drops the round at hand and leaves a folder that `run` takes up again.
        """
        watch = watch or Watch()
        forget_peak()
        with self.store.lock(), kept():
            self.store.claim(self.recipe_hash, dict(self.recipe), inputs.of(self))
            from .summary import describe_again, describe_run, summarise

            self.store.rewind()
            loaded = self.store.load_server()
            if self.runtime is InProcess and "run" in self.store.facts:
                raise StateError(
                    f"{self.store.root}: a run over sites: start fedlora server again with this output folder"
                )
            done = loaded[0] if loaded else 0
            if self.tensorboard:
                watch = Several(watch, TensorBoard(self.store.root / "tensorboard", done))
            watch.start(self.name, done, self.sampling.rounds)
            runtime = self.runtime(self, watch)
            self.store.facts["block"] = runtime.block
            if loaded is None:
                describe_run(self, runtime.block)
                server = self.method.init(self.scene)
                self._commit(server, self.evaluate(runtime, server, watch), watch)
            else:
                describe_again(self, runtime.block)
                server = Server.restored(*loaded)
            while server.round < self.sampling.rounds:
                server = self._round(runtime, self._advance(runtime, server, watch), watch)
            result = summarise(self, server)
            self.store.write_json("summary.json", result)
            watch.end(result)
            return result

    def evaluate(self, runtime: Runtime, server: Server, watch: Watch) -> list[dict[str, Any]]:
        """Lines of metrics for every view and split that has rows."""
        watch.evaluating(server.round)
        return runtime.evaluate(server)

    def _advance(self, runtime: Runtime, server: Server, watch: Watch) -> Server:
        """Let a method with stages change its parametrisation; what that does to the scores is recorded.

        The scores before are the round's own where it was evaluated, and else are taken here, as stage "before"."""
        new = self.sampling.channel.advance(self.method, self.scene, server)
        if new is server:
            return server
        stages = {"handover": new} if self._due(server.round) else {"before": server, "handover": new}
        lines = [{**line, "stage": stage} for stage, s in stages.items() for line in self.evaluate(runtime, s, watch)]
        self._commit(new, [{"kind": "handover", "round": new.round, **new.notes.get("handover", {})}, *lines], watch)
        return new

    def _due(self, round: int) -> bool:
        """Whether a round is evaluated: every so many, and the last."""
        return round % self.evaluation.every == 0 or round == self.sampling.rounds

    def _round(self, runtime: Runtime, server: Server, watch: Watch) -> Server:
        start = time.perf_counter()
        cohort = runtime.cohort(server.round)
        watch.round_start(server.round + 1, len(cohort))
        meter = _Meter(self.method, self.scene, self.evaluation.exactness and len(cohort) <= EXACTNESS_COHORT)
        new, log = runtime.round(server, self.sampling.rounds, cohort, meter.see)
        trained = time.perf_counter()
        lines = [self._train_line(new, cohort, log, meter.error(new))]
        if self._due(new.round):
            lines += self.evaluate(runtime, new, watch)
        evaluated = time.perf_counter()
        self._commit(new, lines, watch)
        facts = {
            "round": new.round,
            "train_seconds": trained - start,
            "eval_seconds": evaluated - trained,
            "server_seconds": time.perf_counter() - evaluated,
            "tokens": log.tokens,
            "peak_memory_bytes": peak_memory(),
        }
        self.store.append_timing(facts)
        watch.round_done(new.round, facts | {"bytes": log.up.total + log.down.total})
        return new

    def _train_line(self, new: Server, cohort: Sequence[Client], log: RoundLog, error: float | None) -> dict[str, Any]:
        good = [v for c, v in log.losses.items() if c not in log.refused]
        return {
            "kind": "train",
            "round": new.round,
            "loss": float(np.mean(good)) if good else float("nan"),
            "clients": list(log.cohort or [c.id for c in cohort]),
            "losses": log.losses,
            "examples": log.examples,
            "refused": log.refused,
            "bytes": {"up": log.up.as_dict(), "down": log.down.as_dict()},
            "exactness": None if error is None else {"product_error": error},
            **self.method.record(new),
        }

    def _commit(self, server: Server, lines: Sequence[dict[str, Any]], watch: Watch) -> None:
        length = self.store.append_metrics(lines)
        self.store.save_server(server.round, server.leaves, server.notes, length)
        for line in lines:
            watch.record(line)

    # facts ------------------------------------------------------------------------------------------------------
    def parameters(self) -> dict[str, int]:
        """Scalars one client trains, shares and keeps, of which head; and the frozen base."""
        server = self.method.init(self.scene)
        probe = self.client(0)
        down = select(self.method.broadcast(self.scene, server, probe), lambda k: k.part != "rank")
        kept = select(self.method.keep(self.scene, probe), lambda k: "~" not in k.adapter)
        head = lambda p: count(select(p, lambda k: k.adapter == "head"))  # noqa: E731
        return {
            "trainable": count(down) + count(kept),
            "shared": count(down),
            "personal": count(kept),
            "head": head(down) + head(kept),
            "base": sum(p.numel() for p in self.model.base.parameters()),
        }


class _Index(dict[str, int]):
    """Client id -> number."""

    def __init__(self, ids: Sequence[str]):
        super().__init__((id, k) for k, id in enumerate(ids))


class _Meter:
    """Holds a round's uploads for the exactness meter, if it is on."""

    def __init__(self, method: Method, scene: Scene, on: bool):
        self.method, self.scene, self.on = method, scene, on
        self.seen: list[tuple[Params, float]] = []

    def see(self, u: Upload) -> None:
        if self.on:
            self.seen.append((u.params, self.method.weight(u)))

    def error(self, new: Server) -> float | None:
        if not self.on or not self.seen:
            return None
        frozen = self.method.fixed(self.scene)
        return product_error([(frozen | p, w) for p, w in self.seen], frozen | new.params)


def _hash_of(f: Federation) -> str:
    """Identity of a run made by hand: the method, the plan and the shape of data and model."""
    import hashlib

    facts = (f.method, f.plan, f.schedule, f.sampling, f.evaluation, f.seed, *f.sampling.guards, len(f.data.ids), f.data.splits["train"].rows[:64].tolist(),
             sorted((g, len(s)) for g, s in f.model.groups.items()), type(f.model.base).__name__)  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
