"""Two low-rank products that a router weighs token by token (FedALT, arXiv:2503.11880). The method fedalt has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layers import Layer
from ..tree import Key, Params
from .base import Parts, rows, uniform
from .factors import Factored


@dataclass(frozen=True)
class Routed(Factored):
    """y + a_1(x) B A x + a_0(x) B_rest A_rest x,  (a_1, a_0) = softmax(gate x), gate [2 i]."""

    shapes: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"A", "B", "A_rest", "B_rest", "gate"}),)
    leaves: ClassVar[frozenset[str]] = frozenset({"A", "B", "gate"})
    no_merge: ClassVar[str] = "its router weighs each token anew, and a weight of the base cannot"
    no_peft: ClassVar[str] = "its router weighs each token anew, and PEFT cannot hold it"

    def init(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        gates = {Key(name, s.name, "gate"): uniform(2, s.in_, *seed, name, s.name, "gate") for s in layers}
        return super().init(name, layers, *seed) | gates

    def view(self, p: Params) -> Params:
        return {k: v * self.scale_at(k.layer) if k.part in ("B", "B_rest") else v for k, v in p.items()}

    @staticmethod
    def apply(x: Tensor, y: Tensor, p: Parts, module: Any) -> Tensor:
        p = {n: v.to(x.dtype) for n, v in p.items()}
        each = rows(x, len(p["A"]))  # [K T i]
        weight = torch.softmax(torch.bmm(each, p["gate"].mT), -1)  # [K T 2]
        own = torch.bmm(torch.bmm(each, p["A"].mT), p["B"].mT)
        rest = torch.bmm(torch.bmm(each, p["A_rest"].mT), p["B_rest"].mT)
        return y + (weight[..., :1] * own + weight[..., 1:] * rest).view_as(y)
