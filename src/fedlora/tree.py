"""Named tensors: the one data type that crosses every boundary (model, wire, disk).

Shape letters used everywhere: K clients in a block, b examples per client, L tokens, r rank, i/o in/out features,
n entries of a sparse delta. On the server, the wire and the disk a leaf has no client axis; inside client code
every leaf has it first: [K, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Key(NamedTuple):
    """Name of one leaf: which adapter, which weight of the base, which part of the adapter."""

    adapter: str  # "lora", "common", "personal", "sparse", "head"
    layer: str  # module path in the base, e.g. "encoder.layer.0.attention.self.query"; "" for run-wide leaves
    part: str  # "A" [r i] | "B" [o r] | "values" [n] | "weight" [o i] | "bias" [o] | "rank" [] ...

    def __str__(self) -> str:
        return "/".join(self)

    @classmethod
    def parse(cls, text: str) -> Key:
        """Inverse of str. Raises ValueError unless `text` has exactly three parts."""
        parts = text.split("/")
        if len(parts) != 3:
            raise ValueError(f"leaf name {text!r} has {len(parts)} parts, expected adapter/layer/part")
        return cls(*parts)


Params = dict[Key, Tensor]
GUARD = "@"  # "lora@feedback" holds what the guard "feedback" remembers beside leaves of the adapter "lora"


def apart(p: Params) -> tuple[Params, Params]:
    """(the method's leaves, what guards remember) of a tree that holds both."""
    own = {k: v for k, v in p.items() if GUARD not in k.adapter}
    return own, {k: v for k, v in p.items() if GUARD in k.adapter}


def select(p: Params, keep: Callable[[Key], bool]) -> Params:
    """The leaves whose key satisfies `keep`."""
    return {k: v for k, v in p.items() if keep(k)}


def mean(terms: Iterable[tuple[Params, float]]) -> Params:
    """Weighted mean [leafwise], streaming: holds one running sum, never all the uploads.

    Sums in float64 would double the memory for no gain: K <= a few thousand terms of like size.
    """
    total = 0.0
    acc: Params = {}
    for p, w in terms:
        total += w
        for k, v in p.items():
            if k in acc:
                acc[k].add_(v, alpha=w)
            else:
                acc[k] = v * w
    return {k: v.div_(total) for k, v in acc.items()}


def rank_axis(k: Key) -> int | None:
    """The axis (from the end) that holds the rank: A [r i], B [o r], VeRA's d [r]."""
    return {"A": -2, "B": -1, "d": -1}.get(k.part)


def rank(k: Key, v: Tensor) -> int:
    """Rank of one leaf, 0 for leaves that have none."""
    axis = rank_axis(k)
    return 0 if axis is None else v.shape[axis]


def pad_rank(k: Key, v: Tensor, r: int) -> Tensor:
    """Zero-pad the rank axis to r. Parts without a rank pass through."""
    axis = rank_axis(k)
    if axis is None or v.shape[axis] == r:
        return v
    shape = list(v.shape)
    shape[axis] = r - shape[axis]
    return torch.cat([v, v.new_zeros(shape)], axis)


def cut_rank(k: Key, v: Tensor, r: int) -> Tensor:
    """The leading r components of the rank axis. Parts without a rank pass through."""
    axis = rank_axis(k)
    return v if axis is None else v.narrow(axis, 0, min(r, v.shape[axis]))


def factor(dw: Tensor, r: int, split: str = "sqrt") -> tuple[Tensor, Tensor]:
    """Best rank-r factors B [o r], A [r i] of dw [o i], with B A ~ dw.

    split "sqrt" puts the root of the singular values on both sides, "B" puts them all on B. Signs are fixed (the
    largest entry of each left vector is positive): an SVD is unique only up to them, and a resumed run would differ.
    """
    u, s, vh = torch.linalg.svd(dw, full_matrices=False)
    sign = u.gather(0, u.abs().argmax(0)[None]).sign()
    u, vh, s = (u * sign)[:, :r], (vh * sign.mT)[:r], s[:r]
    left, right = (s, torch.ones_like(s)) if split == "B" else (s.sqrt(), s.sqrt())
    return u * left, right[:, None] * vh


def factor_product(b: Tensor, a: Tensor, r: int, split: str = "sqrt") -> tuple[Tensor, Tensor]:
    """`factor` of b @ a, b [o n], a [n i], from QRs and the SVD of an n x n core; the [o i] product is never formed."""
    left, right = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    core_b, core_a = factor(left.R @ right.R.mT, r, split)
    b, a = left.Q @ core_b, core_a @ right.Q.mT
    sign = b.gather(0, b.abs().argmax(0)[None]).sign()
    sign = torch.where(sign == 0, 1.0, sign)
    return b * sign, a * sign.mT


def stack(ps: Sequence[Params]) -> Params:
    """K client trees -> one tree with a leading client axis; smaller ranks are zero-padded (exact: zeros stay zero).

    Leaves come out in the order of their names, whatever order a file or a message gave them: sums over leaves (the norm
    that clips) must not depend on it.
    """
    out: Params = {}
    for k in sorted(ps[0]):
        leaves = [p[k] for p in ps]
        if all(v is leaves[0] for v in leaves):
            # what all clients received is not copied, but laid out as a copy: the last bits of products follow the layout
            out[k] = leaves[0].contiguous()[None].expand(len(leaves), *leaves[0].shape)
            continue
        if len({v.shape for v in leaves}) > 1:
            top = max(rank(k, v) for v in leaves)
            leaves = [pad_rank(k, v, top) for v in leaves]
        out[k] = torch.stack(leaves)
    return out


def unstack(p: Params, k: int) -> list[Params]:
    """Inverse of stack. An adapter with a `rank` leaf [K] (for all layers, or one a layer) is cut back to each client's
    own rank."""
    live = {(key.adapter, key.layer): v.tolist() for key, v in p.items() if key.part == "rank"}

    def cut(key: Key, v: Tensor) -> Sequence[Tensor]:
        adapter = key.adapter.split("~")[0]  # "lora~m" holds the moments of "lora"
        ranks = live.get((adapter, key.layer)) or live.get((adapter, ""))
        each = v.unbind()  # nothing writes into leaves, so views will do
        if ranks is None or v.ndim == 1:
            return each
        return [cut_rank(key, w, r).clone() for w, r in zip(each, ranks, strict=True)]

    cuts = {key: cut(key, v) for key, v in p.items()}
    return [{key: each[j] for key, each in cuts.items()} for j in range(k)]


def per_client(v: Tensor, like: Tensor) -> Tensor:
    """[K] -> [K 1 ... 1], ready to broadcast against `like` [K ...]."""
    return v.view(-1, *[1] * (like.ndim - 1))


def where(alive: Tensor, new: Mapping[str, Params], old: Mapping[str, Params]) -> dict[str, Params]:
    """Keep `old` for clients of the block that have run out of batches. alive: [K] bool."""
    if bool(alive.all()):
        return dict(new)

    there: dict[torch.device, Tensor] = {}  # one copy for each device, not one for each leaf

    def pick(a: Tensor, b: Tensor) -> Tensor:
        if a is b:
            return a
        if a.device not in there:
            there[a.device] = alive.to(a.device, non_blocking=True)
        return torch.where(per_client(there[a.device], a), a, b)

    return {g: {k: pick(new[g][k], old[g][k]) for k in new[g]} for g in new}


def norm(v: Tensor) -> Tensor:
    """Frobenius norm per client: [K, ...] -> [K]. Its gradient at zero is zero, not NaN."""
    return torch.linalg.vector_norm(v.flatten(1), dim=1)


def count(p: Params) -> int:
    """Number of scalars."""
    return sum(v.numel() for v in p.values())
