"""PyTorch functions of a frozen base, answered by faster forms of the same: `with Fused(): base(...)`.

Every answer takes what the function takes and hands on to it what it is not made for. First derivatives are compiled; where a
derivative is to be differentiated again, it is PyTorch's own of the plain formula.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, grad
from torch.overrides import TorchFunctionMode

from .library import library

MOST = 1 << 20  # scores of a head: its room on a thread is 14 bytes for each
FEWEST = 8  # queries: a generated token by itself would be padded to 32


def _fits(*tensors: Tensor | None) -> bool:
    return all(t is None or (t.dtype == torch.bfloat16 and t.device.type == "cpu") for t in tensors)


def _dense(x: Tensor) -> Tensor:
    """x with a dense last axis, which is all that the kernels need."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _at(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if x is None else x.data_ptr())


def _strides(*tensors: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * (3 * len(tensors)))(*(n for t in tensors for n in t.stride()[:3]))


class Shape(ctypes.Structure):
    """amx.c has the same."""

    _fields_ = (*((n, ctypes.c_int) for n in ("rows", "heads", "per_key", "queries", "keys", "width", "threads")),
                ("scale", ctypes.c_float))  # fmt: skip


def _shape(q: Tensor, k: Tensor, scale: float) -> Shape:
    rows, heads, queries, width = q.shape
    return Shape(rows, heads, heads // k.shape[1], queries, k.shape[2], width, torch.get_num_threads(), scale)


def _like(x: Tensor) -> Tensor:
    """Room for something of x's shape [b h l d], tokens outermost: what the model's next reshape needs no copy of."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _done(failed: int) -> None:
    if failed:
        raise MemoryError("attention: no memory for its scratch; lower run.block")


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k' + mask) v by PyTorch's operators."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * scale
    if mask is not None:
        s = s.masked_fill(~mask, torch.finfo(s.dtype).min) if mask.dtype == torch.bool else s + mask
    return s.softmax(-1) @ v


class Attention(Function):
    """q [b h l d], k and v [b h/g m d], mask bool [b h l m] or None; returns [b h l d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        q, k, v = _dense(q), _dense(k), _dense(v)
        out, sums = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        strides = _strides(q, k, v, out, *([] if mask is None else [mask]))
        _done(library().attention_forward(*map(_at, (q, k, v, mask, out, sums)), strides, _shape(q, k, scale)))
        ctx.save_for_backward(q, k, v, mask, sums)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            wanted = [x for x in (q, k, v) if x.requires_grad]
            found = iter(grad(plain_attention(q, k, v, mask, ctx.scale), wanted, gs[0], create_graph=True))
            return (*(next(found) if x.requires_grad else None for x in (q, k, v)), None, None)
        g = _dense(gs[0])
        dq, dk, dv = _like(q), _like(k), _like(v)
        strides = _strides(q, k, v, g, g if mask is None else mask, dq, dk, dv)
        tensors = map(_at, (q, k, v, g, mask, sums, dq, dk, dv))
        _done(library().attention_backward(*tensors, strides, _shape(q, k, ctx.scale)))
        return dq, dk, dv, None, None


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention."""
    fits = (
        _fits(query, key, value) and query.ndim == key.ndim == 4 and key.shape == value.shape and not dropout_p
        and query.shape[2] >= FEWEST and query.shape[2] * key.shape[2] <= MOST and (enable_gqa or query.shape[1] == key.shape[1])
    )  # fmt: skip
    if not fits:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if attn_mask is not None and attn_mask.dtype != torch.bool:  # added to the scores, and perhaps learned
        return plain_attention(query, key, value, attn_mask, scale)
    shape = (*query.shape[:3], key.shape[2])
    if is_causal:
        attn_mask = torch.ones(shape[2:], dtype=torch.bool).tril()
    mask = None if attn_mask is None else _dense(attn_mask.expand(*attn_mask.shape[:-1], shape[-1])).expand(shape)
    return Attention.apply(query, key, value, mask, scale)


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
        library().activation_backward(*map(_at, (g, x, table, dx)), n, torch.get_num_threads())
        return dx, None


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """F.gelu."""
    if not _fits(input):
        return F.gelu(input, approximate=approximate)
    return Activation.apply(input, "gelu" if approximate == "none" else "gelu of tanh")


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """F.silu."""
    if inplace or not _fits(input):
        return F.silu(input, inplace)
    return Activation.apply(input, "silu")


class Linear(Function):
    """x W' + b for frozen W and b: the bias is part of the product, where F.linear fills the output with it first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return gs[0] @ weight, None, None


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear."""
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    fits = _fits(input, weight, bias) and frozen and weight.ndim == 2 and input.numel() > 0
    y: Tensor = Linear.apply(input, weight, bias) if fits else F.linear(input, weight, bias)
    return y


ANSWERS: Mapping[Any, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: attention,
    F.gelu: gelu,
    F.silu: silu,
    F.linear: linear,
}


class Fused(TorchFunctionMode):
    """Answers the functions above while it is active."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return ANSWERS.get(func, func)(*args, **(kwargs or {}))
