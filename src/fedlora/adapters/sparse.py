"""Sparse deltas (SLoRA, arXiv:2308.06522): a seeded random share of the entries of each layer. The methods slora and sft have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layers import Layer, base_weight
from ..seeds import rng
from ..tree import Key, Params
from .base import Change, Densities, Form, Parts, all_match, matches, rows


@lru_cache(maxsize=1024)
def _positions(n: int, size: int, *path: object) -> Tensor:
    return torch.randperm(size, generator=rng("mask", *path))[:n].sort().values


@dataclass(frozen=True)
class Sparse(Form):
    """Values at positions that every party derives from the seed: density * out * in of each layer."""

    shapes: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"values", "index"}),)
    leaves: ClassVar[frozenset[str]] = frozenset({"values"})
    no_peft: ClassVar[str] = "scattered entries are no low-rank product, so PEFT's LoRA cannot hold them; use --merged"
    density: float = 0.01
    groups: tuple[str, ...] = ("target",)
    pattern: Densities = ()

    def count(self, s: Layer) -> int:
        """Entries trained at layer s: the density of the first pattern that matches it, else `density`."""
        density = next((d for name, d in self.pattern if matches(name, s.name)), self.density)
        return max(1, round(density * s.out * s.in_))

    def positions(self, name: str, s: Layer, *seed: object) -> Tensor:
        """Flat positions trained at layer s, ascending int64 [n]. Random, independent of data, fixed for the run."""
        return _positions(self.count(s), s.out * s.in_, *seed, s.name)

    def init(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        all_match("method.density_pattern", self.pattern, layers)
        return {Key(name, s.name, "values"): torch.zeros(self.count(s)) for s in layers}

    def fixed(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        return {Key(name, s.name, "index"): self.positions(name, s, *seed) for s in layers}

    @staticmethod
    def apply(x: Tensor, y: Tensor, p: Parts, module: Any) -> Tensor:
        values = p["values"].to(x.dtype)
        k, o, i = len(values), y.shape[-1], x.shape[-1]
        w = torch.zeros(k, o * i, dtype=x.dtype, device=x.device).index_copy(1, p["index"][0], values).view(k, o, i)
        return torch.baddbmm(rows(y, k), rows(x, k), w.mT).view_as(y)

    @classmethod
    def merge(cls, p: Parts, module: Any) -> Change:
        flat = torch.zeros(module.weight.numel(), dtype=p["values"].dtype)
        return Change(flat.index_copy(0, p["index"], p["values"]).view(base_weight(module).shape))
