"""PyTorch functions of a frozen base, answered by faster forms of the same: `with Fused(): base(...)`.

Every answer takes what the function takes, and hands on to it what it is not made for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .activations import gelu, silu
from .attention import attention
from .deltas import FlatLowRank
from .int8 import int8_linear
from .linear import LowRank, LowRankLinear, able, linear
from .packing import Packing

ANSWERS: Mapping[Any, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: attention,
    F.gelu: gelu,
    F.silu: silu,
    F.linear: linear,
}


@dataclass
class Now:
    """What a base is computing. delta: what the next linear layer of that weight is to add, None once it has; packing: of the rows
    that do without padding; inside: the layers where they do."""

    delta: LowRank | None = None
    packing: Packing | None = None
    inside: bool = False


class Fused(TorchFunctionMode):
    """Answers the functions above while it is active."""

    def __init__(self, now: Now | None = None):
        super().__init__()
        self.now = now or Now()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, delta = kwargs or {}, self.now.delta
        if func is F.scaled_dot_product_attention and self.now.inside:
            return ANSWERS[func](*args, **kwargs, packing=self.now.packing)
        if func is F.linear and delta is not None and args[1:2] and args[1] is delta.weight and able(*args, **kwargs):
            self.now.delta = None
            if delta.ends is not None:
                bias = args[2] if args[2:] else kwargs.get("bias")
                return FlatLowRank.apply(*args[:2], bias, delta.a, delta.b, delta.ends)
            return LowRankLinear.apply(*args[:2], args[2] if args[2:] else kwargs.get("bias"), delta.a, delta.b)
        if func is int8_linear and delta is not None and delta.ends is not None and args[1] is delta.weight:
            self.now.delta = None
            x, codes, scale, bias = args
            return FlatLowRank.apply(x, codes, bias, delta.a, delta.b, delta.ends, scale)
        return ANSWERS.get(func, func)(*args, **kwargs)
