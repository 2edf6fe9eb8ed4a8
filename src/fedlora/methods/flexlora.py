"""FlexLoRA: average the products, not the factors (Bai et al., 2024, arXiv:2402.11505). "Reconstruct + SVD" in HetLoRA's paper.

    distribute  client k receives the best rank-r_k factors of dW
    train       SGD or AdamW on A_k, B_k
    aggregate   dW = sum_k p_k B_k A_k, exact; kept as its best rank-r_max factors

dW is never formed: the clients' factors are stacked, [sqrt(p_1) B_1 ...] and [sqrt(p_1) A_1; ...], and an SVD of the small
core between their QRs gives the factors. Choices: one scale alpha / r_max for all ranks; the singular values lie on B
(`split="B"`) or half on each side ("sqrt"). While the products have fewer components than r_max, the rest is as at the
start: B = 0 and a drawn A, so that it can learn.

With the paper's rule a client counts as zero in the components that it does not hold. So these shrink from round to round, even if
clients send back what they received. `padding` says what it counts as there:
    zero      as in the paper
    server    what the server has: dW + sum_k p_k (B_k A_k - what client k received), differences of products
    holders   nothing: component i has weights p_k / P_i, P_i the sum over the clients that hold it (raFLoRA, arXiv:2602.13486)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..adapters import named
from ..errors import Problem
from ..tree import Key, Params, factor_product
from .contract import Context, ServerState, Upload
from .ranks import Ranked, Stacked, stacked


@dataclass(frozen=True)
class FlexLoRA(Ranked):
    """The mean of the products, cut to each client's rank by an SVD. rank, rank_min, plan, exponent, ranks: see ranks.py."""

    name: ClassVar[str] = "flexlora"
    title: ClassVar[str] = "FlexLoRA"
    paper: ClassVar[str] = "arXiv:2402.11505"
    family: ClassVar[str] = "ranks"
    split: Literal["B", "sqrt"] = "B"
    padding: Literal["zero", "server", "holders"] = "zero"

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if not self.form.low_rank:
            bad.append(
                Problem(
                    "method.adapter",
                    self.adapter,
                    f"{named(lambda f: f.low_rank)}: FlexLoRA decomposes a low-rank product",
                )
            )
        return bad

    @property
    def collapses(self) -> bool:
        return self.padding == "zero"

    def trains(self, k: Key) -> bool:
        return k.part != "rank"

    def shares(self, k: Key) -> bool:
        return True

    def aggregate(self, context: Context, server: ServerState, uploads: Iterable[Upload]) -> ServerState:
        new, products = stacked(uploads, self.weight)
        for layer, found in products.items():
            new |= self.factors(server, layer, *self.padded(server, layer, found))
        return ServerState(server.round + 1, server.params | new, server.notes)

    def padded(self, server: ServerState, layer: str, found: Stacked) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors of the mean product, with what stands for components that some clients do not hold."""
        b, a = found.b, found.a
        own_b, own_a = (server.params[Key(self.label, layer, part)] for part in ("B", "A"))
        held = found.held(self.rank)
        if self.padding == "zero" or bool((held == 1).all()):
            return b, a
        if self.padding == "holders":
            b = b / held[found.component].to(b)
        rest = ((1 - held) if self.padding == "server" else (held == 0))[: own_b.shape[1]].to(b)
        return torch.cat([b, own_b * rest], 1), torch.cat([a, own_a])

    def factors(self, server: ServerState, layer: str, b: torch.Tensor, a: torch.Tensor) -> Params:
        """The best r_max components of b @ a, filled up where there are fewer."""
        key_b, key_a = Key(self.label, layer, "B"), Key(self.label, layer, "A")
        b, a = factor_product(b, a, self.rank, self.split)
        found = b.shape[1]
        full_b, full_a = torch.zeros_like(server.params[key_b]), server.params[key_a].clone()
        full_b[:, :found], full_a[:found] = b, a
        return {key_b: full_b, key_a: full_a}
