"""LoRA-FAIR: FedIT whose server corrects one factor towards the mean product (Bian et al., ICCV 2025, arXiv:2411.14961).

    aggregate  Am, Bm: means;  W* = sum_k p_k B_k A_k
               D = argmin distance(W*, (Bm + D) Am) + penalty(D);   clients start from Am and Bm + D

    objective "ridge"    ||W* - (Bm + D) Am||^2 + mu ||D||^2:   D = (M - Bm G)(G + mu I)^-1,
                         G = Am Am^T,  M = sum_k p_k B_k (A_k Am^T);   r x r systems, no [out, in] product
    objective "cosine"   1 - cos(W*, (Bm + D) Am) + lam ||D||, the paper's, by Adam from D = 0 on the same small matrices

Choices: ridge is the default, since its minimum has a closed form; there mu = lam trace(G) / r, so that one lam serves layers of all
sizes. `side` corrects A likewise, or B and then A.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..adapters import named
from ..errors import Problem
from ..evaluation.analyses import gram_norm
from ..tree import mean
from .average import HomLoRA
from .contract import Context, ServerState, Upload


@dataclass(frozen=True)
class LoRAFAIR(HomLoRA):
    """FedAvg of both factors, then a correction of B. lam: weight of the penalty; server_steps, server_lr: of cosine's Adam."""

    name: ClassVar[str] = "lora-fair"
    title: ClassVar[str] = "LoRA-FAIR"
    paper: ClassVar[str] = "arXiv:2411.14961"
    lam: float = 0.01
    side: Literal["B", "A", "both"] = "B"
    objective: Literal["ridge", "cosine"] = "ridge"
    server_steps: int = 1000
    server_lr: float = 0.01

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if not self.form.low_rank:
            forms = named(lambda f: f.low_rank)
            bad.append(Problem("method.adapter", self.adapter, f"{forms}: LoRA-FAIR corrects a low-rank product"))
        if self.lam < 0:
            bad.append(Problem("method.lam", self.lam, "a number >= 0", "0.01 as in the paper"))
        if self.server_steps < 1:
            bad.append(Problem("method.server_steps", self.server_steps, "an integer >= 1"))
        if not self.server_lr > 0:
            bad.append(Problem("method.server_lr", self.server_lr, "a number > 0"))
        return bad

    @property
    def averages(self) -> bool:
        return False

    def aggregate(self, context: Context, server: ServerState, uploads: Iterable[Upload]) -> ServerState:
        seen = list(uploads)
        new = mean((u.params, self.weight(u)) for u in seen)
        p = torch.tensor([self.weight(u) for u in seen], dtype=torch.float64)
        for ka in [k for k in new if k.part == "A" and k.adapter == self.label]:
            kb, dtype = ka._replace(part="B"), new[ka].dtype
            b, a = new[kb].double(), new[ka].double()
            bs = torch.stack([u.params[kb] for u in seen]).double() * (p / p.sum())[:, None, None]
            as_ = torch.stack([u.params[ka] for u in seen]).double()
            if self.side != "A":
                b = b + self.correction(bs, as_, b, a)
            if self.side != "B":
                a = a + self.correction(as_.mT, bs.mT, a.mT, b.mT).mT
            new[kb], new[ka] = b.to(dtype), a.to(dtype)
        return ServerState(server.round + 1, server.params | new, server.notes)

    def correction(self, bs: Tensor, as_: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """D [o r] with (b + D) a near sum_k bs_k as_k; bs [K o r] or as_ [K r i] carries the weights."""
        g = a @ a.mT
        m = torch.einsum("kor,krs->os", bs, as_ @ a.mT)
        if self.objective == "ridge":
            mu = (self.lam * g.trace() / len(g)).clamp_min(torch.finfo(g.dtype).tiny)
            return torch.linalg.solve(g + mu * torch.eye(len(g), dtype=g.dtype), m - b @ g, left=False)
        size = gram_norm(bs.transpose(0, 1).flatten(1), as_.flatten(0, 1))  # of W*
        d = torch.zeros_like(b, requires_grad=True)
        optimizer = torch.optim.Adam([d], lr=self.server_lr)
        with torch.enable_grad():
            for _ in range(self.server_steps):
                v = b + d
                length = ((v.mT @ v) * g).sum().clamp_min(torch.finfo(g.dtype).tiny).sqrt()
                cosine = (m * v).sum() / (size * length).clamp_min(torch.finfo(g.dtype).tiny)
                (d.grad,) = torch.autograd.grad(1 - cosine + self.lam * torch.linalg.vector_norm(d), d)
                optimizer.step()
        return d.detach()
