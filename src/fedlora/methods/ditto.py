"""Ditto on adapters: a personal model that stays near the shared one (Li et al., ICML 2021, arXiv:2012.04221, algorithm 1).

    shared     x: FedAvg of both factors and the head
    personal   v_k <- v_k - lr (grad F_k(v_k) + lam (v_k - x)),  x as received;  as many steps, kept from round to round
    serve      v_k

lam = 0 is Local-only; a large lam is FedAvg. Choices: a step of x and a step of v_k take the same minibatch; v_k starts where x does;
gradients of the two are clipped apart; a client that has never trained is served x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import Problem
from ..model.adapted import Batch
from ..training.loss import Loss
from ..training.optimizers import clip
from ..tree import Key, Params, select
from .average import HomLoRA
from .contract import Client, Context, Metrics, RoundInfo, Work

OWN = "own-"  # starts the names of a client's own adapters


@dataclass(frozen=True)
class Ditto(HomLoRA):
    """FedAvg beside a personal adapter and head that are pulled to it. lam: how much."""

    name: ClassVar[str] = "ditto"
    title: ClassVar[str] = "Ditto"
    paper: ClassVar[str] = "arXiv:2012.04221"
    family: ClassVar[str] = "personal"
    lam: float = 0.1

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if self.lam < 0:
            bad.append(Problem("method.lam", self.lam, "a number >= 0", "0.1 to 1 are in use"))
        return bad

    def shares(self, k: Key) -> bool:
        return not k.adapter.startswith(OWN)

    def keep(self, context: Context, client: Client) -> Params:
        return super().keep(context, client) | _own(self.start(context))

    def fresh(self, context: Context, client: Client) -> Params:
        return select(self.keep(context, client), lambda k: not k.adapter.startswith(OWN))

    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        work = super().begin(context, info, down, kept)
        return work | {"received": _own(select(work["train"], self.shared))}

    def ready(self, p: Params, fixed: Params) -> Params:
        """The personal model where there is one."""
        own = {k._replace(adapter=k.adapter.removeprefix(OWN)): v for k, v in p.items() if k.adapter.startswith(OWN)}
        return super().ready(own or p, fixed)

    def step(self, work: Work, loss: Loss, lr: Tensor, *draws: Batch) -> tuple[Work, Metrics]:
        f = lambda p: self.ready(p, work["fixed"])  # noqa: E731
        x = select(work["train"], lambda k: not k.adapter.startswith(OWN))
        v = select(work["train"], lambda k: k.adapter.startswith(OWN))
        value, g = loss.gradient(f, x, draws[0])
        _, own = loss.gradient(f, v, draws[0])
        for k, received in work["received"].items():
            own[k] = own[k] + self.lam * (v[k] - received)
        return self.moved(work, clip(g, self.clip) | clip(own, self.clip), lr), {"loss": value}


def _own(p: Params) -> Params:
    return {k._replace(adapter=OWN + k.adapter): v for k, v in p.items()}
