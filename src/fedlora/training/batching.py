"""How rows become batches: clients stacked into a block, and a block's rows cut into groups with little padding.

A leaf that has one entry a token (see TOKENWISE) can be padded and cut; every other leaf stays as it is. Padded tokens
are masked, and `Adapted.forward` gives them the model's own padding id. Rows of a block that only pad have weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.adapted import Adapted, Batch

TOKENWISE = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "labels"})  # leaves [K b L]
# What a leaf holds where there is no token: -100 is no target; all others hold 0, and are masked.
FILL = {"labels": -100}


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """One batch [K b ...] from one [b ...] per client, each padded to the widest and longest of the block.

    Padding tokens are masked; padding rows repeat a client's first row with weight 0, so no row is fully masked.
    """
    b = max(len(x["labels"]) for x in batches)
    out: Batch = {}
    for name in batches[0]:
        leaves = [x[name] for x in batches]
        if leaves[0].ndim >= 2 and len({v.shape[1:] for v in leaves}) > 1:
            wide = max(v.shape[1] for v in leaves)
            fill = FILL.get(name, 0)
            leaves = [F.pad(v, (*[0, 0] * (v.ndim - 2), 0, wide - v.shape[1]), value=fill) for v in leaves]
        if leaves[0].ndim:
            leaves = [v if len(v) == b else torch.cat([v, v[:1].expand(b - len(v), *v.shape[1:])]) for v in leaves]
        out[name] = torch.stack(leaves)
    rows = torch.tensor([len(x["labels"]) for x in batches])
    out["weight"] = (torch.arange(b)[None] < rows[:, None]).float()
    return out


OVERHEAD = {"cpu": 128}  # what a further forward and backward costs, in padded tokens
LAUNCHES = 16_384  # the same on an accelerator, where many small kernels cost more than padding
# Factor on OVERHEAD in half precision: a token costs less there, and weights are packed anew for each product.
HALF = {"cpu": 8}
INF = float("inf")
INT = torch.iinfo(torch.int64).max
CACHED = {torch.float32: 2048, torch.bfloat16: 4096}  # padded tokens whose activations a CPU's caches still hold, about
COMPILED = 8192  # the same with compiled attention, whose scores need no room there
EVEN = 8  # in half precision lengths are multiples of this, and rows come in SIZES: see `cut`
SIZES = sorted({a * 2**n for a in (1, 3) for n in range(12)})


def cut(
    longest: Sequence[int],
    clients: int,
    overhead: int,
    most: int,
    sizes: Sequence[int] | None = None,
    tokens: float = INF,
) -> list[tuple[int, int]]:
    """Where to cut rows that are sorted by length, so that padded tokens + overhead of every piece are fewest.

    longest[j]: tokens of the longest j-th row; most: rows in a piece; sizes: allowed numbers of rows, None for any; tokens:
    padded tokens in a piece of more than one row. Returns (first, end) of each piece.
    """
    allowed = [n for n in sizes or range(1, most + 1) if n <= most]
    best: list[tuple[int, int]] = [(0, 0)]  # (cost, start of the last piece) of the first j rows
    for j in range(1, len(longest) + 1):
        starts = [j - n for n in allowed if n <= j and (n == 1 or clients * n * longest[j - n] <= tokens)]
        best.append(min((best[i][0] + clients * (j - i) * longest[i] + overhead, i) for i in starts))
    cuts, j = [], len(longest)
    while j:
        cuts.append((best[j][1], j))
        j = best[j][1]
    return cuts[::-1]


def padded_right(batch: Batch) -> bool:
    """Whether the batch holds token rows that are padded on the right, and no leaf that may go with tokens or may not."""
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 3 or any(v.ndim > 2 and n not in TOKENWISE for n, v in batch.items()):
        return False
    return bool((mask[..., 1:] <= mask[..., :-1]).all())


def row_lengths(batch: Batch) -> Tensor | None:
    """Tokens of every row [K b], 0 for a row without weight; None where rows are not padded on the right alone."""
    if not padded_right(batch):
        return None
    return batch["attention_mask"].sum(2) * (batch["weight"] > 0)


def _rows(batch: Batch, i: int, j: int) -> Batch:
    return {n: v[:, i:j] if v.ndim > 1 else v for n, v in batch.items()}


def fitted(batch: Batch, length: int, tokenwise: Collection[str] = TOKENWISE) -> Batch:
    """Token rows cut or padded to `length`. tokenwise: the leaves that have an entry for each token."""

    def fit(name: str, v: Tensor) -> Tensor:
        more = length - v.shape[2]
        return v[:, :, :length] if more <= 0 else F.pad(v, (0, more), value=FILL.get(name, 0))

    return {n: fit(n, v) if v.ndim > 2 and n in tokenwise else v for n, v in batch.items()}


def packed(batch: Batch, lengths: Tensor, parts: int, tokenwise: Collection[str] = TOKENWISE) -> list[Batch]:
    """Groups of rows that are sorted by length, alike in their tokens, for a model that computes them without padding.

    lengths [K b] of the rows; a client's rows that only pad count as one token.
    """
    pieces = []
    for i in range(min(parts, lengths.shape[1])):
        if not lengths[:, i].any():
            break  # every real row is already in a piece
        rows = {n: v[:, i::parts] if v.ndim > 1 else v for n, v in batch.items()}
        piece = fitted(rows, int(lengths[:, i].max()), tokenwise)
        pieces.append(piece | {"lengths": lengths[:, i::parts].clamp_min(1)})
    return pieces


def even(length: int, model: Adapted) -> int:
    """The length that rows of `length` tokens are computed at.

    Half-precision products are compiled anew for every shape on a CPU (milliseconds each, far more than the product) and
    like multiples of 8 on a GPU, so shapes are few there; fp32 takes rows as they are.
    """
    if not model.half:
        return length
    wide = -(-length // EVEN) * EVEN
    return wide if wide <= model.longest else length


def filled(batch: Batch, lengths: Tensor) -> Batch:
    """Every row of weight 0 becomes the shortest row of the block that has a weight, so that it fits wherever it stands.

    Cut below its end a row may be no valid input any more: BART finds its sentence by the end-of-sequence token. lengths
    [K b]: tokens of the rows. What a row of weight 0 holds changes no result.
    """
    if bool((lengths > 0).all()):
        return batch
    k, j = divmod(int(lengths.masked_fill(lengths == 0, INT).argmin()), lengths.shape[1])
    empty = batch["weight"] == 0
    return {
        n: torch.where(empty.view(*empty.shape, *[1] * (v.ndim - 2)), v[k, j], v) if v.ndim > 1 and n != "weight" else v
        for n, v in batch.items()
    }


def pieces(model: Adapted, batch: Batch, parts: int, tokenwise: Collection[str] = TOKENWISE) -> list[Batch]:
    """Row groups of a block [K b ...], cut so that little of a group is padding. parts: at least so many, to save memory.

    Together they hold every row that has a weight exactly once.
    """
    k, b = batch["weight"].shape
    most = -(-b // parts)
    lengths = batch["tokens"] if "tokens" in batch else row_lengths(batch)
    batch = {n: v for n, v in batch.items() if n != "tokens"}
    if lengths is None:
        return [_rows(batch, i, i + most) for i in range(0, b, most)] if parts > 1 else [batch]
    order = lengths.argsort(dim=1, descending=True, stable=True)
    there = order.to(batch["weight"].device, non_blocking=True)
    batch = {n: v[torch.arange(k, device=v.device)[:, None], there] if v.ndim > 1 else v for n, v in batch.items()}
    lengths = lengths.gather(1, order)
    batch = filled(batch, lengths)
    longest = lengths.amax(0).tolist()  # tokens of the longest j-th row among the clients
    device = batch["weight"].device.type
    tokens = CACHED.get(model.dtype, INF) if device == "cpu" else INF
    tokens = COMPILED if model.compiled else tokens
    if model.packs(batch):
        return packed(batch, lengths, max(parts, math.ceil(int(lengths.sum()) / tokens)), tokenwise)
    overhead = OVERHEAD.get(device, LAUNCHES) * (HALF.get(device, 2) if model.half else 1)
    wide = [even(n, model) for n in longest]
    cuts = cut(wide, k, overhead, most, SIZES if model.half else None, tokens)
    return [fitted(_rows(batch, i, j), wide[i], tokenwise) for i, j in cuts if longest[i] > 0]
