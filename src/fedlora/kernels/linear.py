"""Frozen linear layers, alone or with low-rank deltas, with fewer passes over their activations."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .library import fits


@cache
def onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN's products are the fast ones here: always in bf16; in fp32 on AMD's processors with AVX-512, where PyTorch's own
    library (MKL) keeps to half of the vectors, so that oneDNN's take 0.4 of the time."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return dtype == torch.bfloat16 or ("AMD" in str(able.get("cpu_name", "")) and bool(able.get("avx512_f")))


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b; oneDNN adds the bias within the product, where F.linear fills the output with it first in bf16."""
    if not onednn(x.dtype):
        return F.linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def back(g: Tensor, weight: Tensor) -> Tensor:
    """g W, by PyTorch's own product where it may be differentiated once more, and in bf16, where it is as fast."""
    if torch.is_grad_enabled() or g.dtype == torch.bfloat16 or not onednn(g.dtype):
        return g @ weight
    return product(g, weight.mT, None)


class Linear(Function):
    """x W' + b for frozen W and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return back(gs[0], weight), None, None


class LowRank(NamedTuple):
    """Deltas of the clients of a block at one layer: A [K r i], B [K o r], scaled, of the layer's dtype; where the clients' tokens
    follow each other in fp32, with the token where each client's begin, and the last one's end."""

    weight: Tensor  # of the layer, [o i]; int8 codes where the base is quantised
    a: Tensor
    b: Tensor
    ends: Tensor | None = None


class LowRankLinear(Function):
    """x W' + b + (x A') B' for each client's rows of x; the delta is added into the product's own memory, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        y, rows = product(x, weight, bias), x.reshape(len(a), -1, x.shape[-1])
        h = torch.bmm(rows, a.mT)
        y.view(len(a), -1, y.shape[-1]).baddbmm_(h, b.mT)
        ctx.save_for_backward(x, weight, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        rows, g = x.reshape(len(a), -1, x.shape[-1]), gs[0].reshape(len(a), -1, len(weight))
        dh, dx = torch.bmm(g, b), None
        if x.requires_grad:
            dx = back(gs[0].reshape(-1, len(weight)), weight)
            dx = dx.view(rows.shape)
            dx = (torch.baddbmm(dx, dh, a) if torch.is_grad_enabled() else dx.baddbmm_(dh, a)).view(x.shape)
        return dx, None, None, torch.bmm(dh.mT, rows), torch.bmm(g.mT, torch.bmm(rows, a.mT))


def able(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether F.linear of them is what these forms compute."""
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return input.ndim > 1 and fits(input, weight, bias) and frozen and weight.ndim == 2 and input.numel() > 0


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear."""
    return Linear.apply(input, weight, bias) if able(input, weight, bias) else F.linear(input, weight, bias)
