"""Adapters by name: which leaves they have, how they start and how they scale.

`first` is the half that FedSA-LoRA shares and `second` the half it keeps (A and B; for VeRA d and b).

    lora     s = alpha / r; A ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform, a = sqrt 5, as PEFT), B = 0
    rslora   s = alpha / sqrt(r)                                     (arXiv:2312.03732)
    vera     dW = diag(b) B diag(d) A; A, B frozen, random, one pair for all layers, derived from the seed and never
             sent; d = 0.1, b = 0                                    (arXiv:2310.11454)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from .errors import ModelError
from .model import Site
from .seeds import rng
from .tree import Key, Params

AdapterName = Literal["lora", "rslora", "vera"]
NAMES: tuple[str, ...] = get_args(AdapterName)


class Adapter(ABC):
    """One delta form with its start and its scale."""

    first: ClassVar[frozenset[str]]
    second: ClassVar[frozenset[str]]
    group: ClassVar[str] = "target"  # the model's sites it lives on

    @abstractmethod
    def init(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        """Trainable leaves of adapter `name` at the start: the delta is zero."""

    def fixed(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        """Frozen leaves that every party derives from the seed; never sent, never stored."""
        return {}

    def view(self, p: Params) -> Params:
        """Leaves as the model takes them, scaled."""
        return p


@dataclass(frozen=True)
class LoRA(Adapter):
    """h = W0 x + s B (A x)."""

    first: ClassVar[frozenset[str]] = frozenset({"A"})
    second: ClassVar[frozenset[str]] = frozenset({"B"})
    rank: int = 8
    scale: float = 2.0

    def init(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        out: Params = {}
        for s in sites:
            a = torch.rand(self.rank, s.in_, generator=rng(*seed, name, s.name))
            out[Key(name, s.name, "A")] = (a * 2 - 1) * s.in_**-0.5
            out[Key(name, s.name, "B")] = torch.zeros(s.out, self.rank)
        return out

    def view(self, p: Params) -> Params:
        return {k: v * self.scale if k.part == "B" else v for k, v in p.items()}


@dataclass(frozen=True)
class VeRA(Adapter):
    """h = W0 x + diag(b) B diag(d) A x."""

    first: ClassVar[frozenset[str]] = frozenset({"d"})
    second: ClassVar[frozenset[str]] = frozenset({"b"})
    rank: int = 256
    d_initial: float = 0.1

    def init(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        out: Params = {}
        for s in sites:
            out[Key(name, s.name, "d")] = torch.full((self.rank,), self.d_initial)
            out[Key(name, s.name, "b")] = torch.zeros(s.out)
        return out

    def fixed(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        shapes = {(s.out, s.in_) for s in sites}
        if len(shapes) > 1:
            raise ModelError(
                f"VeRA: target layers have shapes {sorted(shapes)} (out, in), expected one shape because A and B are "
                "shared over layers; choose model.targets of equal shape, e.g. [query, value]"
            )
        [(out, in_)] = shapes
        a = (torch.rand(self.rank, in_, generator=rng(*seed, name, "A")) * 2 - 1) * (6 / in_) ** 0.5
        b = (torch.rand(out, self.rank, generator=rng(*seed, name, "B")) * 2 - 1) * (6 / self.rank) ** 0.5
        return {Key(name, s.name, part): v for s in sites for part, v in (("A", a), ("B", b))}


def make(name: str, rank: int, alpha: float) -> Adapter:
    """The adapter called `name` at this rank; alpha is LoRA's, VeRA has none."""
    if name == "vera":
        return VeRA(rank)
    return LoRA(rank, alpha / rank**0.5 if name == "rslora" else alpha / rank)


def init_head(head: Sequence[Site]) -> Params:
    """The task head as a dense delta on the seeded base head, at zero."""
    out: Params = {}
    for s in head:
        out[Key("head", s.name, "weight")] = torch.zeros(s.out, s.in_)
        if s.bias:
            out[Key("head", s.name, "bias")] = torch.zeros(s.out)
    return out
