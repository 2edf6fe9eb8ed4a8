"""Cross-entropy over a vocabulary from what the output layer reads, a piece at a time: the scores of all tokens are never there at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, grad

from .linear import back, product

ENTRIES = 1 << 23  # scores of a piece
FEWEST = 32  # tokens of a piece


class WordLosses(Function):
    """-log softmax(h W' + b)[word] of each token, fp32 [n]; h [n d], words int64 [n]; W and b are frozen. The gradient by h is made
    with the scores, which are then dropped."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, words: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        out, dh = h.new_empty(len(h), dtype=torch.float32), torch.empty_like(h) if wanted else None
        step = max(FEWEST, ENTRIES // len(weight))
        for i in range(0, len(h), step):
            mine = slice(i, i + step)
            scores = product(h[mine], weight, bias).float()
            whole = scores.logsumexp(1, keepdim=True)
            own = words[mine, None]
            out[mine] = (whole - scores.gather(1, own))[:, 0]
            if dh is not None:
                shares = scores.sub_(whole).exp_()
                shares.scatter_add_(1, own, shares.new_full((1, 1), -1.0).expand(len(own), 1))
                dh[mine] = back(shares.to(h.dtype), weight)
        ctx.save_for_backward(h, weight, bias, words, dh)
        return out

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, words, dh = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = F.cross_entropy(F.linear(h, weight, bias).float(), words, reduction="none")
            return grad(plain, h, gs[0], create_graph=True)[0], None, None, None
        return dh * gs[0].to(dh.dtype)[:, None], None, None, None
