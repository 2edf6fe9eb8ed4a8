"""Distances between uploads as what they do to the model: factors count by their product B A, which is never formed.

    <B_i A_i, B_j A_j> = tr(A_i^T B_i^T B_j A_j) = sum of (B_i^T B_j) * (A_i A_j^T), two r x r matrices

So (B R, R^-1 A) is where (B, A) is, for every invertible R. A leaf without its other factor (FedSA-LoRA's A, a head, a bias)
counts by its own entries. Scales alpha / r are left out. Facts that an upload states (ranks, norms) do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...tree import Params, cut_rank, rank, rank_axis, stack
from .guard import STATED


def gram(trees: Sequence[Params]) -> Tensor:
    """Inner products of uploads, [K K] float64; smaller ranks count as if filled with zeros."""
    p = stack([{k: v for k, v in t.items() if v.is_floating_point() and k.part not in STATED} for t in trees])
    clients = len(trees)
    total = torch.zeros(clients, clients, dtype=torch.float64)
    for k, v in p.items():
        other = k._replace(part={"A": "B", "B": "A"}.get(k.part, k.part))
        if other == k or other not in p:
            x = v.double().flatten(1)
            total += x @ x.mT
        elif k.part == "A":
            a, b = v.double().flatten(0, 1), p[other].double().mT.flatten(0, 1)  # [K r in], [K r out], as [K r, ...]
            total += ((a @ a.mT) * (b @ b.mT)).view(clients, -1, clients, v.shape[1]).sum((1, 3))
    return total


def squared(products: Tensor) -> Tensor:
    """Squared distances [K K] from inner products [K K]."""
    own = products.diagonal()
    return (own[:, None] + own[None] - 2 * products).clamp(min=0)


def received(up: Params, server: Params) -> Params:
    """The server's leaves that a client of this upload's ranks had before it trained."""
    return {
        k: server[k] if rank_axis(k) is None else cut_rank(k, server[k], rank(k, v))
        for k, v in up.items()
        if k in server
    }


def moved(up: Params, server: Params) -> float:
    """How far an upload is from what the server had: the norm of the change, in products."""
    before = received(up, server)
    return float(squared(gram([{k: up[k] for k in before}, before]))[0, 1].sqrt())
