"""VeRA (Kopiczko et al., arXiv:2310.11454): h = W0 x + diag(b) B diag(d) A x; A, B random, one pair for all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layers import Layer
from ..seeds import rng
from ..tree import Key, Params
from .base import Change, Form, Held, Parts, Pattern, rows


@dataclass(frozen=True)
class VeRA(Form):
    """d and b are trained; A and B are frozen, derived from the seed and never sent."""

    names: ClassVar[Mapping[str, str]] = {
        "vera": "dW = diag(b) B diag(d) A; A, B frozen, random, one pair for all layers, derived from the seed and never sent; "
        "d = 0.1, b = 0 (arXiv:2310.11454)"
    }
    shapes: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"A", "B", "d", "b"}),)
    leaves: ClassVar[frozenset[str]] = frozenset({"d", "b"})
    first: ClassVar[frozenset[str]] = frozenset({"d"})
    second: ClassVar[frozenset[str]] = frozenset({"b"})
    rank: int = 256
    d_initial: float = 0.1

    @classmethod
    def make(cls, name: str, rank: int, alpha: float, pattern: Pattern, field: str) -> VeRA:
        return cls(rank)

    def init(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        out: Params = {}
        for s in layers:
            out[Key(name, s.name, "d")] = torch.full((self.rank,), self.d_initial)
            out[Key(name, s.name, "b")] = torch.zeros(s.out)
        return out

    def fixed(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        """One pair for all layers, of the largest sizes; a smaller layer has the first columns of A and rows of B, as in PEFT."""
        out, in_ = max(s.out for s in layers), max(s.in_ for s in layers)
        a = (torch.rand(self.rank, in_, generator=rng(*seed, name, "A")) * 2 - 1) * (6 / in_) ** 0.5
        b = (torch.rand(out, self.rank, generator=rng(*seed, name, "B")) * 2 - 1) * (6 / self.rank) ** 0.5
        cut = lambda s: (("A", a[:, : s.in_]), ("B", b[: s.out]))  # noqa: E731
        return {Key(name, s.name, part): v for s in layers for part, v in cut(s)}

    @staticmethod
    def apply(x: Tensor, y: Tensor, p: Parts, module: Any) -> Tensor:
        k = len(p["d"])
        a, b = p["A"][0].to(x.dtype), p["B"][0].to(x.dtype)  # the same for all clients: derived from the seed
        h = (rows(x, k) @ a.mT) * p["d"].to(x.dtype)[:, None]
        return y + ((h @ b.mT) * p["b"].to(x.dtype)[:, None]).view_as(y)

    @classmethod
    def merge(cls, p: Parts, module: Any) -> Change:
        return Change(p["b"][:, None] * (p["B"] * p["d"]) @ p["A"])

    @classmethod
    def hold(cls, at: Mapping[str, Sequence[Parts]]) -> Held:
        """Our projections take the place of PEFT's, and are saved with the vectors."""
        leaves: dict[str, Tensor] = {}
        for layer, (p,) in at.items():
            leaves |= {f"{layer}.vera_lambda_{n}.default": p[n] for n in "db"}
        # PEFT's layers share one pair, which has the size of the largest layer on either side.
        widest = max(at, key=lambda layer: at[layer][0]["A"].shape[1])
        tallest = max(at, key=lambda layer: len(at[layer][0]["B"]))
        leaves[f"{widest}.vera_A.default"] = at[widest][0]["A"]
        leaves[f"{tallest}.vera_B.default"] = at[tallest][0]["B"]
        rank = len(next(iter(at.values()))[0]["d"])
        return Held("VeraConfig", {"r": rank, "save_projection": True}, leaves)
