"""Full fine-tuning: a dense delta on every parameter of the base, and on a task head beside any other form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Layer
from ..tree import Key, Params
from .base import Change, Form, Parts, plus_bias, rows


@dataclass(frozen=True)
class Full(Form):
    """weight [o i] of a linear layer, gain [h] of a LayerNorm or RMSNorm, table [v h] of an embedding; bias [o] where there is one."""

    names: ClassVar[Mapping[str, str]] = {"full": "every parameter of the base"}
    shapes: ClassVar[tuple[frozenset[str], ...]] = tuple(
        frozenset(s.split()) for s in ("weight", "weight bias", "gain", "gain bias", "table")
    )
    no_peft: ClassVar[str] = "a dense delta is no low-rank product, so PEFT's LoRA cannot hold it; use --merged"
    groups: tuple[str, ...] = ("all",)

    def init(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        out: Params = {}
        for s in layers:
            part, shape = {
                "linear": ("weight", (s.out, s.in_)),
                "norm": ("gain", (s.out,)),
                "embedding": ("table", (s.in_, s.out)),
            }[s.kind]
            out[Key(name, s.name, part)] = torch.zeros(*shape)
            if s.bias:
                out[Key(name, s.name, "bias")] = torch.zeros(s.out)
        return out

    @staticmethod
    def apply(x: Tensor, y: Tensor, p: Parts, module: Any) -> Tensor:
        if "table" in p:
            return _picked(x, y, p["table"])
        y = _scaled(x, y, p["gain"], module) if "gain" in p else _product(x, y, p["weight"])
        return plus_bias(y, p["bias"]) if "bias" in p else y

    @classmethod
    def merge(cls, p: Parts, module: Any) -> Change:
        return Change(next(p[n] for n in ("weight", "gain", "table") if n in p), p.get("bias"))


def _product(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """y + W x."""
    w = weight.to(x.dtype)
    return torch.baddbmm(rows(y, len(w)), rows(x, len(w)), w.mT).view_as(y)


def _scaled(x: Tensor, y: Tensor, gain: Tensor, module: Any) -> Tensor:
    """y + g * normalised(x)."""
    g = gain.to(x.dtype)
    if isinstance(module, nn.LayerNorm):
        unit = F.layer_norm(x, x.shape[-1:], eps=module.eps)
    else:
        unit = F.rms_norm(x, x.shape[-1:], eps=getattr(module, "variance_epsilon", 1e-6))
    return torch.addcmul(rows(y, len(g)), rows(unit, len(g)), g[:, None]).view_as(y)


def _picked(x: Tensor, y: Tensor, table: Tensor) -> Tensor:
    """y + T[x]."""
    k = len(table)
    ids = x.expand(len(y), *x.shape[1:]).reshape(k, -1)
    picked = torch.stack([F.embedding(i, w) for i, w in zip(ids, table, strict=True)])  # [K T h]
    return y + picked.to(y.dtype).view_as(y)


def init_head(head: Sequence[Layer]) -> Params:
    """The task head as a dense delta on the seeded base head, at zero."""
    return Full().init("head", head)
