"""Rows without padding: the tokens of a client's rows follow each other, [K b L] becomes [K T] with T the most of a client, or [1 T]
where the clients follow each other as well."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

EVEN = 16  # T is a multiple: every shape of a bf16 product is compiled anew


def width(lengths: Tensor) -> int:
    """T of rows of these lengths, [K b]."""
    return -(-int(lengths.sum(1).max()) // EVEN) * EVEN


class Gather(Function):
    """Rows of x [n d] at `index`, zeros where it is negative; `back` is the inverse, [n]. Any derivative is a gather too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(index, back)
        return x.index_select(0, index.clamp_min(0)).masked_fill_((index < 0)[:, None], 0)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        index, back = ctx.saved_tensors
        return Gather.apply(gs[0], back, index), None, None


def total(lengths: Tensor) -> int:
    """Tokens that rows of these lengths take where they all follow each other: few more than they have, and of few numbers, since
    products are compiled for each."""
    real = int(lengths.sum())
    step = next((n for n in (16, 32, 64) if real <= 32 * n), 128)
    return -(-real // step) * step


class Packing:
    """Where the tokens of right-padded rows lie. lengths: [K b], each at least 1; longest: L of the padded rows; causal: a token sees
    itself and those before it in its row, else all of the row; flat: the clients follow each other as their rows do, in [1 T]."""

    def __init__(self, lengths: Tensor, longest: int, causal: bool = False, flat: bool = False):
        self.causal, self.flat = causal, flat
        self.lengths, self.clients, self.longest = lengths, len(lengths), longest
        used = lengths.sum(1)
        # Of flat ones: where each client's tokens begin, and the last one's end.
        self.ends = F.pad(used.cumsum(0), (1, 0))
        if flat:
            lines, self.width, used = 1, total(lengths), used.sum()[None]
        else:
            lines, self.width = len(lengths), width(lengths)
        self.lines = lines  # of the packed tensors
        starts = lengths.view(lines, -1).cumsum(1).view_as(lengths) - lengths
        line = torch.arange(lines).repeat_interleave(lengths.numel() // lines).view_as(lengths)
        token = torch.arange(longest)
        place = (line * self.width + starts)[..., None] + token
        self.outside = torch.where(token < lengths[..., None], place, -1).flatten()  # packed token of each padded one
        self.inside = torch.full((lines * self.width,), -1)  # padded token of each packed one
        real = (self.outside >= 0).nonzero().flatten()
        self.inside[self.outside[real]] = real
        at = self.inside.clamp_min(0)
        self.row, self.token = at // longest, at % longest  # of each packed token, which row it is of and where in it
        rest = torch.stack([torch.arange(lines), used, used - self.width], 1)
        rows = torch.stack([line, starts, lengths], -1).flatten(0, 1)
        self.places = torch.cat([rows, rest[rest[:, 2] < 0]]).contiguous()  # as amx.c has them

    def pack(self, x: Tensor) -> Tensor:
        """[K*b L ...] to [K T ...], or [1 T ...]."""
        rest: Sequence[int] = x.shape[2:]
        y: Tensor = Gather.apply(x.flatten(0, 1).flatten(1), self.inside, self.outside)
        return y.view(self.lines, self.width, *rest)

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse, zeros in the padding."""
        rest: Sequence[int] = x.shape[2:]
        y: Tensor = Gather.apply(x.flatten(0, 1).flatten(1), self.outside, self.inside)
        return y.view(-1, self.longest, *rest)

    @cached_property
    def first(self) -> Packing:
        """The packing of each row's first token alone."""
        return Packing(torch.ones_like(self.lengths), self.longest, self.causal, self.flat)

    def to_first(self, x: Tensor) -> Tensor:
        """Packed tokens to those of `first`."""
        few, n = self.first, self.lines * self.width
        places = few.inside.clamp_min(0)
        index = torch.where(few.inside >= 0, self.outside[places], -1)
        back = torch.full((n,), -1)
        real = (index >= 0).nonzero().flatten()
        back[index[real]] = real
        rest: Sequence[int] = x.shape[2:]
        y: Tensor = Gather.apply(x.flatten(0, 1).flatten(1), index, back)
        return y.view(few.lines, few.width, *rest)

    @cached_property
    def mask(self) -> Tensor:
        """Which keys each token of the padded rows sees, bool [K*b 1 1 L] or, where it is causal, [K*b 1 L L]."""
        real = (self.outside >= 0).view(-1, 1, 1, self.longest)
        return real & torch.ones(self.longest, self.longest, dtype=torch.bool).tril() if self.causal else real
