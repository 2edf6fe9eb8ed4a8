"""BitFit (Ben Zaken et al., arXiv:2106.10199): h = W0 x + b0 + c at every layer that has a bias, normalisations too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..layers import Layer
from ..tree import Key, Params
from .base import Change, Form, Parts, plus_bias


@dataclass(frozen=True)
class BitFit(Form):
    """c is the bias's change."""

    names: ClassVar[Mapping[str, str]] = {"bitfit": "every bias (arXiv:2106.10199)"}
    shapes: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"bias"}),)
    no_peft: ClassVar[str] = "a bias is no low-rank product, so PEFT's LoRA cannot hold it alone; use --merged"
    groups: tuple[str, ...] = ("bias",)

    def init(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        return {Key(name, s.name, "bias"): torch.zeros(s.out) for s in layers}

    @staticmethod
    def apply(x: Tensor, y: Tensor, p: Parts, module: Any) -> Tensor:
        return plus_bias(y, p["bias"])

    @classmethod
    def merge(cls, p: Parts, module: Any) -> Change:
        return Change(bias=p["bias"])
