"""FLoRIST: FlexLoRA whose rank follows the spectrum (Ramesh and Dass, MLSys 2026, arXiv:2506.09199).

    aggregate   dW = sum_k p_k B_k A_k = U S V^T from the small core of the stacked factors, never formed
                q = the least rank with  sum_{i <= q} S_i >= tau sum_i S_i,  for each layer;   B = U_q S_q,  A = V_q^T
    distribute  the leading min(q, r_k) components

Choices: `energy` is the sum of singular values or of their squares, which differ much (for a true rank of 8 with drift, tau = 0.9
keeps 22 or 7 of 48); q is at most r_max; a client goes on from what it received, and fills up to its own rank with the
seeded start: B = 0 and a drawn A, which do not travel. `fedlora check` announces messages of the first round, whose rank is r_max.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import Problem
from ..tree import Key, Params, factor_product, pad_rank, rank
from .contract import Context, RoundInfo, ServerState, Work
from .flexlora import FlexLoRA


@dataclass(frozen=True)
class FLoRIST(FlexLoRA):
    """The mean of the products, cut where its spectrum has given the share tau. energy: of singular values or their squares."""

    name: ClassVar[str] = "florist"
    title: ClassVar[str] = "FLoRIST"
    paper: ClassVar[str] = "arXiv:2506.09199"
    tau: float = 0.95
    energy: Literal["sum", "squares"] = "sum"

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if not 0 < self.tau <= 1:
            bad.append(Problem("method.tau", self.tau, "a number in (0, 1]", "0.9, 0.95 and 0.99 are in use"))
        if self.moments == "keep":
            bad.append(Problem("method.moments", "keep", "reset", "what a component stands for changes in each round"))
        return bad

    @property
    def anew(self) -> bool:
        return True

    def factors(self, server: ServerState, layer: str, b: Tensor, a: Tensor) -> Params:
        b, a = factor_product(b, a, min(b.shape[0], a.shape[1]), "B")
        s = b.norm(dim=0)
        q = self.kept(s)
        b, a, s = b[:, :q], a[:q], s[:q]
        if self.split == "sqrt":
            root = s.sqrt().clamp_min(torch.finfo(s.dtype).tiny)
            b, a = b / root, a * root[:, None]
        return {Key(self.label, layer, "B"): b.contiguous(), Key(self.label, layer, "A"): a.contiguous()}

    def kept(self, s: Tensor) -> int:
        """q for singular values s, descending."""
        e = (s if self.energy == "sum" else s.square()).double()
        short = e.cumsum(0) < self.tau * e.sum() * (1 - 1e-12)  # where the sum of all is short of itself by rounding
        return min(int(short.sum()) + 1, self.rank)

    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        ranks = down[Key(self.label, "", "rank")]
        most, start = self.rank, self.start(context)
        full = dict(down)
        for k, v in down.items():
            if rank(k, v) and rank(k, v) < most:
                full[k] = v = pad_rank(k, v, most)
                if k.part == "A":
                    rows = torch.arange(most, device=v.device)
                    new = (rows >= rank(k, down[k])) & (rows < ranks.to(v.device)[:, None])  # [K r]
                    full[k] = torch.where(new[:, :, None], start[k][:most].to(v), v)
        return super().begin(context, info, full, kept)
