"""Per-FedAvg on adapters (Fallah et al., NeurIPS 2020, arXiv:2002.07948): learn a start from which one step personalises.

    F_k(x) = f_k(x - a grad f_k(x))                                     MAML's objective
    train      g = grad f(x - a grad f(x; pi); xi)
               h = g - a H(x; zeta) g,   H g = d/dx <grad f(x; zeta), g>  (Hessian-vector form; first-order: h = g)
               x <- optimiser(x, h)
    aggregate  leafwise mean
    serve      x - a grad f_k(x): one personal step on the client's own data (`tune` of them)

Choices: a is constant over the run, so that the objective is, while the outer step follows the schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..errors import Problem
from ..model.adapted import Batch
from ..training.loss import Loss
from ..training.optimizers import SGD
from .average import HomLoRA
from .contract import Method, Metrics, Work
from .sgd import SGDMethod


@dataclass(frozen=True)
class PerFedAvg(HomLoRA):
    """MAML over clients. lr_personal: a. hypergradient: exact (Hessian-vector product) or first_order (drops it)."""

    name: ClassVar[str] = "perfedavg"
    title: ClassVar[str] = "Per-FedAvg-LoRA"
    paper: ClassVar[str] = "arXiv:2002.07948"
    family: ClassVar[str] = "personal"
    lr_personal: float = 0.01
    hypergradient: Literal["exact", "first_order"] = "exact"
    tune: int = 1

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if self.lr_personal < 0:
            bad.append(Problem("method.lr_personal", self.lr_personal, "a number >= 0"))
        return bad

    @property
    def draws(self) -> int:
        return 3 if self.second_order else 2

    @property
    def second_order(self) -> bool:
        return self.hypergradient == "exact"

    @property
    def tuner(self) -> Method:
        """Plain gradient steps of size a."""
        common: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(SGDMethod) if f.name != "tune"}
        return HomLoRA(**common | {"optimizer": SGD(self.lr_personal), "moments": "reset", "clip": None})

    def step(self, work: Work, loss: Loss, lr: Tensor, *draws: Batch) -> tuple[Work, Metrics]:
        x, a = work["train"], self.lr_personal
        f = lambda p: self.ready(p, work["fixed"])  # noqa: E731
        _, inner = loss.gradient(f, x, draws[0])
        moved = {k: v - a * inner[k] for k, v in x.items()}
        value, g = loss.gradient(f, moved, draws[1])
        if self.second_order:
            hg = loss.hessian_vector(f, x, g, draws[2])
            g = {k: v - a * hg[k] for k, v in g.items()}
        return self.descend(work, self.penalised(work, g), lr), {"loss": value}
