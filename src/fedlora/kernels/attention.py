"""F.scaled_dot_product_attention by amx.c or vector.c: first derivatives are compiled, further ones are PyTorch's of the plain formula."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, grad

from .dropout import Drop, dropped
from .library import at, fits, library, serving
from .packing import Packing

MOST = 1024  # queries or keys: a thread's room for the scores of a head is 14 bytes for each
FEWEST = 8  # queries: a generated token by itself would be padded to 32


def dense(x: Tensor) -> Tensor:
    """x with a dense last axis, which is all that the kernels need."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * (3 * len(tensors)))(*(n for t in tensors for n in t.stride()[:3]))


class Shape(ctypes.Structure):
    """amx.c and vector.c have the same."""

    _fields_ = (*((n, ctypes.c_int) for n in ("rows", "heads", "per_key", "queries", "keys", "width", "threads", "least", "causal",
                                              "half")),
                ("scale", ctypes.c_float), ("kept", ctypes.c_float))  # fmt: skip


def _shape(q: Tensor, k: Tensor, scale: float, packing: Packing | None, drop: Drop | None) -> Shape:
    rows, heads, queries, width = q.shape
    keys = k.shape[2]
    if packing is not None:
        rows, queries, keys = len(packing.places), packing.longest, packing.longest
    return Shape(rows, heads, heads // k.shape[1], queries, keys, width, torch.get_num_threads(),
                 drop.least if drop else 0, packing is not None and packing.causal, q.dtype == torch.bfloat16, scale, drop.kept if drop else 1.0)  # fmt: skip


def _like(x: Tensor) -> Tensor:
    """Room for something of x's shape [b h l d], tokens outermost: what the model's next reshape needs no copy of."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _done(failed: int) -> None:
    if failed:
        raise MemoryError("attention: no memory for its scratch; lower run.block")


def _library(q: Tensor) -> ctypes.CDLL:
    name = serving(q.dtype)
    assert name is not None
    return library(name)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, drop: Drop | None = None
) -> Tensor:
    """dropout(softmax(scale q k' + mask)) v by PyTorch's operators."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * scale
    if mask is not None:
        s = s.masked_fill(~mask, torch.finfo(s.dtype).min) if mask.dtype == torch.bool else s + mask
    p = s.softmax(-1)
    return (p if drop is None else dropped(p, drop)) @ v


class Attention(Function):
    """q [b h l d], k and v [b h/g m d], mask bool [b h l m] or None; returns [b h l d]. packing: of rows without padding, b = K and
    l = m = T; every row of it attends to itself. drop: of softmax's shares [rows h l m]."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        packing: Packing | None,
        drop: Drop | None,
    ) -> Tensor:
        q, k, v = dense(q), dense(k), dense(v)
        shape, places = _shape(q, k, scale, packing, drop), None if packing is None else packing.places
        out, softmax = _like(q), q.new_empty(shape.rows, shape.heads, shape.queries, 2, dtype=torch.float32)
        strides = _strides(q, k, v, out, q if mask is None else mask)
        _done(
            _library(q).attention_forward(
                *map(at, (q, k, v, mask, out, softmax)), strides, at(places), at(drop and drop.starts), shape
            )
        )
        ctx.save_for_backward(q, k, v, mask, softmax)
        ctx.scale, ctx.packing, ctx.drop = scale, packing, drop
        return out

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, softmax = ctx.saved_tensors
        packing: Packing | None = ctx.packing
        drop: Drop | None = ctx.drop
        if torch.is_grad_enabled():
            wanted = [x for x in (q, k, v) if x.requires_grad]
            if packing is None:
                y = plain_attention(q, k, v, mask, ctx.scale, drop)
            else:
                rows = [packing.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v)]
                y = plain_attention(rows[0], rows[1], rows[2], packing.mask, ctx.scale, drop)
                y = packing.pack(y.transpose(1, 2)).transpose(1, 2)
            found = iter(grad(y, wanted, gs[0], create_graph=True))
            return (*(next(found) if x.requires_grad else None for x in (q, k, v)), None, None, None, None)
        g = dense(gs[0])
        dq, dk, dv = _like(q), _like(k), _like(v)
        strides = _strides(q, k, v, g, g if mask is None else mask, dq, dk, dv)
        tensors, places = map(at, (q, k, v, g, mask, softmax, dq, dk, dv)), None if packing is None else packing.places
        _done(
            _library(q).attention_backward(
                *tensors, strides, at(places), at(drop and drop.starts), _shape(q, k, ctx.scale, packing, drop)
            )
        )
        return dq, dk, dv, None, None, None, None


def serves(x: Tensor) -> bool:
    """Whether there is a kernel for tensors like this."""
    return x.device.type == "cpu" and serving(x.dtype) is not None


def attends(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads_alike: bool = True,
    packing: Packing | None = None,
    least: int = FEWEST,
) -> bool:
    """Whether they are what the kernel is made for. Of packed rows each is as long as it was, however many tokens a client has.

    least: queries from which it is worth its padding; our dropout has no other way, and takes any number.
    """
    if packing is None:
        sizes = least <= query.shape[2] <= MOST and key.shape[2] <= MOST
    else:
        sizes = packing.longest <= MOST
    alike = key.shape == value.shape and (not heads_alike or query.shape[1] == key.shape[1])
    return serves(query) and fits(query, key, value) and query.ndim == key.ndim == 4 and alike and sizes


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    packing: Packing | None = None,
    drop: Drop | None = None,
) -> Tensor:
    """F.scaled_dot_product_attention. packing: of [K h T d], rows without padding; the mask is of the padded rows then, and says nothing
    that the packing does not. drop: dropout of ours, in place of dropout_p."""
    able = attends(query, key, value, not enable_gqa, packing, FEWEST if drop is None else 1) and not dropout_p
    if not able:
        assert packing is None and drop is None, "rows are packed, and our dropout used, where the kernel is"
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if packing is not None:
        return Attention.apply(query, key, value, None, scale, packing, drop)
    if attn_mask is not None and attn_mask.dtype != torch.bool:  # added to the scores, and perhaps learned
        return plain_attention(query, key, value, attn_mask, scale, drop)
    shape = (*query.shape[:3], key.shape[2])
    if is_causal:
        attn_mask = torch.ones(shape[2:], dtype=torch.bool).tril()
    mask = None if attn_mask is None else dense(attn_mask.expand(*attn_mask.shape[:-1], shape[-1])).expand(shape)
    return Attention.apply(query, key, value, mask, scale, None, drop)
