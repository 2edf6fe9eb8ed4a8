"""PiSSA (Meng et al., arXiv:2404.02948): LoRA that starts at the principal components of the base's weight.

    s B0 A0 = the best rank-r part of W0 (square roots of the singular values on both sides)
    h = (W0 - s B0 A0) x + s B A x,     A = A0 + dA,  B = B0 + dB

The paper freezes the residual W0 - s B0 A0. Here the base stays as it is, shared by all clients, and the leaves are the changes dA and
dB, so that the delta is exactly zero at the start and weight decay pulls to the base:

    s (B A - B0 A0) = s [dB, B0] [A; dA],     a product of rank 2r (as PEFT converts PiSSA to LoRA)

A0 and B0 never travel: each party derives them from its own copy of the base, in float64 and with fixed signs. One SVD a layer and
process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..layers import Layer
from ..tree import Key, Params, factor
from .base import all_match, zeros
from .lora import LoRA

# Of the layers of the frozen base: its principal factors.
_PRINCIPAL: WeakKeyDictionary[nn.Module, dict[int, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def principal(layer: Layer, r: int) -> tuple[Tensor, Tensor]:
    """B [o r], A [r i] in fp32 with B A the best rank-r part of the base's weight there."""
    weight = layer.weight()
    known = _PRINCIPAL.setdefault(layer.module, {})
    if r not in known:
        b, a = factor(weight.detach().double().cpu(), r)
        known[r] = b.float(), a.float()
    return known[r]


@dataclass(frozen=True)
class PiSSA(LoRA):
    """dA [r i] and dB [o r] are trained, both 0 at the start; A0 and B0 are fixed. `view` makes them a plain low-rank delta of rank 2r."""

    names: ClassVar[Mapping[str, str]] = {
        "pissa": "s (B A - B0 A0), s B0 A0 the best rank-r part of W0, derived from the base and never sent; A = A0, B = B0 "
        "(arXiv:2404.02948)"
    }
    shapes: ClassVar[tuple[frozenset[str], ...]] = ()  # none of its own: the delta reaches the model as LoRA's
    leaves: ClassVar[frozenset[str]] = frozenset({"dA", "dB"})
    low_rank: ClassVar[bool] = False  # its own leaves are changes of factors, not factors
    first: ClassVar[frozenset[str]] = frozenset({"dA"})
    second: ClassVar[frozenset[str]] = frozenset({"dB"})

    def init(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        all_match(self.field, self.pattern, layers)
        out: Params = {}
        for s in layers:
            r = self.rank_at(s.name)
            out[Key(name, s.name, "dA")] = zeros(Key(name, s.name, "dA"), r, s.in_)
            out[Key(name, s.name, "dB")] = zeros(Key(name, s.name, "dB"), s.out, r)
        return out

    def fixed(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        out: Params = {}
        for s in layers:
            b, a = principal(s, self.rank_at(s.name))
            half = self.scale_at(s.name) ** -0.5  # s B0 A0 is the weight's part, so each side is divided by sqrt(s)
            out[Key(name, s.name, "B0")], out[Key(name, s.name, "A0")] = b * half, a * half
        return out

    def view(self, p: Params) -> Params:
        out: Params = {}
        for k, v in p.items():
            of = lambda part, k=k: p[k._replace(part=part)]  # noqa: E731
            if k.part == "dA":
                out[k._replace(part="A")] = torch.cat([of("A0") + v, v], -2)
            elif k.part == "dB":
                out[k._replace(part="B")] = self.scale_at(k.layer) * torch.cat([v, of("B0")], -1)
            elif k.part not in ("A0", "B0"):
                out[k] = v
        return out
