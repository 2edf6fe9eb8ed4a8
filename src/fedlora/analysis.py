"""Meters over a run's leaves: how exact an aggregation was, effective ranks, how alike the factors of clients are."""

from __future__ import annotations

import math
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
    hold A [r i] and B [o r] of the same adapter; None where they do not, where B A is not the whole delta (DoRA), or where
    the sum is zero.
    """
    total = sum(w for _, w in uploads)
    error = size = 0.0
    found = False
    for k, a_new in sorted(new.items(), key=lambda x: x[0]):  # one order of the sum, whatever a file gave
        if k.part != "A":
            continue
        kb = k._replace(part="B")
        if kb not in new or k._replace(part="m") in new or not all(k in p and kb in p for p, _ in uploads):
            return None
        found = True
        a = torch.cat([p[k] for p, _ in uploads]).double()
        b = torch.cat([p[kb] * (w / total) for p, w in uploads], 1).double()
        size += float(gram_norm(b, a)) ** 2
        error += float(gram_norm(torch.cat([b, -new[kb].double()], 1), torch.cat([a, a_new.double()]))) ** 2
    return (error / size) ** 0.5 if found and size > 0 else None


# the models of clients --------------------------------------------------------------------------------------------------


def products(deltas: Params) -> dict[str, tuple[Tensor, Tensor]]:
    """site -> (A [r i], B [o r]) with all low-rank adapters of a site side by side, so that B A is the whole delta.

    deltas: model-ready leaves of one client, no client axis.
    """
    out: dict[str, tuple[Tensor, Tensor]] = {}
    for k in sorted(deltas):
        kb = k._replace(part="B")
        if k.part != "A" or kb not in deltas or {k._replace(part=p) for p in "dm"} & deltas.keys():
            continue
        a, b = deltas[k].double(), deltas[kb].double()
        if k.site in out:
            a, b = torch.cat([out[k.site][0], a]), torch.cat([out[k.site][1], b], 1)
        out[k.site] = (a, b)
    return out


def singular_values(b: Tensor, a: Tensor) -> Tensor:
    """Singular values of B A from a small core, [min(o, r, i)] descending: QR of both factors, never [o i]."""
    left, right = torch.linalg.qr(b).R, torch.linalg.qr(a.mT).R
    return torch.linalg.svdvals(left @ right.mT)


def effective_ranks(deltas: Params, threshold: float = 0.05) -> dict[str, int]:
    """site -> number of singular values of the delta above `threshold` times the largest; 0 for a zero delta."""
    out = {}
    for site, (a, b) in products(deltas).items():
        s = singular_values(b, a)
        out[site] = int((s > threshold * s[0]).sum()) if s[0] > 1e-10 else 0
    return out


def asymmetry(clients: Sequence[Params], start: Params) -> dict[str, dict[str, float]]:
    """site -> how alike the clients' factors are: means over all pairs of clients (FedSA-LoRA, figure 2).

    A, B: cosine of the flattened factors; dA, dB: of their changes from the common `start` (most of A's likeness is the
    start); angle_A, angle_B: mean principal angle in degrees between the row spaces of A, the column spaces of B.
    """
    each, zero = [products(c) for c in clients], products(start)
    out = {}
    for site in zero:
        a, b = [p[site][0] for p in each], [p[site][1] for p in each]
        a0, b0 = zero[site]
        pairs = [(i, j) for i in range(len(each)) for j in range(i)]
        facts = {"A": _cosines(a, pairs), "B": _cosines(b, pairs)}
        if a[0].shape == a0.shape:  # not where ranks differ
            facts |= {"dA": _cosines([x - a0 for x in a], pairs), "dB": _cosines([x - b0 for x in b], pairs)}
        facts |= {"angle_A": _angles([x.mT for x in a], pairs), "angle_B": _angles(b, pairs)}
        out[site] = facts
    return out


def _cosines(vs: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> float:
    """NaN where ranks differ or nothing has moved."""
    found = []
    for i, j in pairs:
        if vs[i].shape == vs[j].shape:
            size = float(vs[i].norm() * vs[j].norm())
            found.append(float((vs[i] * vs[j]).sum()) / size if size > 0 else math.nan)
    return sum(found) / len(found) if found else math.nan


def _angles(vs: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> float:
    """Mean principal angle of column spaces, degrees (Bjoerck & Golub 1973); NaN for a zero matrix."""
    bases = [torch.linalg.qr(v).Q if float(v.norm()) > 0 else None for v in vs]
    found = []
    for i, j in pairs:
        p, q = bases[i], bases[j]
        if p is None or q is None:
            return math.nan
        cosines = torch.linalg.svdvals(p.mT @ q).clamp(-1, 1)
        found.append(float(torch.rad2deg(torch.acos(cosines)).mean()))
    return sum(found) / len(found) if found else math.nan
