"""Adapters by name: which leaves they have, how they start and how they scale.

`first` is the half that FedSA-LoRA shares and `second` the half it keeps (A and B; for VeRA d and b; for DoRA A, and B with m).

    lora     s = alpha / r; A ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform, a = sqrt 5, as PEFT), B = 0
    rslora   s = alpha / sqrt(r)                                     (arXiv:2312.03732)
    dora     W = (|W0| + m) (W0 + s B A) / |W0 + s B A|, norms of rows; m = 0 (arXiv:2402.09353)
    vera     dW = diag(b) B diag(d) A; A, B frozen, random, one pair for all layers, derived from the seed and never
             sent; d = 0.1, b = 0                                    (arXiv:2310.11454)
    bitfit   every bias                                              (arXiv:2106.10199)
    houlsby  a bottleneck of `rank` after attention and after FFN    (arXiv:1902.00751); hidden / 16 is usual
    pfeiffer a bottleneck of `rank` after FFN                        (arXiv:2005.00247)
    full     every parameter of the base
    sparse   a seeded random share of the entries of each layer      (SLoRA, arXiv:2308.06522); see methods/slora.py

The last five have no halves: rules that share one half refuse them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from .errors import ModelError, Problem
from .model import Site
from .seeds import rng
from .tree import Key, Params

AdapterName = Literal["lora", "rslora", "dora", "vera", "bitfit", "houlsby", "pfeiffer", "full"]
NAMES: tuple[str, ...] = get_args(AdapterName)
LOW_RANK = ("lora", "rslora")  # whose delta is s B A and nothing else


Pattern = tuple[tuple[str, int], ...]  # (end of a layer's name or regular expression, rank), as PEFT's rank_pattern
Densities = tuple[tuple[str, float], ...]  # the same with densities


class Adapter(ABC):
    """One delta form with its start and its scale."""

    first: ClassVar[frozenset[str]] = frozenset()
    second: ClassVar[frozenset[str]] = frozenset()
    group: str = "target"  # the model's sites it lives on (sites.py)

    @abstractmethod
    def init(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        """Trainable leaves of adapter `name` at the start: the delta is zero."""

    def fixed(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        """Frozen leaves that every party derives from the seed; never sent, never stored."""
        return {}

    def view(self, p: Params) -> Params:
        """Leaves as the model takes them, scaled."""
        return p


@lru_cache(maxsize=1024)
def _uniform(r: int, in_: int, *path: object) -> Tensor:
    """A at its start, [r i]. Kept: every client of a round asks for it, and nothing writes into leaves."""
    return (torch.rand(r, in_, generator=rng(*path)) * 2 - 1) * in_**-0.5


@lru_cache(maxsize=1024)
def _zeros(out: int, r: int, site: Key) -> Tensor:
    """B at its start, [o r]; kept likewise, one for each leaf: a file cannot hold two names of one memory."""
    return torch.zeros(out, r)


def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _matches(pattern: str, site: str) -> bool:
    return _expression(pattern).match(site) is not None


def pattern_problems(
    field: str, patterns: Iterable[tuple[str, float]], good: Callable[[float], bool], expected: str
) -> list[Problem]:
    """What is wrong with a pattern field on its own: values that are not good, and what is no regular expression."""
    bad = []
    for pattern, value in patterns:
        if not good(value):
            bad.append(Problem(field, f"{pattern}: {value}", expected))
        try:
            _expression(pattern)
        except re.error as e:
            bad.append(Problem(field, pattern, "the end of a layer's name, or a regular expression", e.msg))
    return bad


def _all_match(field: str, patterns: Iterable[tuple[str, object]], sites: Sequence[Site]) -> None:
    """Raise ModelError for a pattern that names no site."""
    for pattern, _ in patterns:
        if not any(_matches(pattern, s.name) for s in sites):
            raise ModelError(
                f"{field}: {pattern!r} matches none of the {len(sites)} target layers, e.g. {sites[0].name!r}; "
                "write the end of a layer's name, e.g. query, or a regular expression"
            )


@dataclass(frozen=True)
class LoRA(Adapter):
    """h = W0 x + s B (A x)."""

    first: ClassVar[frozenset[str]] = frozenset({"A"})
    second: ClassVar[frozenset[str]] = frozenset({"B"})
    rank: int = 8
    alpha: float = 16.0
    rs: bool = False  # rsLoRA's scale
    pattern: Pattern = ()
    field: str = "method.rank_pattern"  # whose pattern it is

    def rank_at(self, site: str) -> int:
        """r of a site: of the first pattern that matches it, else `rank`."""
        return next((r for name, r in self.pattern if _matches(name, site)), self.rank)

    def scale_at(self, site: str) -> float:
        """s of a site: alpha / r, of rsLoRA alpha / sqrt(r)."""
        r = self.rank_at(site)
        return self.alpha / r**0.5 if self.rs else self.alpha / r

    def init(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        _all_match(self.field, self.pattern, sites)
        out: Params = {}
        for s in sites:
            r = self.rank_at(s.name)
            out[Key(name, s.name, "A")] = _uniform(r, s.in_, *seed, name, s.name)
            out[Key(name, s.name, "B")] = _zeros(s.out, r, Key(name, s.name, "B"))
        return out

    def view(self, p: Params) -> Params:
        return {k: v * self.scale_at(k.site) if k.part == "B" else v for k, v in p.items()}


@dataclass(frozen=True)
class DoRA(LoRA):
    """h = c (W0 + s B A) x + b0, c = (|W0| + m) / |W0 + s B A| for each output, |.| the norm of a row.

    m is the magnitude's change, so it starts at zero for every base and weight decay pulls towards the base. The norm in the
    denominator is a constant of differentiation, as the paper's section 4.3 and PEFT have it.
    """

    second: ClassVar[frozenset[str]] = frozenset({"B", "m"})

    def init(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        return super().init(name, sites, *seed) | {Key(name, s.name, "m"): torch.zeros(s.out) for s in sites}


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


@dataclass(frozen=True)
class BitFit(Adapter):
    """h = W0 x + b0 + c."""

    group: str = "bias"

    def init(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        return {Key(name, s.name, "bias"): torch.zeros(s.out) for s in sites}


@dataclass(frozen=True)
class Bottleneck(Adapter):
    """h + U relu(D h + d) + u after a sublayer's output projection, U = 0 at the start."""

    size: int = 24
    group: str = "outputs"

    def init(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        out: Params = {}
        for s in sites:
            down = torch.rand(self.size, s.out, generator=rng(*seed, name, s.name))
            out[Key(name, s.name, "down")] = (down * 2 - 1) * s.out**-0.5
            out[Key(name, s.name, "up")] = torch.zeros(s.out, self.size)
            out[Key(name, s.name, "down_bias")] = torch.zeros(self.size)
            out[Key(name, s.name, "up_bias")] = torch.zeros(s.out)
        return out


@dataclass(frozen=True)
class Full(Adapter):
    """A dense delta on every parameter of the base."""

    group: str = "all"

    def init(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        out: Params = {}
        for s in sites:
            part, shape = {
                "linear": ("weight", (s.out, s.in_)),
                "norm": ("gain", (s.out,)),
                "embedding": ("table", (s.in_, s.out)),
            }[s.kind]
            out[Key(name, s.name, part)] = torch.zeros(*shape)
            if s.bias:
                out[Key(name, s.name, "bias")] = torch.zeros(s.out)
        return out


@lru_cache(maxsize=1024)
def _positions(n: int, size: int, *path: object) -> Tensor:
    return torch.randperm(size, generator=rng("mask", *path))[:n].sort().values


@dataclass(frozen=True)
class Sparse(Adapter):
    """Values at positions that every party derives from the seed: density * out * in of each layer."""

    density: float = 0.01
    group: str = "target"
    pattern: Densities = ()

    def count(self, s: Site) -> int:
        """Entries trained at site s: the density of the first pattern that matches it, else `density`."""
        density = next((d for name, d in self.pattern if _matches(name, s.name)), self.density)
        return max(1, round(density * s.out * s.in_))

    def positions(self, name: str, s: Site, *seed: object) -> Tensor:
        """Flat positions trained at site s, ascending int64 [n]. Random, independent of data, fixed for the run."""
        return _positions(self.count(s), s.out * s.in_, *seed, s.name)

    def init(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        _all_match("method.density_pattern", self.pattern, sites)
        return {Key(name, s.name, "values"): torch.zeros(self.count(s)) for s in sites}

    def fixed(self, name: str, sites: Sequence[Site], *seed: object) -> Params:
        return {Key(name, s.name, "index"): self.positions(name, s, *seed) for s in sites}


def make(name: str, rank: int, alpha: float, pattern: Pattern = ()) -> Adapter:
    """The adapter called `name`: rank is LoRA's and VeRA's rank and the bottlenecks' size; alpha and pattern are LoRA's."""
    if name in LOW_RANK:
        return LoRA(rank, alpha, name == "rslora", pattern)
    if name == "dora":
        return DoRA(rank, alpha, False, pattern)
    if name in ("houlsby", "pfeiffer"):
        return Bottleneck(rank, "outputs" if name == "houlsby" else "ffn_output")
    if name == "vera":
        return VeRA(rank)
    return BitFit() if name == "bitfit" else Full()


def init_head(head: Sequence[Site]) -> Params:
    """The task head as a dense delta on the seeded base head, at zero."""
    out: Params = {}
    for s in head:
        out[Key("head", s.name, "weight")] = torch.zeros(s.out, s.in_)
        if s.bias:
            out[Key("head", s.name, "bias")] = torch.zeros(s.out)
    return out
