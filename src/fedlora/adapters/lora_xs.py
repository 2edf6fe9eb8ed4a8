"""LoRA-XS (Balazy et al., arXiv:2405.17604): dW = s B R A with A and B fixed and only R [r r] trained.

A [r i] has orthonormal rows and B [o r] orthonormal columns, so the gradient with respect to R is s B^T G A^T for the gradient G of the
weight, and no larger than s G. They never travel: the principal directions of the base's weight, as in the paper, or random
ones from the seed. Choices: the paper puts the singular values into B, Fed-SB (arXiv:2502.15436) has both sides orthonormal, as
here; R = 0 at the start (theirs is normal with a deviation of 1e-5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from ..layers import Layer
from ..seeds import rng
from ..tree import Key, Params
from .base import Pattern, all_match, zeros
from .lora import LoRA
from .pissa import principal


@lru_cache(maxsize=1024)
def orthonormal(rows: int, columns: int, *path: object) -> Tensor:
    """A random matrix with orthonormal columns."""
    drawn = torch.randn(rows, columns, generator=rng(*path), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q.float()


@dataclass(frozen=True)
class LoRAXS(LoRA):
    """R is trained, 0 at the start. `view` makes it a plain low-rank delta of rank r: B R and A."""

    names: ClassVar[Mapping[str, str]] = {
        "lora-xs": "s B R A, R [r r] trained; A and B are the r principal directions of W0, derived from the base and never "
        "sent; R = 0 (arXiv:2405.17604)",
        "lora-xs-random": "the same with random orthonormal A and B, derived from the seed (arXiv:2405.17604)",
    }
    shapes: ClassVar[tuple[frozenset[str], ...]] = ()  # none of its own: the delta reaches the model as LoRA's
    leaves: ClassVar[frozenset[str]] = frozenset({"R"})
    low_rank: ClassVar[bool] = False  # its own leaf is a core, no factor
    first: ClassVar[frozenset[str]] = frozenset()
    second: ClassVar[frozenset[str]] = frozenset()
    random: bool = False

    @classmethod
    def make(cls, name: str, rank: int, alpha: float, pattern: Pattern, field: str) -> LoRAXS:
        return cls(rank, alpha, False, pattern, field, random=name == "lora-xs-random")

    def init(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        all_match(self.field, self.pattern, layers)
        keys = {Key(name, s.name, "R"): self.rank_at(s.name) for s in layers}
        return {k: zeros(k, r, r) for k, r in keys.items()}

    def fixed(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        out: Params = {}
        for s in layers:
            r = self.rank_at(s.name)
            if self.random:
                b, a = (orthonormal(n, r, *seed, name, s.name, side) for n, side in ((s.out, "B"), (s.in_, "A")))
                a = a.mT
            else:
                b, a = principal(s, r)  # with the roots of the singular values on both sides
                b, a = b / b.norm(dim=0), a / a.norm(dim=1, keepdim=True)
            out[Key(name, s.name, "B0")], out[Key(name, s.name, "A0")] = b, a
        return out

    def view(self, p: Params) -> Params:
        out: Params = {}
        for k, v in p.items():
            if k.part == "R":
                out[k._replace(part="A")] = p[k._replace(part="A0")]
                out[k._replace(part="B")] = self.scale_at(k.layer) * p[k._replace(part="B0")] @ v
            elif k.part not in ("A0", "B0"):
                out[k] = v
        return out
