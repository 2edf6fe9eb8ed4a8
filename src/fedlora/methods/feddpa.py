"""FedDPA: a global and a local adapter, mixed when served (Yang et al., NeurIPS 2024, arXiv:2403.19211).

    global     FedAvg of both factors, trained alone on the base
    local      trained alone on the base, never sent
        FedDPA-F   after the federation: starts at the global adapter, takes `tune` steps
        FedDPA-T   during it: a step of the global adapter and a step of the local one, alternating, kept from round to round
    serve      W + mix s B_l A_l + (1 - mix) s B_g A_g

Choices: `mix` is one number for all inputs (the paper weighs each input by its likeness to the client's training data);
the head belongs to the global adapter's training; both adapters have one rank and one minibatch a step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from ..adapters import named
from ..errors import Problem
from ..model.adapted import Batch
from ..training.loss import Loss
from ..tree import Key, Params, select
from .contract import Client, Context, Method, Metrics, RoundInfo, Work
from .sgd import SGDMethod

LOCAL = "local"


@dataclass(frozen=True)
class Mixed(SGDMethod):
    """What both variants share. mix: weight of the local adapter in what is served, 0 to 1."""

    label: ClassVar[str] = "global"
    paper: ClassVar[str] = "arXiv:2403.19211"
    mix: float = 0.5

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if not 0 <= self.mix <= 1:
            bad.append(Problem("method.mix", self.mix, "a number in [0, 1]", "0.5 weighs both adapters alike"))
        if not self.form.low_rank:
            bad.append(
                Problem(
                    "method.adapter", self.adapter, f"{named(lambda f: f.low_rank)}: FedDPA mixes two low-rank products"
                )
            )
        return bad

    def trains(self, k: Key) -> bool:
        return True

    def shares(self, k: Key) -> bool:
        return k.adapter == self.label

    def ready(self, p: Params, fixed: Params) -> Params:
        """One adapter stands alone, two are mixed: the scale of B carries the weight."""
        if {k.adapter for k in p} >= {self.label, LOCAL}:
            share = {LOCAL: self.mix, self.label: 1 - self.mix}
            p = {k: v * share[k.adapter] if k.part == "B" else v for k, v in p.items()}
        return super().ready(p, fixed)


@dataclass(frozen=True)
class FedDPAT(Mixed):
    """The local adapter learns beside the global one."""

    name: ClassVar[str] = "feddpa-t"
    title: ClassVar[str] = "FedDPA-T"
    family: ClassVar[str] = "personal"

    def keep(self, context: Context, client: Client) -> Params:
        start = self.form.init(LOCAL, context.layers("target"), context.seed, client.id)
        return super().keep(context, client) | start

    def fresh(self, context: Context, client: Client) -> Params:
        """Without a local adapter of its own a client is served the global one alone, and not at the share 1 - mix."""
        return select(self.keep(context, client), lambda k: k.adapter.split("~")[0] != LOCAL)

    def step(self, work: Work, loss: Loss, lr: Tensor, *draws: Batch) -> tuple[Work, Metrics]:
        f = lambda p: self.ready(p, work["fixed"])  # noqa: E731
        p = work["train"]
        mine = select(p, lambda k: k.adapter == LOCAL)
        common = select(p, lambda k: k.adapter != LOCAL)
        head = select(p, lambda k: k.adapter == "head")
        value, g = loss.gradient(f, common, draws[0])
        _, g_local = loss.gradient(lambda q: f(q | head), mine, draws[0])
        return self.descend(work, g | g_local, lr), {"loss": value}


@dataclass(frozen=True)
class FedDPAF(Mixed):
    """HomLoRA; the local adapter is tuned from it afterwards, for `tune` steps."""

    name: ClassVar[str] = "feddpa-f"
    title: ClassVar[str] = "FedDPA-F"
    family: ClassVar[str] = "personal"
    tune: int = 10

    @property
    def tuner(self) -> Method:
        return _After(**{f.name: getattr(self, f.name) for f in fields(self)})


class _After(FedDPAF):
    """FedDPA-F's second phase: the global adapter and the head stand still."""

    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        p = down | kept
        mine = {k._replace(adapter=LOCAL): v for k, v in p.items() if k.adapter == self.label}
        work = super().begin(context, info, mine, {})
        return work | {"still": p}

    def step(self, work: Work, loss: Loss, lr: Tensor, *draws: Batch) -> tuple[Work, Metrics]:
        head = select(work["still"], lambda k: k.adapter == "head")
        value, g = loss.gradient(lambda q: self.ready(q | head, work["fixed"]), work["train"], draws[0])
        return self.descend(work, g, lr), {"loss": value}

    def served(self, work: Work) -> Params:
        return self.ready(work["train"] | work["still"], work["fixed"])
