"""What is federated: model, task, data, method and how they are sampled and evaluated. Nothing here runs or is stored.

A run (run.py) adds the folder, the loop and the place where clients are trained; what measures or describes a
federation (views.py, summary.py, memory.py) needs the setting alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..arguments import Checked
from ..data.batches import LocalWork, train_batches
from ..data.examples import Arrays
from ..data.federated import FederatedData
from ..errors import ConfigError, DataError, FedloraError, ModelError, Problem
from ..methods.contract import Client, Context, Method, RoundInfo, ServerState
from ..model.adapted import Adapted, Batch
from ..seeds import np_rng
from ..training.loss import Loss
from ..training.task import Task
from ..tree import count, select
from ..units import counted
from .channel import Channel, unserved
from .engine import Schedule
from .generation import Generation
from .guards.guard import Guard, Place
from .private import Placed
from .wire import Precision

View = Literal["personal", "global", "unseen", "cross"]
Analysis = Literal["effective-ranks", "asymmetry"]
POOLED = "all clients"


@dataclass(frozen=True)
class Sampling(Checked):
    """Who takes part: clients_per_round a count, a share as a float in (0, 1], or None for all.

    cohort: a new sample each round, every client by its own coin (poisson: a cohort may be empty), or one fixed cohort.
    precision: of the messages. norm_bound: an upload whose leaves have a larger norm is refused. guards: what is done to
    uploads around the method (federation/guards/).
    """

    rounds: int = 10
    clients_per_round: float | None = None
    cohort: Literal["uniform", "poisson", "fixed"] = "uniform"
    min_clients: int = 1
    precision: Precision = "fp32"
    norm_bound: float | None = None
    guards: Sequence[Guard] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        least = [("rounds", self.rounds, 1), ("min_clients", self.min_clients, 1)]
        bad = [Problem(f"Sampling.{n}", v, f"an integer >= {low}") for n, v, low in least if v < low]
        for n in ("clients_per_round", "norm_bound"):
            if (v := getattr(self, n)) is not None and not v > 0:
                bad.append(Problem(f"Sampling.{n}", v, "a number > 0 or None"))
        if bad:
            raise ConfigError(bad)

    @property
    def channel(self) -> Channel:
        """The road of messages. Raises ConfigError for guards that do not fit together."""
        return Channel(self.precision, self.norm_bound, self.guards)

    def size(self, clients: int, most: bool = False) -> int:
        """Clients in a round. most: as many as there are where fewer than that are there; an error otherwise."""
        c = self.clients_per_round
        n = counted(c, clients)
        if most:
            return min(n, clients)
        if not 1 <= n <= clients:
            raise ConfigError([Problem("federation.clients_per_round", c, f"1 to {clients} (the clients that train)")])
        return n

    def expected(self, clients: int) -> float:
        """Clients of a round in the mean; a share is no whole number of clients under Poisson sampling."""
        share = isinstance(self.clients_per_round, float) and self.clients_per_round <= 1
        if self.cohort == "poisson" and share:
            return float(self.clients_per_round or 1) * clients
        return float(self.size(clients))

    @property
    def least(self) -> int:
        """Accepted uploads that a round needs; none where a cohort may be empty."""
        return 0 if self.cohort == "poisson" else self.min_clients

    def members(self, clients: int, seed: int, round: int, over: float | None = None) -> list[int]:
        """Client indices of `round`, ascending. over: at a server, how many are asked for each one needed."""
        if self.cohort == "poisson":
            q = self.expected(clients) / clients
            return np.flatnonzero(np_rng(seed, "cohort", round).random(clients) < q).tolist()
        n = self.size(clients) if over is None else min(clients, math.ceil(over * self.size(clients, most=True)))
        if n == clients:
            return list(range(clients))
        draw = np_rng(seed, "cohort", 0 if self.cohort == "fixed" else round)
        return sorted(draw.choice(clients, n, replace=False).tolist())


@dataclass(frozen=True)
class Evaluation(Checked):
    """When and what to evaluate. every: rounds between evaluations (the first, before training, and the last always).

    clients: those that are scored of the clients that train, a count or a share as in Sampling, None for all. One sample
    is drawn from the seed for the whole run (the choice is ours), so that rounds and methods are compared on the same clients.
    """

    every: int = 1
    views: Sequence[View] = ("personal", "global")
    cross_clients: int = 8
    batch_size: int = 64
    exactness: bool = True
    analyses: Sequence[Analysis] = ()
    threshold: float = 0.05
    clients: float | None = field(default=None, repr=False)
    generation: Generation | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        least = [("every", self.every), ("batch_size", self.batch_size), ("cross_clients", self.cross_clients)]
        if bad := [Problem(f"Evaluation.{n}", v, "an integer >= 1") for n, v in least if v < 1]:
            raise ConfigError(bad)

    def scored(self, training: int, seed: int) -> list[int]:
        """Indices of the clients that are scored, ascending, of the `training` that train. Raises ConfigError for more."""
        n = counted(self.clients, training)
        if not 1 <= n <= training:
            raise ConfigError(
                [Problem("evaluation.clients", self.clients, f"1 to {training} (the clients that train)")]
            )
        if n == training:
            return list(range(training))
        return sorted(np_rng(seed, "scored clients").choice(training, n, replace=False).tolist())


@dataclass
class Setting(Checked):
    """A method over a model and its clients' data. Raises ConfigError for guards that cannot serve the method.

    accumulation: parts in which a batch is computed. recipe, recipe_hash: the recipe it was built from, {} if by hand. numbers: what the
    base computes in and why, for records. start: factors and head at which training begins (Context.start). deployed: where guards
    stand at the server of a deployment, which does not know how many clients there are.
    """

    model: Adapted
    task: Task
    data: FederatedData
    method: Method
    plan: LocalWork = field(default=LocalWork(), kw_only=True)
    schedule: Schedule = field(default=Schedule(), kw_only=True)
    sampling: Sampling = field(default=Sampling(), kw_only=True)
    evaluation: Evaluation = field(default=Evaluation(), kw_only=True)
    seed: int = field(default=0, kw_only=True)
    accumulation: int = field(default=1, kw_only=True)
    name: str = field(default="run", kw_only=True)
    recipe: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    recipe_hash: str = field(default="", kw_only=True)
    numbers: str = field(default="", kw_only=True)
    start: Mapping[tuple[str, str], Tensor] = field(default_factory=dict, kw_only=True, repr=False)
    deployed: Place | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if bad := unserved(self.sampling.channel.guards, self.method):
            raise ConfigError(bad)
        least = self.method.least_steps
        if self.plan.steps is not None and self.plan.steps < least:
            raise ConfigError([Problem("train.steps", self.plan.steps, f"at least {least}, for {self.method.title}")])
        self.context = Context(self.model.groups, self.seed, self.start)
        self.loss = Loss(self.model, self.task, self.accumulation)
        self.enrol(self.data)
        self._refuse_empty()
        self._try()
        if not self.recipe_hash:
            self.recipe_hash = _hash_of(self)

    # messages ---------------------------------------------------------------------------------------------------
    @property
    def place(self) -> Place:
        """What guards may know of this run."""
        if self.deployed is not None:
            return self.deployed
        kind = self.sampling.cohort if self.sampling.expected(self.training) < self.training else "everybody"
        return Place(self.seed, self.sampling.rounds, self.training, self.sampling.expected(self.training), kind)

    @property
    def channel(self) -> Channel:
        """The road of this run's messages, with every guard in its place."""
        bare = self.sampling.channel
        if not self.training and self.deployed is None:
            return bare  # nobody has come yet
        return replace(bare, guards=tuple(g.placed(self.place) for g in bare.guards))

    @property
    def private(self) -> Placed | None:
        """The guard that spends a privacy budget, if there is one."""
        return next((g for g in self.channel.guards if isinstance(g, Placed)), None)

    @property
    def withheld(self) -> bool:
        """Whether the records may tell nothing of single clients or of their rows."""
        return any(g.withholds for g in self.sampling.guards)

    # clients ----------------------------------------------------------------------------------------------------
    def enrol(self, data: FederatedData) -> None:
        """Take `data` as the federation's: at a server they are known when the sites have said what they hold."""
        self.data = data
        self.index = {id: k for k, id in enumerate(data.ids)}
        self.training = len(data.ids) - data.unseen

    def _try(self) -> None:
        """Look at a user's own arrays: raise DataError for labels that are not the task's, and ModelError for a module that cannot
        compute such rows or gives no outputs of the task. A recipe's data are made for its task."""
        examples = self.data.examples
        if not isinstance(examples, Arrays) or not len(examples) or not len(self.data.splits["train"].rows):
            return
        if why := self.task.unfit(examples.labels):
            raise DataError(f"labels: {why}")
        batch = {n: v.to(self.model.device) for n, v in examples.collate(self.data.splits["train"].rows[:2]).items()}
        held = ", ".join(f"{n} {str(v.dtype).removeprefix('torch.')} {list(v.shape)}" for n, v in batch.items())
        try:
            with torch.no_grad():
                y = self.model.forward({}, {n: v[None] for n, v in batch.items()})[0]
        except FedloraError:
            raise
        except Exception as e:
            raise ModelError(
                f"model: its forward cannot compute a batch of {held}: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}; "
                + ("array.astype(np.float32) makes what most layers compute in, or " if "float64" in held else "")
                + "mend `call` of fl.adapt, which turns (base, inputs) into a tensor of outputs, or the arrays"
            ) from e
        self._score(y, batch["labels"])

    def _score(self, y: Tensor, labels: Tensor) -> None:
        """Raise ModelError for outputs [rows ...] of a user's own module that the task cannot score by these labels."""
        rows, wanted = len(labels), self.task.outputs
        if wanted is not None and (y.ndim < 1 or y[:rows].numel() != rows * wanted):
            raise ModelError(
                f"model: gives outputs of shape {list(y.shape)} for {rows} rows, expected [{rows}, {wanted}] for {self.task!r}; "
                "change the last layer or the task"
            )
        try:
            self.task.row_losses(y, labels)
        except Exception as e:
            shapes = f"outputs of shape {list(y.shape)} and labels of shape {list(labels.shape)}"
            raise ModelError(
                f"model: {self.task!r} cannot score {shapes} ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}); "
                "choose another task, or give labels as it wants them"
            ) from e

    def _refuse_empty(self) -> None:
        """Raise DataError for clients that should train and hold nothing to train on."""
        empty = np.flatnonzero(self.data.splits["train"].sizes[: self.training] == 0)
        if len(empty) and not self.method.pooled:
            named = ", ".join(str(self.data.ids[k]) for k in empty[:4])
            raise DataError(
                f"data: {len(empty)} of {self.training} clients hold no training rows ({named}{', ...' if len(empty) > 4 else ''}), "
                "expected at least one each; leave them out, or count them as unseen"
            )

    def client(self, k: int) -> Client:
        """What the server knows of client number k."""
        id = self.data.ids[k]
        return Client(id, int(self.data.splits["train"].sizes[k]))

    def cohort(self, round: int) -> list[Client]:
        """The clients of a round (0-based)."""
        if self.method.pooled:
            return [Client(POOLED, int(self.data.splits["train"].offsets[self.training]))]
        return [self.client(k) for k in self.sampling.members(self.training, self.seed, round)]

    def batches(self, client: Client, info: RoundInfo, draws: int) -> list[Batch]:
        """One client's minibatches of a round."""
        k = None if client.id == POOLED else self.index[client.id]
        return train_batches(self.data, k, self.plan, draws, self.seed, info.round, client.id)

    # facts ------------------------------------------------------------------------------------------------------
    def parameters(self, server: ServerState | None = None) -> dict[str, int]:
        """Scalars that a client trains, shares with the server and keeps, of which head; those that only come down; and
        those of the base. Counted on the leaves of `server`, the first one by default: a method with stages has others
        later."""
        method, probe = self.method, self.client(0)
        server = method.init(self.context) if server is None else server
        down = select(method.broadcast(self.context, server, probe), lambda k: k.part != "rank")
        kept = select(method.keep(self.context, probe), lambda k: "~" not in k.adapter and not method.idle(k, down))
        frozen = select(down, method.frozen)
        head = lambda p: count(select(p, lambda k: k.adapter == "head"))  # noqa: E731
        return {
            "trainable": count(down) - count(frozen) + count(kept),
            "shared": count(down),
            "personal": count(kept),
            "frozen": count(frozen),
            "head": head(down) + head(kept),
            "base": sum(p.numel() for p in self.model.base.parameters()),
        }


def _hash_of(f: Setting) -> str:
    """Identity of a run made by hand: the method, the plan and the shape of data and model."""
    sample = () if f.evaluation.clients is None else (f.evaluation.clients,)
    facts = (f.method, f.plan, f.schedule, f.sampling, f.evaluation, f.seed, *f.sampling.guards, *sample, len(f.data.ids),
             f.data.splits["train"].rows[:64].tolist(), sorted((g, len(s)) for g, s in f.model.groups.items()),
             type(f.model.base).__name__,
             *([] if f.evaluation.generation is None else [f.evaluation.generation]))  # fmt: skip
    return hashlib.sha256(repr(facts).replace("LocalWork(", "Plan(").encode()).hexdigest()[:12]
