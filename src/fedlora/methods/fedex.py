"""FedEx-LoRA: FedIT made exact by a residual on the base (Singhal et al., ACL 2025, arXiv:2410.09432).

    distribute  Am, Bm and the base's change (onbase.py)
    train       both factors, from Am and Bm
    aggregate   Am = sum_k p_k A_k,  Bm = sum_k p_k B_k,   W <- W + s (sum_k p_k B_k A_k - Bm Am)

The residual is sum_k p_k (B_k - Bm)(A_k - Am): K pairs of factors. Since their weighted sums are zero, K - 1 pairs hold it, and
its rank is at most (K - 1) r, one r less than the paper says. No [out, in] product is needed.

Choices: `residual="svd"` keeps its best `residual_rank` components, the paper's inexact form; clients go on from the mean,
which the paper found best.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import Problem
from ..tree import factor_product, mean
from .contract import Context, ServerState, Upload
from .onbase import BASE, OnBase, grown
from .sgd import MOST_RANK


@dataclass(frozen=True)
class FedExLoRA(OnBase):
    """FedAvg of both factors; what that misses of the mean product goes to the base. residual: whole, or its best part."""

    name: ClassVar[str] = "fedex"
    title: ClassVar[str] = "FedEx-LoRA"
    paper: ClassVar[str] = "arXiv:2410.09432"
    family: ClassVar[str] = "exact"
    residual: Literal["exact", "svd"] = "exact"
    residual_rank: int = 8

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if not 1 <= self.residual_rank <= MOST_RANK:
            bad.append(Problem("method.residual_rank", self.residual_rank, f"an integer from 1 to {MOST_RANK:,}"))
        return bad

    def aggregate(self, context: Context, server: ServerState, uploads: Iterable[Upload]) -> ServerState:
        seen = list(uploads)
        weights = [self.weight(u) for u in seen]
        new = mean(zip([u.params for u in seen], weights, strict=True))
        params = server.params | new
        roots = (torch.tensor(weights, dtype=torch.float64) / sum(weights)).sqrt()
        for k in new:
            if k.part == "A" and k.adapter != BASE and len(seen) > 1:
                kb = k._replace(part="B")
                b, a = residual([u.params[kb] for u in seen], [u.params[k] for u in seen], roots)
                if self.residual == "svd":
                    b, a = factor_product(b, a, self.residual_rank, "B")
                params = grown(params, k.layer, b * self.form.scale_at(k.layer), a)  # type: ignore[attr-defined]
        return ServerState(server.round + 1, params, server.notes)


def residual(bs: list[Tensor], as_: list[Tensor], roots: Tensor) -> tuple[Tensor, Tensor]:
    """X [o (K-1)r], Y [(K-1)r i] with X Y = sum_k p_k (B_k - Bm)(A_k - Am), roots = sqrt p [K] in float64.

    X_k = sqrt(p_k) (B_k - Bm) and Y_k likewise have sum_k sqrt(p_k) X_k = 0. So nothing of X Y lies along sqrt p, and an
    orthonormal basis of the K - 1 other directions holds it all.
    """
    turn = torch.linalg.qr(roots[:, None], mode="complete").Q[:, 1:]  # [K K-1]
    b, a = torch.stack(bs).double(), torch.stack(as_).double()
    p = roots.square()[:, None, None]
    x, y = b - (p * b).sum(0), a - (p * a).sum(0)
    weighted = turn * roots[:, None]
    left = torch.einsum("kor,kj->ojr", x, weighted).flatten(1)
    right = torch.einsum("kri,kj->jri", y, weighted).flatten(0, 1)
    return left.to(bs[0].dtype), right.to(as_[0].dtype)
