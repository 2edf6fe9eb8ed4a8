"""Ranks that differ by client: plans that give each client its rank, truncation, and aggregation with zero-padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch

from .method import Client, Upload
from .model import Site
from .seeds import np_rng
from .tree import Key, Params, cut_rank, pad_rank, rank

Plan = Literal["uniform", "power", "explicit", "budget"]


def uniform(low: int, high: int, *path: object) -> int:
    """A rank uniform in [low, high]."""
    return int(np_rng("rank", *path).integers(low, high + 1))


def power_law(low: int, high: int, exponent: float, *path: object) -> int:
    """A rank with P(r) proportional to r^-exponent on [low, high]: many weak clients, few strong ones."""
    ranks = range(low, high + 1)
    weight = [r**-exponent for r in ranks]
    return int(np_rng("rank", *path).choice(list(ranks), p=[w / sum(weight) for w in weight]))


def from_budget(bytes_: float, sites: Sequence[Site], head: Sequence[Site], low: int, high: int) -> int:
    """The largest rank whose fp32 message (A, B and head) fits in `bytes_`, kept in [low, high]."""
    head_bytes = 4 * sum(s.out * s.in_ + s.out for s in head)
    per_rank = 4 * sum(s.out + s.in_ for s in sites)
    return int(min(high, max(low, (bytes_ - head_bytes) // per_rank)))


def truncate(p: Params, ranks: Callable[[Key], int]) -> Params:
    """The leading ranks(key) components of every factor."""
    return {k: cut_rank(k, v, ranks(k)).clone() for k, v in p.items()}


def padded_mean(uploads: Iterable[tuple[Upload, float]], server: Params, rank_max: int, guard: bool = True) -> Params:
    """sum_k p_k (factor of client k, zero-padded to rank_max), p_k normalised; weights that are all zero count as equal.

    guard: a component that no cohort member holds keeps its server value. Zero in both factors never trains again, so
    literal padding (guard=False) kills components for good.
    """
    held: dict[tuple[str, str], int] = {}
    weighted: Params = {}
    plain: Params = {}
    total, n = 0.0, 0
    for u, w in uploads:
        total, n = total + w, n + 1
        for k, v in u.params.items():
            if k.part == "rank":
                continue
            if rank(k, v):
                held[k.adapter, k.site] = max(held.get((k.adapter, k.site), 0), rank(k, v))
            v = pad_rank(k, v, rank_max)
            weighted[k] = v * w if k not in weighted else weighted[k] + v * w
            plain[k] = v.clone() if k not in plain else plain[k] + v
    new = {k: v / total for k, v in weighted.items()} if total > 0 else {k: v / n for k, v in plain.items()}
    if guard:
        for k, v in new.items():
            r = held.get((k.adapter, k.site), rank_max)
            if rank(k, v) and r < rank_max:
                axis = -2 if k.part == "A" else -1
                rest = server[k].narrow(axis, r, rank_max - r)
                new[k] = torch.cat([v.narrow(axis, 0, r), rest], axis)
    return new


def lookup(ranks: Mapping[str, float], client: Client) -> float | None:
    """A client's entry in an explicit plan; "*" is the default."""
    return ranks.get(client.id, ranks.get("*"))
