"""Bottleneck adapters: Houlsby (arXiv:1902.00751) after attention and feed-forward, Pfeiffer (arXiv:2005.00247) after the latter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layers import Layer
from ..seeds import rng
from ..tree import Key, Params
from .base import Form, Parts, Pattern, rows


@dataclass(frozen=True)
class Bottleneck(Form):
    """h + U relu(D h + d) + u after a sublayer's output projection, U = 0 at the start. `rank` is the bottleneck's size."""

    names: ClassVar[Mapping[str, str]] = {
        "houlsby": "a bottleneck of `rank` after attention and after FFN (arXiv:1902.00751); hidden / 16 is usual",
        "pfeiffer": "a bottleneck of `rank` after FFN (arXiv:2005.00247)",
    }
    shapes: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"down", "up", "down_bias", "up_bias"}),)
    no_merge: ClassVar[str] = "the bottleneck is a layer of its own and cannot be merged; export lora or bitfit"
    no_peft: ClassVar[str] = "the bottleneck is a layer of its own, and PEFT cannot hold it; export lora or bitfit"
    size: int = 24
    groups: tuple[str, ...] = ("outputs",)

    @classmethod
    def make(cls, name: str, rank: int, alpha: float, pattern: Pattern, field: str) -> Bottleneck:
        return cls(rank, ("outputs",) if name == "houlsby" else ("ffn_output",))

    def init(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        out: Params = {}
        for s in layers:
            down = torch.rand(self.size, s.out, generator=rng(*seed, name, s.name))
            out[Key(name, s.name, "down")] = (down * 2 - 1) * s.out**-0.5
            out[Key(name, s.name, "up")] = torch.zeros(s.out, self.size)
            out[Key(name, s.name, "down_bias")] = torch.zeros(self.size)
            out[Key(name, s.name, "up_bias")] = torch.zeros(s.out)
        return out

    @staticmethod
    def apply(x: Tensor, y: Tensor, p: Parts, module: Any) -> Tensor:
        down, up = p["down"].to(y.dtype), p["up"].to(y.dtype)
        out = rows(y, len(down))
        h = torch.baddbmm(p["down_bias"].to(y.dtype)[:, None], out, down.mT).relu()
        return (out + torch.baddbmm(p["up_bias"].to(y.dtype)[:, None], h, up.mT)).view_as(y)
