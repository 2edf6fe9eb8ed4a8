"""Dropout whose masks belong to examples, so that any grouping of clients and rows trains exactly alike.

A torch function mode answers every call of `torch.nn.functional.dropout` inside the frozen base, whichever module makes
it. An entry of a mask is a hash of (the row's seed, the number of the call, the entry's coordinates): no generator, no
state, and padding, block size and gradient accumulation change nothing. A tensor without a row axis (DeBERTa's relative
embeddings) takes the step's common seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import kernels
from ..errors import ModelError
from ..kernels.attention import attends, attention
from ..kernels.dropout import GOLDEN, WIDEST, Drop, dropped, drops

MIX = (-4658895280553007687, -7723592293110705685)  # splitmix64's multipliers (Steele, Lea & Flood, OOPSLA 2014)
# The positional arguments of scaled_dot_product_attention.
ATTENTION = (
    "query",
    "key",
    "value",
    "attn_mask",
    "dropout_p",
    "is_causal",
)


def mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser, elementwise on int64, in place. torch's >> keeps the sign, hence the masks."""
    for shift, factor in ((30, MIX[0]), (27, MIX[1])):
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(factor)
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


def signed(n: int) -> int:
    """n modulo 2^64 as a signed 64-bit integer, which is how torch counts."""
    return (n + 2**63) % 2**64 - 2**63


def keep_mask(seeds: Tensor, call: int, shape: torch.Size, p: float) -> Tensor:
    """Bernoulli(1-p) mask, bool [rows ...]; seeds int64 [rows]. p is met to 2^-16: each hash gives four entries."""
    last = -(-shape[-1] // 4)
    counter = torch.arange(last, device=seeds.device)
    for n in reversed(shape[1:-1]):
        counter = torch.arange(n, device=seeds.device).view(-1, *[1] * counter.ndim) + counter * WIDEST
    start = starts(seeds, call).view(-1, *[1] * counter.ndim)
    bits = mix(start + (counter + 1) * GOLDEN).view(torch.int16)
    return bits.unflatten(-1, (last * 4,))[..., : shape[-1]] >= least(p)


def starts(seeds: Tensor, call: int) -> Tensor:
    """What the rows' masks of a call are hashed from, int64 [rows]."""
    return mix(seeds + signed(call * GOLDEN))


def least(p: float) -> int:
    """The smallest of 16 bits that keep an entry."""
    return round(p * 65536) - 32768


class ClientDropout(TorchFunctionMode):
    """Active around one forward and its backward.

    seeds: int64 [rows], one per row of the flattened batch; None switches dropout off. common: the step's seed. now: what the base is
    computing, for the compiled forms of the same masks; None for PyTorch's operators alone.
    """

    def __init__(self, seeds: Tensor | None, common: int = 0, now: kernels.Now | None = None):
        super().__init__()
        self.seeds, self.common, self.now, self.call = seeds, common, now, 0

    def drop(self, p: float, dtype: torch.dtype) -> Drop:
        """Of the next call."""
        assert self.seeds is not None
        self.call += 1
        return Drop(starts(self.seeds, self.call), least(p), (torch.ones(1) / (1 - p)).to(dtype).item())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        packing = self.now.packing if self.now and self.now.inside else None
        if func is F.scaled_dot_product_attention and (p := _inner_dropout(args, kwargs or {})):
            kwargs = dict(zip(ATTENTION, args, strict=False)) | dict(kwargs or {}) | {"dropout_p": 0.0}
            query, key, value = (kwargs.pop(n) for n in ATTENTION[:3])
            if self.seeds is None:
                return func(query, key, value, **kwargs)
            useful = self.now is not None and kernels.useful(query.device, query.dtype)
            if not useful or not attends(query, key, value, False, packing, least=1):
                raise ModelError(
                    "model: its fused attention (sdpa) drops weights by torch's global generator, so no run could be repeated; load "
                    'it with attn_implementation="eager", or without dropout'
                )
            return attention(query, key, value, **kwargs, packing=packing, drop=self.drop(p, query.dtype))
        if func is not F.dropout:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | dict(kwargs or {})
        x, p = named["input"], named.get("p", 0.5)
        if self.seeds is None or not named.get("training", True) or p == 0.0:
            return x
        if packing is not None or (self.now is not None and x.shape[0] == len(self.seeds) and drops(x)):
            return dropped(x, self.drop(p, x.dtype), packing)
        self.call += 1
        if x.shape[0] == len(self.seeds):
            mask = keep_mask(self.seeds, self.call, x.shape, p)
        else:
            mask = keep_mask(self.seeds.new_tensor([self.common]), self.call, torch.Size([1, *x.shape]), p)[0]
        return x * (mask / (1 - p)).to(x.dtype)

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For gradient checkpointing: the recomputation draws the masks that the forward drew."""
        start = self.call

        @contextmanager
        def nothing() -> Iterator[None]:
            yield

        @contextmanager
        def again() -> Iterator[None]:
            end, self.call = self.call, start
            try:
                with _Resumed(self):
                    yield
            finally:
                self.call = end

        return nothing(), again()


def _inner_dropout(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """dropout_p of a call of scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, ...)."""
    return float(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))


class _Resumed(TorchFunctionMode):
    """Hands calls to an existing ClientDropout; a mode object itself cannot be entered twice."""

    def __init__(self, inner: ClientDropout):
        super().__init__()
        self.inner = inner

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.inner.__torch_function__(func, types, args, kwargs)
