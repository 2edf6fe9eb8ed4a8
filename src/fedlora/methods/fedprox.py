"""FedProx on adapters (Li et al., MLSys 2020, arXiv:1812.06127): HomLoRA whose clients stay near what they received.

train   loss + mu / 2 ||theta - theta_received||^2,  theta: the shared leaves (adapter and shared head)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import Problem
from ..tree import Params, norm, select
from .average import HomLoRA
from .contract import Context, RoundInfo, Work


@dataclass(frozen=True)
class FedProx(HomLoRA):
    """FedAvg of both factors with a proximal term. mu: its weight; 0 is HomLoRA."""

    name: ClassVar[str] = "fedprox"
    title: ClassVar[str] = "FedProx"
    paper: ClassVar[str] = "arXiv:1812.06127"
    mu: float = 0.01

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if self.mu < 0:
            bad.append(Problem("method.mu", self.mu, "a number >= 0", "0.001 to 1 are in use"))
        return bad

    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        work = super().begin(context, info, down, kept)
        return work | {"received": select(work["train"], self.shared)}

    def penalty(self, work: Work, p: Params) -> Tensor | None:
        if self.mu == 0:
            return None
        return self.mu / 2 * torch.stack([norm(p[k] - v) ** 2 for k, v in work["received"].items()]).sum(0)
