"""The delta forms: what an adapter adds to the output of one site. Each is a pure function of (x, y, parts).

x [K*b ... i] is the site's input, y [K*b ... o] its base output; every part has the client axis K first. Parts are cast
to x's dtype, so fp32 adapters ride on a bf16 base. Scaling is the adapter's business: parts arrive ready to use.

    low rank     A [K r i], B [K o r]                          y + B A x
    dora         A [K r i], B [K o r], m [K o]                 c (y - b0 + B A x) + b0        (arXiv:2402.09353)
    vera         A [r i], B [o r], d [K r], b [K o]            y + diag(b) B diag(d) A x      (arXiv:2310.11454)
    sparse       values [K n] at flat positions index [K n]    y + S x
    dense        weight [K o i] (bias [K o])                   y + W x + c
    bias         bias [K o]                                    y + c
    gain         gain [K h] (bias [K h])                       y + g * normalised(x) + c, at a LayerNorm or RMSNorm
    table        table [K v h]                                 y + T[x], at an embedding
    bottleneck   down [K m o], up [K o m], down_bias, up_bias  y + U relu(D y + d) + u        (arXiv:1902.00751)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parts = Mapping[str, Tensor]


def _rows(x: Tensor, k: int) -> Tensor:
    """[K*b ... i] -> [K T i]."""
    return x.reshape(k, -1, x.shape[-1])


def low_rank(x: Tensor, y: Tensor, p: Parts) -> Tensor:
    a, b = p["A"].to(x.dtype), p["B"].to(x.dtype)
    h = torch.bmm(_rows(x, len(a)), a.mT)  # [K T r]
    return torch.baddbmm(_rows(y, len(a)), h, b.mT).view_as(y)


def dora(x: Tensor, y: Tensor, p: Parts, module: nn.Module) -> Tensor:
    """c = (|W0| + m) / |W0 + B A| for each output; b0 is the base's bias."""
    k = len(p["m"])
    c = dora_gain(p["A"], p["B"], p["m"], base_weight(module))
    a, b = p["A"].to(x.dtype), p["B"].to(x.dtype)
    rows = _rows(y, k)
    h = torch.bmm(torch.bmm(_rows(x, k), a.mT), b.mT)
    base: Tensor | None = getattr(module, "bias", None)
    plain = rows if base is None else rows - base  # what c - 1 scales: exactly nothing at the start
    return (rows + (c - 1).to(x.dtype)[:, None] * plain + c.to(x.dtype)[:, None] * h).view_as(y)


def dora_gain(a: Tensor, b: Tensor, m: Tensor, weight: Tensor) -> Tensor:
    """c [... o] of A [... r i], B [... o r], m [... o] on weight [o i]; B A is never formed."""
    with torch.no_grad():
        w = weight.to(b.dtype)
        square = w.square().sum(1)
        cross = (b * (w @ a.mT)).sum(-1)
        own = (b @ (a @ a.mT) * b).sum(-1)
        norm = (square + 2 * cross + own).clamp_min(torch.finfo(b.dtype).tiny).sqrt()
    return (square.sqrt() + m) / norm


def base_weight(module: nn.Module) -> Tensor:
    """A linear layer's weight as [o i]; GPT-2's Conv1D holds it the other way round."""
    w: Tensor = module.weight  # type: ignore[assignment]
    return w.mT if type(module).__name__ == "Conv1D" else w


def vera(x: Tensor, y: Tensor, p: Parts) -> Tensor:
    k = len(p["d"])
    a, b = p["A"][0].to(x.dtype), p["B"][0].to(x.dtype)  # the same for all clients: derived from the seed
    h = (_rows(x, k) @ a.mT) * p["d"].to(x.dtype)[:, None]
    return y + ((h @ b.mT) * p["b"].to(x.dtype)[:, None]).view_as(y)


def sparse(x: Tensor, y: Tensor, p: Parts) -> Tensor:
    values = p["values"].to(x.dtype)
    k, o, i = len(values), y.shape[-1], x.shape[-1]
    w = torch.zeros(k, o * i, dtype=x.dtype, device=x.device).index_copy(1, p["index"][0], values).view(k, o, i)
    return torch.baddbmm(_rows(y, k), _rows(x, k), w.mT).view_as(y)


def dense(x: Tensor, y: Tensor, p: Parts) -> Tensor:
    w = p["weight"].to(x.dtype)
    y = torch.baddbmm(_rows(y, len(w)), _rows(x, len(w)), w.mT).view_as(y)
    return bias(x, y, p) if "bias" in p else y


def bias(x: Tensor, y: Tensor, p: Parts) -> Tensor:
    c = p["bias"].to(y.dtype)
    return (_rows(y, len(c)) + c[:, None]).view_as(y)


def bottleneck(x: Tensor, y: Tensor, p: Parts) -> Tensor:
    down, up = p["down"].to(y.dtype), p["up"].to(y.dtype)
    rows = _rows(y, len(down))
    h = torch.baddbmm(p["down_bias"].to(y.dtype)[:, None], rows, down.mT).relu()
    return (rows + torch.baddbmm(p["up_bias"].to(y.dtype)[:, None], h, up.mT)).view_as(y)


def gain(x: Tensor, y: Tensor, p: Parts, module: nn.Module) -> Tensor:
    g = p["gain"].to(x.dtype)
    if isinstance(module, nn.LayerNorm):
        unit = F.layer_norm(x, x.shape[-1:], eps=module.eps)
    else:
        unit = F.rms_norm(x, x.shape[-1:], eps=getattr(module, "variance_epsilon", 1e-6))
    y = torch.addcmul(_rows(y, len(g)), _rows(unit, len(g)), g[:, None]).view_as(y)
    return bias(x, y, p) if "bias" in p else y


def table(x: Tensor, y: Tensor, p: Parts) -> Tensor:
    t = p["table"]
    k = len(t)
    ids = x.expand(len(y), *x.shape[1:]).reshape(k, -1)
    picked = torch.stack([F.embedding(i, w) for i, w in zip(ids, t, strict=True)])  # [K T h]
    return y + picked.to(y.dtype).view_as(y)


# The form is told by the parts that are there; the first match wins.
FORMS = (
    ("d", vera), ("A", low_rank), ("values", sparse), ("weight", dense), ("down", bottleneck), ("table", table), ("bias", bias),
)  # fmt: skip
PARTS = frozenset(
    {
        "A",
        "B",
        "m",
        "d",
        "b",
        "values",
        "index",
        "weight",
        "bias",
        "down",
        "up",
        "down_bias",
        "up_bias",
        "gain",
        "table",
    }
)


def apply(x: Tensor, y: Tensor, p: Parts, module: nn.Module | None = None) -> Tensor:
    """Add the delta `p` to y. Raises ValueError for parts that form no delta."""
    if "gain" in p and module is not None:
        return gain(x, y, p, module)
    if "m" in p and module is not None:
        return dora(x, y, p, module)
    for part, form in FORMS:
        if part in p:
            return form(x, y, p)
    raise ValueError(f"parts {sorted(p)} form no delta; expected one of {[part for part, _ in FORMS]}")
