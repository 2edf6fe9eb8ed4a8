"""(IA)^3 (Liu et al., arXiv:2205.05638): learned vectors scale keys, values and the feed-forward's inner activations.

    keys, values                          h = (1 + l) (W0 x + b0), l [o]: the layer's output is scaled
    second layer of the feed-forward      h = W0 ((1 + l) x) + b0, l [i]: its input is scaled

The paper's vectors start at one. Ours are their changes from one: they start at zero, and weight decay pulls to the base. Where one
layer computes queries, keys and values at once (GPT-2, Phi-3), all its outputs are scaled, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..layers import Layer, base_weight
from ..tree import Key, Params
from .base import Change, Form, Held, Parts, rows, zeros


@dataclass(frozen=True)
class IA3(Form):
    """l_out [o] at keys and values, l_in [i] at the second layer of the feed-forward; both 0 at the start."""

    names: ClassVar[Mapping[str, str]] = {
        "ia3": "1 + l scales keys, values and the input of the second layer of the FFN; l = 0 (arXiv:2205.05638)"
    }
    shapes: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"l_out"}), frozenset({"l_in"}))
    groups: tuple[str, ...] = ("keys_values", "ffn_output")

    def init(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        out: Params = {}
        for s in layers:
            part, n = ("l_in", s.in_) if s.group == "ffn_output" else ("l_out", s.out)
            out[Key(name, s.name, part)] = zeros(Key(name, s.name, part), n)
        return out

    @staticmethod
    def apply(x: Tensor, y: Tensor, p: Parts, module: Any) -> Tensor:
        if "l_out" in p:
            scale = p["l_out"].to(y.dtype)[:, None]
            return (rows(y, len(scale)) * (1 + scale)).view_as(y)
        scale = p["l_in"].to(x.dtype)[:, None]
        return y + F.linear(rows(x, len(scale)) * scale, base_weight(module)).view_as(y)

    @classmethod
    def merge(cls, p: Parts, module: Any) -> Change:
        w = base_weight(module)
        if "l_in" in p:
            return Change(w * p["l_in"].to(w))
        bias: Tensor | None = getattr(module, "bias", None)
        scale = p["l_out"].to(w)
        return Change(scale[:, None] * w, None if bias is None else scale * bias)

    @classmethod
    def hold(cls, at: Mapping[str, Sequence[Parts]]) -> Held:
        """PEFT's vectors are ours plus one; what they scale is said by feedforward_modules."""
        leaves = {
            f"{layer}.ia3_l.default": 1 + (p["l_in"][None, :] if "l_in" in p else p["l_out"][:, None])
            for layer, (p,) in at.items()
        }
        inputs = sorted(layer for layer, (p,) in at.items() if "l_in" in p)
        return Held("IA3Config", {"feedforward_modules": inputs}, leaves)
