"""Geometric median (RFA: Pillutla, Kakade and Harchaoui, arXiv:1912.13445, algorithm 2), on what uploads do to the model.

    server   z = sum_k w_k u_k, from w_k = 1 / K, and `steps` times (smoothed Weiszfeld)
             w_k = 1 / max(nu, ||u_k - z||), divided by their sum

The weights are those of the products B A where both factors travel (geometry.py): ||u_k - z|| needs inner products alone.
Rotating a client's factors changes no weight. What is averaged are the factors, as in FedAvg; so that a rotation has no effect
on that either, each client's are first turned to the server's by the orthogonal Q that brings (B Q, Q^T A) nearest.

Choices: clients start with equal weights, since how many rows it has is what a client says; nu is relative to the largest
norm. Every upload is replaced by the mean, so the method's own weights have no effect.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import Problem
from ...methods.contract import Method, ServerState, Upload
from ...tree import Params, mean
from .geometry import gram
from .guard import Guard


@dataclass(frozen=True)
class GeometricMedian(Guard):
    """The point with the least sum of distances to the uploads. steps: of Weiszfeld; smoothing: nu."""

    name: ClassVar[str] = "geomedian"
    title: ClassVar[str] = "Geometric median"
    paper: ClassVar[str] = "arXiv:1912.13445"
    steps: int = 32
    smoothing: float = 1e-6

    def problems(self) -> list[Problem]:
        bad = []
        if self.steps < 1:
            bad.append(Problem("steps", self.steps, "a whole number >= 1", "8 to 32 are in use"))
        if not self.smoothing > 0:
            bad.append(Problem("smoothing", self.smoothing, "a number > 0", "1e-6 is in use"))
        return bad

    def cannot(self, method: Method) -> str | None:
        if method.sends and not method.averages:
            return f"{method.title} does not average leaves of one shape, so weights of clients do not make its server"
        return super().cannot(method)

    def arrive(self, uploads: Iterable[Upload], server: ServerState) -> Iterable[Upload]:
        seen = list(uploads)
        if not seen:
            return seen
        w = self.weights(gram([u.params for u in seen]))
        turned = [{k: v for k, v in aligned(u.params, server.params).items() if v.is_floating_point()} for u in seen]
        middle = mean(zip(turned, w.tolist(), strict=True))
        return [replace(u, params=u.params | middle) for u in seen]

    def weights(self, products: Tensor) -> Tensor:
        """[K] float64, of sum 1, from inner products [K K]."""
        n = len(products)
        own = products.diagonal()
        least = self.smoothing * float(own.max().clamp(min=0).sqrt()) or self.smoothing
        w = torch.full((n,), 1 / n, dtype=torch.float64)
        for _ in range(self.steps):
            far = (own - 2 * products @ w + w @ products @ w).clamp(min=0).sqrt()
            w = 1 / far.clamp(min=least)
            w = w / w.sum()
        return w


def aligned(up: Params, like: Params) -> Params:
    """The same products, with each pair of factors turned to that of `like` (orthogonal Procrustes over both factors)."""
    out = dict(up)
    for k, a in up.items():
        other = k._replace(part="B")
        if k.part == "A" and other in up and k in like and other in like and like[k].shape == a.shape:
            b = up[other]
            u, _, vh = torch.linalg.svd(b.double().mT @ like[other].double() + a.double() @ like[k].double().mT)
            q = u @ vh
            out[k], out[other] = (q.mT @ a.double()).to(a.dtype), (b.double() @ q).to(b.dtype)
    return out
