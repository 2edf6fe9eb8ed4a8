"""DoRA (Liu et al., arXiv:2402.09353): W = (|W0| + m) (W0 + s B A) / |W0 + s B A|, |.| the norm of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layers import Layer, base_weight
from ..tree import Key, Params
from .base import Change, Held, Parts, rows, zeros
from .factors import Factored
from .lora import LoRA


@dataclass(frozen=True)
class DoRA(Factored):
    """h = c (W0 + s B A) x + b0, c = (|W0| + m) / |W0 + s B A| for each output.

    m is the magnitude's change, so it starts at zero for every base and weight decay pulls towards the base. The norm in the
    denominator is a constant of differentiation, as the paper's section 4.3 and PEFT have it.
    """

    names: ClassVar[Mapping[str, str]] = {
        "dora": "W = (|W0| + m) (W0 + s B A) / |W0 + s B A|, norms of rows; m = 0 (arXiv:2402.09353)"
    }
    shapes: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"A", "B", "m"}),)
    first: ClassVar[frozenset[str]] = frozenset({"A"})
    second: ClassVar[frozenset[str]] = frozenset({"B", "m"})

    def init(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        m = {Key(name, s.name, "m"): zeros(Key(name, s.name, "m"), s.out) for s in layers}
        return super().init(name, layers, *seed) | m

    @staticmethod
    def apply(x: Tensor, y: Tensor, p: Parts, module: Any) -> Tensor:
        """c = (|W0| + m) / |W0 + B A| for each output; b0 is the base's bias."""
        k = len(p["m"])
        c = _gain(p["A"], p["B"], p["m"], base_weight(module))
        a, b = p["A"].to(x.dtype), p["B"].to(x.dtype)
        out = rows(y, k)
        h = torch.bmm(torch.bmm(rows(x, k), a.mT), b.mT)
        base: Tensor | None = getattr(module, "bias", None)
        plain = out if base is None else out - base  # what c - 1 scales: exactly nothing at the start
        return (out + (c - 1).to(x.dtype)[:, None] * plain + c.to(x.dtype)[:, None] * h).view_as(y)

    @classmethod
    def merge(cls, p: Parts, module: Any) -> Change:
        w = base_weight(module).float()
        return Change(_gain(p["A"], p["B"], p["m"], w)[:, None] * (w + p["B"] @ p["A"]) - w)

    @classmethod
    def hold(cls, at: Mapping[str, Sequence[Parts]]) -> Held:
        """As LoRA's; the magnitudes that PEFT starts with are the base's norms."""
        held = LoRA.hold(at)
        m = {f"{layer}.lora_magnitude_vector.default.weight": p["m"] for layer, (p,) in at.items()}
        return Held(held.config, {**held.options, "use_dora": True}, held.leaves, m)


def _gain(a: Tensor, b: Tensor, m: Tensor, weight: Tensor) -> Tensor:
    """c [... o] of A [... r i], B [... o r], m [... o] on weight [o i]; B A is never formed."""
    with torch.no_grad():
        w = weight.to(b.dtype)
        square = w.square().sum(1)
        cross = (b * (w @ a.mT)).sum(-1)
        own = (b @ (a @ a.mT) * b).sum(-1)
        norm = (square + 2 * cross + own).clamp_min(torch.finfo(b.dtype).tiny).sqrt()
    return (square.sqrt() + m) / norm
