"""The masks of fedlora.dropout, hashed and applied in one pass, for bases in fp32 and bf16 on CPUs with AVX-512."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .library import at, library, unavailable

CALLS = {torch.float32: "dropout_fp32", torch.bfloat16: "dropout_bf16"}
ROOM = 18  # bits of a coordinate


def drops(x: Tensor) -> bool:
    """Whether x is what the kernel drops entries of."""
    return x.device.type == "cpu" and x.dtype in CALLS and 2 <= x.ndim <= 4 and unavailable("dropout") is None


class Dropout(Function):
    """x [rows ... last] times `scale` where an entry's 16 bits are at least `least`, else times 0.

    starts: int64 [rows], a hash of each row's seed and of the call. The mask is hashed again for the gradient, and never kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, starts: Tensor, least: int, scale: float) -> Tensor:
        ctx.save_for_backward(starts)
        ctx.said = (least, scale)
        x = x.contiguous()
        y, middle = torch.empty_like(x), x.shape[2] if x.ndim == 4 else 1
        axes = (len(x), x.shape[1] if x.ndim > 2 else 1, middle, x.shape[-1])
        step = ctypes.c_uint64(1 << ROOM * (x.ndim - 2))
        call = getattr(library("dropout"), CALLS[x.dtype])
        call(
            at(x),
            at(y),
            at(starts),
            *map(ctypes.c_int64, axes),
            step,
            least,
            ctypes.c_float(scale),
            torch.get_num_threads(),
        )
        return y

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        (starts,) = ctx.saved_tensors
        return Dropout.apply(gs[0], starts, *ctx.said), None, None, None
