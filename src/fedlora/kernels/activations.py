"""Derivatives of activations from tables: a bf16 number is one of 65,536."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, grad

from .library import at, library, serving

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu of tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


@cache
def slopes(name: str) -> Tensor:
    """Derivative of an activation at every number that bf16 has, by its bits: fp32 [65536]."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float().requires_grad_()
        return grad(ACTIVATIONS[name](x).sum(), x)[0]


class Activation(Function):
    """An elementwise function of PyTorch: its own values, and derivatives from a table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        return ACTIVATIONS[name](x)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return grad(ACTIVATIONS[ctx.name](x), x, gs[0], create_graph=True)[0], None
        x, g = x.contiguous(), gs[0].contiguous()
        dx, table = torch.empty_like(x), slopes(ctx.name)
        n = ctypes.c_int64(x.numel())
        name = serving(x.dtype)
        assert name is not None
        library(name).activation_backward(*map(at, (g, x, table, dx)), n, torch.get_num_threads())
        return dx, None


def tabled(x: Tensor) -> bool:
    """Whether its derivatives are looked up."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and serving(x.dtype) is not None


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """F.gelu."""
    if not tabled(input):
        return F.gelu(input, approximate=approximate)
    return Activation.apply(input, "gelu" if approximate == "none" else "gelu of tanh")


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """F.silu."""
    if inplace or not tabled(input):
        return F.silu(input, inplace)
    return Activation.apply(input, "silu")
