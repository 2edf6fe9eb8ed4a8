"""SCAFFOLD on adapters: control variates against client drift (Karimireddy et al., ICML 2020, arXiv:1910.06378, option II).

    train      y <- y - lr (grad F_k(y) - c_k + c),  from y = x
    after      c_k' = c_k - c + (x - y) / sum of lr;   sent are y and c_k' - c_k: twice the bytes
    aggregate  x = sum_k p_k y_k;   c <- c + what the mean of the c_k has gained

c_k stays with its client. Option II takes (x - y) / sum of lr for the mean gradient, which it is for plain SGD alone: AdamW and
momentum are refused. Public code that subtracts lr (c - c_k) after a step of AdamW has another scale.

Choices: c is the mean of c_k, by the weights p_k, over the clients that have taken part so far (the paper divides by all clients,
which a server of real sites does not know; with everybody in each round it is the same); the server's rate is 1, others are a
guard (`fedavgm`); a personal head has no control; the client's gradient is clipped before it is corrected.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import Problem
from ..model.adapted import Batch
from ..training.loss import Loss
from ..training.optimizers import SGD, Optimizer, clip
from ..tree import Key, Params, mean, per_client, select
from .average import HomLoRA
from .contract import Client, Context, Metrics, RoundInfo, ServerState, Upload, Work

CONTROL, OWN = "control", "own-control"  # c, and c_k
RATE = Key("", "", "rate")


@dataclass(frozen=True)
class Scaffold(HomLoRA):
    """FedAvg of both factors whose clients correct each step by what others' gradients are. For SGD without momentum."""

    name: ClassVar[str] = "scaffold"
    title: ClassVar[str] = "SCAFFOLD"
    paper: ClassVar[str] = "arXiv:1910.06378"
    optimizer: Optimizer = SGD()

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if not isinstance(self.optimizer, SGD) or self.optimizer.momentum:
            got = "sgd with momentum" if isinstance(self.optimizer, SGD) else type(self.optimizer).__name__.lower()
            why = "a control variate is the mean gradient of plain steps"
            bad.append(Problem("train.optimizer", got, "sgd without momentum", why))
        return bad

    @property
    def averages(self) -> bool:
        return False

    def frozen(self, k: Key) -> bool:
        return k.adapter == CONTROL

    def bound(self, context: Context, p: Params) -> Params:
        return {}

    # server -----------------------------------------------------------------------------------------------------
    def init(self, context: Context) -> ServerState:
        x = super().init(context).params
        return ServerState(0, x | _named(CONTROL, {k: torch.zeros_like(v) for k, v in x.items()}), {"weights": {}})

    def keep(self, context: Context, client: Client) -> Params:
        x = super().init(context).params
        return super().keep(context, client) | _named(OWN, {k: torch.zeros_like(v) for k, v in x.items()})

    def aggregate(self, context: Context, server: ServerState, uploads: Iterable[Upload]) -> ServerState:
        before = dict(server.notes["weights"])
        known = dict(before)

        def seen() -> Iterable[tuple[Params, float]]:
            for u in uploads:
                known[u.client.id] = self.weight(u)
                yield u.params, self.weight(u)

        terms = list(seen())
        new = mean(terms)
        cohort, everybody = sum(w for _, w in terms), sum(known.values())
        for k in [k for k in new if k.adapter == CONTROL]:
            new[k] = (server.params[k] * sum(before.values()) + new[k] * cohort) / everybody
        return ServerState(server.round + 1, server.params | new, server.notes | {"weights": known})

    # client -----------------------------------------------------------------------------------------------------
    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        own = select(kept, lambda k: k.adapter == OWN)
        work = super().begin(context, info, down, select(kept, lambda k: k not in own))
        c = select(down, lambda k: k.adapter == CONTROL)
        received = select(work["train"], self.shared)
        clients = len(next(iter((down | kept).values())))
        rate = {RATE: torch.zeros(clients, dtype=torch.float64)}
        return work | {"c": c, "own": own, "received": received, "rate": rate}

    def step(self, work: Work, loss: Loss, lr: Tensor, *draws: Batch) -> tuple[Work, Metrics]:
        value, g = loss.gradient(lambda q: self.ready(q, work["fixed"]), work["train"], draws[0])
        g = clip(g, self.clip)
        for k in work["received"]:
            g[k] = g[k] - work["own"][_of(OWN, k)] + work["c"][_of(CONTROL, k)]
        assert isinstance(self.optimizer, SGD)
        rate = {RATE: work["rate"][RATE] + lr.to(work["rate"][RATE]) * self.optimizer.lr}
        return self.moved(work, g, lr) | {"rate": rate}, {"loss": value}

    def finish(self, work: Work) -> tuple[Params, Params]:
        up, kept = super().finish(work)
        rate = work["rate"][RATE]
        rate = torch.where(rate > 0, rate, 1.0)  # nobody has moved
        for k, x in work["received"].items():
            own, c = work["own"][_of(OWN, k)], work["c"][_of(CONTROL, k)]
            change = (x - work["train"][k]) / per_client(rate.to(x), x) - c
            up[_of(CONTROL, k)], kept[_of(OWN, k)] = change, own + change
        return up, kept

    def personal(self, context: Context, down: Params, kept: Params) -> Params:
        return super().personal(context, down, select(kept, lambda k: k.adapter != OWN))


def _of(adapter: str, k: Key) -> Key:
    """Where the control of a leaf stands; its part is none that a model takes for a delta."""
    return Key(adapter, k.layer, f"c{k.part}")


def _named(adapter: str, p: Params) -> Params:
    return {_of(adapter, k): v for k, v in p.items()}
