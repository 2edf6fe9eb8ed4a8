"""Meters over a run's leaves: how exact an aggregation was, effective ranks, how alike the factors of clients are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import at_layers, low_rank
from ..tree import Key, Params


def gram_norm(b: Tensor, a: Tensor) -> Tensor:
    """||B A||_F of B [o n], A [n i] from n x n Gram matrices; the [o i] product is never formed."""
    return ((b.mT @ b) * (a @ a.mT).mT).sum((-2, -1)).clamp_min(0).sqrt()


def product_error(uploads: Sequence[tuple[Params, float]], new: Params) -> float | None:
    """||sum p_k B_k A_k - B A||_F / ||sum p_k B_k A_k||_F over all layers, p_k normalised.

    uploads: (leaves of client k, weight before normalisation); new: the aggregated leaves. Every upload and `new` must
    hold A [r i] and B [o r] of the same adapter; None where they do not, where B A is not the whole delta (DoRA), or where
    the sum is zero.
    """
    total = sum(w for _, w in uploads)
    error = size = 0.0
    deltas = {(a, s): parts for s, each in at_layers(new).items() for a, parts in each.items() if a != "head"}
    if not all(low_rank(parts) for parts in deltas.values()):
        return None
    for adapter, layer in sorted(deltas):  # sorted, so that the sum does not depend on a file's order
        ka, kb = Key(adapter, layer, "A"), Key(adapter, layer, "B")
        if not all(ka in p and kb in p for p, _ in uploads):
            return None
        a = torch.cat([p[ka] for p, _ in uploads]).double()
        b = torch.cat([p[kb] * (w / total) for p, w in uploads], 1).double()
        size += float(gram_norm(b, a)) ** 2
        error += float(gram_norm(torch.cat([b, -new[kb].double()], 1), torch.cat([a, new[ka].double()]))) ** 2
    return (error / size) ** 0.5 if size > 0 else None


# the models of clients --------------------------------------------------------------------------------------------------


def products(deltas: Params) -> dict[str, tuple[Tensor, Tensor]]:
    """layer -> (A [r i], B [o r]) with all low-rank adapters of a layer side by side, so that B A is the whole delta.

    deltas: model-ready leaves of one client, no client axis.
    """
    out: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, each in sorted(at_layers(deltas).items()):
        found = [each[adapter] for adapter in sorted(each) if low_rank(each[adapter])]
        if found:
            out[layer] = torch.cat([p["A"].double() for p in found]), torch.cat([p["B"].double() for p in found], 1)
    return out


def singular_values(b: Tensor, a: Tensor) -> Tensor:
    """Singular values of B A from a small core, [min(o, r, i)] descending: QR of both factors, never [o i]."""
    left, right = torch.linalg.qr(b).R, torch.linalg.qr(a.mT).R
    return torch.linalg.svdvals(left @ right.mT)


def effective_ranks(deltas: Params, threshold: float = 0.05) -> dict[str, int]:
    """layer -> number of singular values of the delta above `threshold` times the largest; 0 for a zero delta."""
    out = {}
    for layer, (a, b) in products(deltas).items():
        s = singular_values(b, a)
        out[layer] = int((s > threshold * s[0]).sum()) if s[0] > 1e-10 else 0
    return out


def asymmetry(clients: Sequence[Params], start: Params) -> dict[str, dict[str, float]]:
    """layer -> how alike the clients' factors are: means over all pairs of clients (FedSA-LoRA, figure 2).

    A, B: cosine of the flattened factors; dA, dB: of their changes from the common `start` (most of A's likeness is the
    start); angle_A, angle_B: mean principal angle in degrees between the row spaces of A, the column spaces of B.
    """
    each, zero = [products(c) for c in clients], products(start)
    out = {}
    for layer in zero:
        a, b = [p[layer][0] for p in each], [p[layer][1] for p in each]
        a0, b0 = zero[layer]
        pairs = [(i, j) for i in range(len(each)) for j in range(i)]
        facts = {"A": _cosines(a, pairs), "B": _cosines(b, pairs)}
        if a[0].shape == a0.shape:  # left out where ranks differ
            facts |= {"dA": _cosines([x - a0 for x in a], pairs), "dB": _cosines([x - b0 for x in b], pairs)}
        facts |= {"angle_A": _angles([x.mT for x in a], pairs), "angle_B": _angles(b, pairs)}
        out[layer] = facts
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
