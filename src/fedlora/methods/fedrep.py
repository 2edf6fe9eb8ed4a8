"""FedRep on adapters: a shared body under personal heads (Collins et al., ICML 2021, arXiv:2102.07078).

    train      the first `head_steps` steps of a round: the head alone;  the others: the adapter alone
    aggregate  mean of both factors; heads stay with their clients

A client with no more than `head_steps` steps in a round trains its head alone; a recipe that gives nobody more is refused.
FedPer (arXiv:1912.00818) trains both at once: that is `homlora` with a personal head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import ModelError, Problem
from ..model.adapted import Batch
from ..training.loss import Loss
from ..tree import Params, select
from .average import HomLoRA
from .contract import Context, Metrics, RoundInfo, ServerState, Work
from .sgd import Head

STEP = "step "  # starts the name of a group without leaves, which counts the steps: clients of a block step together


@dataclass(frozen=True)
class FedRep(HomLoRA):
    """Shared adapter, personal head, trained one after the other. head_steps: of a round, that train the head."""

    name: ClassVar[str] = "fedrep"
    title: ClassVar[str] = "FedRep"
    paper: ClassVar[str] = "arXiv:2102.07078"
    family: ClassVar[str] = "personal"
    head: Head = "personal"
    head_steps: int = 5

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if self.head != "personal":
            bad.append(Problem("method.head", self.head, "personal: FedRep's heads stay with their clients"))
        if self.head_steps < 0:
            bad.append(
                Problem("method.head_steps", self.head_steps, "an integer >= 0", "fewer than the steps of a round")
            )
        if self.moments == "keep":
            bad.append(
                Problem("method.moments", "keep", "reset", "the head's moments would end where the adapter's begin")
            )
        return bad

    @property
    def least_steps(self) -> int:
        return self.head_steps + 1

    def init(self, context: Context) -> ServerState:
        if not context.head:
            raise ModelError("FedRep: the model has no head of its own; it is for classifiers. Choose another method")
        return super().init(context)

    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        work = super().begin(context, info, down, kept)
        return work | {f"{STEP}0": {}}

    def step(self, work: Work, loss: Loss, lr: Tensor, *draws: Batch) -> tuple[Work, Metrics]:
        done = next(int(g.removeprefix(STEP)) for g in work if g.startswith(STEP))
        live = select(work["train"], lambda k: (k.adapter == "head") == (done < self.head_steps))
        still = {k: v for k, v in work["train"].items() if k not in live}
        if done in (0, self.head_steps):
            work = work | {"moments": work["moments"] | self.fresh_moments(live)}
        value, g = loss.gradient(lambda q: self.ready(q | still, work["fixed"]), live, draws[0])
        new = {n: p for n, p in self.descend(work, g, lr).items() if not n.startswith(STEP)}
        return new | {"moments": work["moments"] | new["moments"], f"{STEP}{done + 1}": {}}, {"loss": value}
