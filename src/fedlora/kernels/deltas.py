"""Frozen linear layers with low-rank deltas of clients whose tokens follow each other: each client's delta meets its own tokens."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import int8
from .library import at, first, library
from .linear import back, product

LANES = 16  # of the kernel's vectors: a layer's sides are multiples


class Deltas(ctypes.Structure):
    """vector.c has the same."""

    _fields_ = tuple((n, ctypes.c_int) for n in ("clients", "in_", "out", "rank", "half", "threads"))


def fit(weight: Tensor) -> bool:
    """Whether a layer of this weight is what the kernel is made for."""
    return not any(n % LANES for n in weight.shape)


def _library() -> ctypes.CDLL:
    name = first("vector", "vector2")
    assert name is not None
    return library(name)


def _sizes(x: Tensor, a: Tensor, b: Tensor) -> Deltas:
    return Deltas(len(a), a.shape[2], b.shape[1], a.shape[1], x.dtype == torch.bfloat16, torch.get_num_threads())


def _done(failed: int) -> None:
    if failed:
        raise MemoryError("low-rank deltas: no memory for their scratch; lower run.block")


class FlatLowRank(Function):
    """x W' + b0 + (x A_k') B_k' of the tokens of client k, those from ends[k] to ends[k + 1]. x [1 T i] or [T i], A [K r i] and
    B [K o r] in fp32; T may have more tokens, which belong to nobody. scale: [o], where weight is int8 codes, and no second
    derivative is to be had."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        ends: Tensor,
        scale: Tensor | None = None,
    ) -> Tensor:
        x, a, b = x.contiguous(), a.contiguous(), b.contiguous()
        y = (product(x, weight, bias) if scale is None else int8.product(x, weight, scale, bias)).contiguous()
        ctx.scale = scale
        h = x.new_zeros(x.numel() // x.shape[-1], -(-a.shape[1] // LANES) * LANES, dtype=torch.float32)
        _done(_library().deltas_forward(*map(at, (x, y, h, a, b, ends)), _sizes(x, a, b)))
        ctx.save_for_backward(x, weight, a, b, h, ends)
        return y

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, h, ends = ctx.saved_tensors
        g = gs[0].contiguous()
        if torch.is_grad_enabled():
            if ctx.scale is not None:
                raise RuntimeError("a product of int8 codes has no second derivative")
            return (*_plainly(x, weight, a, b, g, ends), None, None)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (back(g, weight) if ctx.scale is None else int8.back(g, weight, ctx.scale)).contiguous()
        da, db = torch.empty_like(a), torch.empty_like(b)
        _done(_library().deltas_backward(*map(at, (x, g, dx, h, a, b, da, db, ends)), _sizes(x, a, b)))
        return dx, None, None, da, db, None, None


def _plainly(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, g: Tensor, ends: Tensor
) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
    """The gradient by PyTorch's operators, client by client, to be differentiated once more."""
    flat, gs, cuts = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), ends.tolist()
    dx, das, dbs = g @ weight, [], []
    parts = []
    for k in range(len(a)):
        mine = slice(cuts[k], cuts[k + 1])
        ak, bk = a[k].to(x.dtype), b[k].to(x.dtype)
        dh = gs[mine] @ bk
        das.append(dh.mT @ flat[mine])
        dbs.append(gs[mine].mT @ (flat[mine] @ ak.mT))
        parts.append(dh @ ak)
    rest = flat.new_zeros(len(flat) - cuts[-1], flat.shape[1])
    dx = dx + torch.cat([*parts, rest]).view_as(x)
    return dx, None, None, torch.stack(das).to(a.dtype), torch.stack(dbs).to(b.dtype)
