"""A frozen base's linear layers in int8: the forward and the input-gradient half of SwitchBack (Wortsman et al., NeurIPS 2023,
arXiv:2304.13013, algorithm 1). A frozen layer has no weight gradient, which is the half that SwitchBack keeps in high precision.

    W = diag(s) Wq            s: a scale for each output channel, max |row of W| / 127
    y = x W' + b              rows of x quantised as they come:    diag(a) (Xq Wq') diag(s) + b
    dx = g W                  g diag(s) is quantised by its rows:  diag(c) (Gq Wq)

Where SwitchBack has one scale for all of a weight, this has one for each output channel, which costs nothing: it is part of y, and
of g before that is quantised. Quantising and scaling are one compiled pass each (vector.c); elsewhere PyTorch does them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from .library import at, first, library

MOST = 127.0  # the largest code; -128 is not used, so that codes are symmetric


class Int8Linear(nn.Linear):
    """A frozen nn.Linear whose weight is held in a byte: codes int8 [o i], scale fp32 [o]."""

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        codes, scale = quantise(layer.weight.detach().float())
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the codes stand for, fp32 [o i], made anew at each call: for forms that start from the base's weight."""
        scale: Any = self.scale
        return self.codes.float() * scale[:, None]

    def forward(self, input: Tensor) -> Tensor:
        scale: Any = self.scale
        return int8_linear(input, self.codes, scale, self.bias)


def int8_linear(input: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear for a weight of codes int8 [o i] by scale fp32 [o]. Modes see it, as they see PyTorch's functions."""
    if has_torch_function((input,)):
        found: Tensor = handle_torch_function(int8_linear, (input,), input, codes, scale, bias)
        return found
    y: Tensor = Int8Product.apply(input, codes, scale, bias)
    return y


class Int8Product(Function):
    """x W' + b for x [... i], W = codes [o i] by scale [o]; differentiable once, by x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return product(x, codes, scale, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return back(g, *ctx.saved_tensors), None, None, None


def product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x W' + b, [... o], in the dtype of x."""
    rows, a = quantise(x.reshape(-1, x.shape[-1]).float())
    return scaled(_product(rows, codes.t()), a, scale, bias).view(*x.shape[:-1], len(codes)).to(x.dtype)


def back(g: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """g W, [... i], in the dtype of g."""
    rows, c = quantise(g.reshape(-1, g.shape[-1]).float(), scale)
    return scaled(_product(rows, codes), c, None, None).view(*g.shape[:-1], codes.shape[1]).to(g.dtype)


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x w of int8 [n i] and [i o], as int32 [n o]: exact."""
    if len(x):
        return torch._int_mm(x, w)
    return torch.zeros(0, w.shape[1], dtype=torch.int32)


def quantise(x: Tensor, fold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The rows of x [n d] fp32, each column times fold [d], as (int8 [n d], the scale of each row fp32 [n]).

    codes * scale is within scale / 2 of each number. The scale of a row that is not finite is NaN, and so is what is made of it.
    """
    x = x.contiguous()
    codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    if (name := first("vector", "vector2")) is not None:
        n, d = (ctypes.c_int64(k) for k in x.shape)
        library(name).quantise(at(x), at(fold), at(codes), at(scale), n, d, torch.get_num_threads())
        return codes, scale
    wide = x if fold is None else x * fold
    most = wide.abs().amax(1) if x.shape[1] else wide.new_zeros(len(x))
    safe = torch.where(most.isfinite() & (most > 0), most, 1.0)
    codes = torch.where(most.isfinite()[:, None], (wide * (MOST / safe)[:, None]).round(), 0.0).to(torch.int8)
    return codes, torch.where(most.isfinite(), most / MOST, torch.nan)


def scaled(y: Tensor, row: Tensor, column: Tensor | None, bias: Tensor | None) -> Tensor:
    """int32 y [n d] times row [n] and column [d], plus bias [d], in fp32."""
    if (name := first("vector", "vector2")) is not None and y.is_contiguous():
        out = torch.empty(y.shape)
        n, d = (ctypes.c_int64(k) for k in y.shape)
        library(name).rescale(at(y), at(row), at(column), at(bias), at(out), n, d, torch.get_num_threads())
        return out
    found = y.float() * row[:, None]
    found = found if column is None else found * column
    return found if bias is None else found + bias


def to_int8(base: nn.Module, besides: Collection[str] = ()) -> int:
    """Turn the base's nn.Linear layers into Int8Linear, but those called `besides` and those that share a weight with another module
    (a tied output layer). How many there were."""
    owners: dict[int, int] = {}
    for m in base.modules():
        held = m._parameters.get("weight")
        if held is not None:
            owners[id(held)] = owners.get(id(held), 0) + 1
    output: Any = getattr(base, "get_output_embeddings", lambda: None)()
    found = [(n, m) for n, m in base.named_modules()
             if type(m) is nn.Linear and n and n not in besides and owners[id(m.weight)] == 1 and m is not output]  # fmt: skip
    for name, m in found:
        path, _, last = name.rpartition(".")
        setattr(base.get_submodule(path), last, Int8Linear(m))
    return len(found)
