"""The masks of fedlora.model.dropout, hashed and applied in one pass, for bases in fp32 and bf16 on CPUs with AVX-512 or AVX2."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .library import at, first, library
from .packing import Packing

CALLS = {torch.float32: "dropout_fp32", torch.bfloat16: "dropout_bf16"}
GOLDEN = -7046029254386353131  # 2^64 / golden ratio as a signed integer: splitmix64's increment
WIDEST = 1 << 18  # an axis is at most this long; coordinates then never collide


class Drop(NamedTuple):
    """What is dropped. starts: int64 [rows], a hash of each row's seed and of the call; an entry whose 16 bits are at least `least` is
    multiplied by `kept`, another by 0."""

    starts: Tensor
    least: int
    kept: float


def drops(x: Tensor) -> bool:
    """Whether x is what the kernel drops entries of."""
    return x.device.type == "cpu" and x.dtype in CALLS and x.ndim >= 2 and first("dropout", "dropout2") is not None


def lines(starts: Tensor, shape: torch.Size) -> Tensor:
    """What the hashes of every line of a tensor [rows ... last] begin with, int64 [lines]."""
    place = torch.zeros((), dtype=torch.int64)
    for n in reversed(shape[1:-1]):
        place = torch.arange(n).view(-1, *[1] * place.ndim) + place * WIDEST
    return (starts.view(-1, *[1] * place.ndim) + (place + 1) * GOLDEN).flatten()


class Dropout(Function):
    """firsts: of x's lines, as `lines` gives them; step: what a hash's counter grows by along a line. The mask is hashed again for the
    gradient, and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, firsts: Tensor, step: int, least: int, kept: float) -> Tensor:
        ctx.save_for_backward(firsts)
        ctx.said = (step, least, kept)
        x = x.contiguous()
        y, sizes = torch.empty_like(x), (ctypes.c_int64(len(firsts)), ctypes.c_int64(x.shape[-1]))
        name = first("dropout", "dropout2")
        assert name is not None
        call = getattr(library(name), CALLS[x.dtype])
        call(
            at(x),
            at(y),
            at(firsts),
            *sizes,
            ctypes.c_uint64(step),
            least,
            ctypes.c_float(kept),
            torch.get_num_threads(),
        )
        return y

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        (firsts,) = ctx.saved_tensors
        return Dropout.apply(gs[0], firsts, *ctx.said), None, None, None, None


def dropped(x: Tensor, drop: Drop, packing: Packing | None = None) -> Tensor:
    """x [rows ... last], or of rows without padding [K T last], with entries dropped."""
    if packing is None:
        firsts, axes = lines(drop.starts, x.shape), x.ndim - 2
    else:
        firsts, axes = drop.starts[packing.row] + (packing.token + 1) * GOLDEN, 1
    y: Tensor = Dropout.apply(x, firsts, WIDEST**axes % 2**64, drop.least, drop.kept)
    return y
