"""The classic ways to fine-tune, federated by averaging: SLoRA's baselines (arXiv:2308.06522, section 4).

    FFT       every parameter of the base            SFT       a seeded random share of each target layer's entries
    BitFit    every bias (arXiv:2106.10199)          Houlsby   two bottlenecks a layer (arXiv:1902.00751)
    Pfeiffer  one bottleneck a layer (arXiv:2005.00247)

All leaves are shared; `rank` is the bottlenecks' size (hidden / 16 is usual). The same adapters work under every rule
that averages whole leaves: HomLoRA(adapter="bitfit"), Local-only, FedAvg + fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..adapters import AdapterName, Densities, Form, Sparse, pattern_problems
from ..errors import Problem
from ..tree import Key
from .sgd import SGDMethod


class Shared(SGDMethod):
    """Train every leaf, share every leaf."""

    def trains(self, k: Key) -> bool:
        return True

    def shares(self, k: Key) -> bool:
        return True


@dataclass(frozen=True)
class FFT(Shared):
    """Full fine-tuning: every parameter travels."""

    name: ClassVar[str] = "fft"
    title: ClassVar[str] = "FFT"
    paper: ClassVar[str] = "arXiv:1602.05629"
    family: ClassVar[str] = "sparse"
    label: ClassVar[str] = "full"
    adapter: AdapterName = "full"


@dataclass(frozen=True)
class BitFit(Shared):
    """Every bias."""

    name: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit"
    paper: ClassVar[str] = "arXiv:2106.10199"
    family: ClassVar[str] = "sparse"
    label: ClassVar[str] = "bitfit"
    adapter: AdapterName = "bitfit"


@dataclass(frozen=True)
class Houlsby(Shared):
    """Two bottlenecks a layer, after attention and after the feed-forward."""

    name: ClassVar[str] = "houlsby"
    title: ClassVar[str] = "Houlsby"
    paper: ClassVar[str] = "arXiv:1902.00751"
    family: ClassVar[str] = "sparse"
    label: ClassVar[str] = "bottleneck"
    adapter: AdapterName = "houlsby"


@dataclass(frozen=True)
class Pfeiffer(Shared):
    """One bottleneck a layer, after the feed-forward."""

    name: ClassVar[str] = "pfeiffer"
    title: ClassVar[str] = "Pfeiffer"
    paper: ClassVar[str] = "arXiv:2005.00247"
    family: ClassVar[str] = "sparse"
    label: ClassVar[str] = "bottleneck"
    adapter: AdapterName = "pfeiffer"


@dataclass(frozen=True)
class SFT(Shared):
    """Sparse fine-tuning under a mask that both sides draw from the seed; only values travel.

    density: share of each layer's entries; density_pattern: of some layers, named as in rank_pattern. layers: the target
    layers, or every linear layer of the base.
    """

    name: ClassVar[str] = "sft"
    title: ClassVar[str] = "SFT"
    paper: ClassVar[str] = "arXiv:2308.06522"
    family: ClassVar[str] = "sparse"
    label: ClassVar[str] = "sparse"
    density: float = 0.01
    density_pattern: Densities = ()
    layers: str = "target"

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if not 0 < self.density <= 1:
            bad.append(Problem("method.density", self.density, "a number in (0, 1]", "0.01, 0.05 and 0.1 are usual"))
        bad += pattern_problems(
            "method.density_pattern", self.density_pattern, lambda d: 0 < d <= 1, "densities in (0, 1]"
        )
        if self.layers not in ("target", "all"):
            bad.append(Problem("method.layers", self.layers, "target or all"))
        return bad

    @property
    def form(self) -> Form:
        return Sparse(self.density, ("target" if self.layers == "target" else "linear",), self.density_pattern)
