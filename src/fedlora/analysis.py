"""Meters over a run's leaves: how exact an aggregation was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .tree import Params


def gram_norm(b: Tensor, a: Tensor) -> Tensor:
    """||B A||_F of B [o n], A [n i] from n x n Gram matrices; the [o i] product is never formed."""
    return ((b.mT @ b) * (a @ a.mT).mT).sum((-2, -1)).clamp_min(0).sqrt()


def product_error(uploads: Sequence[tuple[Params, float]], new: Params) -> float | None:
    """||sum p_k B_k A_k - B A||_F / ||sum p_k B_k A_k||_F over all sites, p_k normalised.

    uploads: (leaves of client k, weight before normalisation); new: the aggregated leaves. Every upload and `new` must
    hold A [r i] and B [o r] of the same adapter; None where they do not, or where the sum is zero.
    """
    total = sum(w for _, w in uploads)
    error = size = 0.0
    found = False
    for k, a_new in sorted(new.items(), key=lambda x: x[0]):  # one order of the sum, whatever a file gave
        if k.part != "A":
            continue
        kb = k._replace(part="B")
        if kb not in new or not all(k in p and kb in p for p, _ in uploads):
            return None
        found = True
        a = torch.cat([p[k] for p, _ in uploads]).double()
        b = torch.cat([p[kb] * (w / total) for p, w in uploads], 1).double()
        size += float(gram_norm(b, a)) ** 2
        error += float(gram_norm(torch.cat([b, -new[kb].double()], 1), torch.cat([a, a_new.double()]))) ** 2
    return (error / size) ** 0.5 if found and size > 0 else None
