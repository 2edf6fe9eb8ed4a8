"""FedSVD: FFA-LoRA whose A follows what B has learned (Lee et al., NeurIPS 2025, arXiv:2505.12805).

    train      B alone; A as received
    aggregate  B = sum_k p_k B_k, exact since A is common
    refactor   every `svd_period` rounds after the first `svd_warmup`:  B A = U S V^T,  B <- U_r S_r,  A <- V_r^T

B A is never formed. A = L Q by QR, B L = U S T^T is an SVD of [out, r], and then B <- U S, A <- T^T Q. Once A's rows are
orthonormal, L is the identity.

Choices: signs are fixed (the largest entry of each column of B is positive), or a resumed run would differ; moments start anew
each round, since the axes of B have turned; the head is trained (`head`; the official code freezes it). There alpha = r and
plain SGD with a rate of 0.5 are used: with orthonormal A the gradient of B is as large as that of the weight itself, so the rates
of FFA-LoRA do not suit. svd_period 0 never refactors, which is FFA-LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..adapters import named
from ..errors import Problem
from ..tree import Key, factor
from .contract import Context, ServerState, Upload
from .halves import Halves


@dataclass(frozen=True)
class FedSVD(Halves):
    """Train and average B; the server turns A to the principal directions of B A. svd_period, svd_warmup: when, in rounds."""

    name: ClassVar[str] = "fedsvd"
    title: ClassVar[str] = "FedSVD"
    paper: ClassVar[str] = "arXiv:2505.12805"
    family: ClassVar[str] = "exact"
    svd_period: int = 1
    svd_warmup: int = 0

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if not self.form.low_rank:
            forms = named(lambda f: f.low_rank)
            bad.append(Problem("method.adapter", self.adapter, f"{forms}: FedSVD decomposes a low-rank product"))
        if self.svd_period < 0:
            bad.append(Problem("method.svd_period", self.svd_period, "an integer >= 0", "0 never, 1 after every round"))
        if self.svd_warmup < 0:
            bad.append(Problem("method.svd_warmup", self.svd_warmup, "an integer >= 0"))
        return bad

    def live(self, k: Key, round: int) -> bool:
        return k.part == "B"

    def due(self, rounds: int) -> bool:
        """Whether the server refactors after so many rounds."""
        past = rounds - self.svd_warmup
        return self.svd_period > 0 and past > 0 and past % self.svd_period == 0

    def aggregate(self, context: Context, server: ServerState, uploads: Iterable[Upload]) -> ServerState:
        new = super().aggregate(context, server, uploads)
        if not self.due(new.round):
            return new
        params = dict(new.params)
        for k, a in new.params.items():
            if k.part == "A":
                kb = k._replace(part="B")
                params[kb], params[k] = refactored(params[kb], a)
        return replace(new, params=params)


def refactored(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(U S, V^T) of b @ a, b [o r], a [r i], with V^T's rows orthonormal even where b has a smaller rank."""
    q, upper = torch.linalg.qr(a.mT)  # a = upper^T q^T
    left, turn = factor(b @ upper.mT, a.shape[0], "B")
    return left, turn @ q.mT
