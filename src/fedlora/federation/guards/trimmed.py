"""Coordinate-wise trimmed mean (Yin et al., ICML 2018, arXiv:1803.01498, definition 2).

    server   of the K values of a coordinate, the b = floor(share * K) smallest and the b largest are dropped;
             the mean of the rest stands for all

Every upload is replaced by that mean, so any weighted mean of them is it: the method's own weights have no effect. A
factor's coordinate is a coordinate here; B A is not, so this bounds what a few clients can do to A and to B apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch

from ...errors import Problem
from ...methods.contract import Method, ServerState, Upload
from .guard import Guard


@dataclass(frozen=True)
class Trimmed(Guard):
    """The mean without the extremes. share: dropped on each side, in [0, 0.5)."""

    name: ClassVar[str] = "trimmed"
    title: ClassVar[str] = "Trimmed mean"
    paper: ClassVar[str] = "arXiv:1803.01498"
    share: float = 0.1

    def problems(self) -> list[Problem]:
        if 0 <= self.share < 0.5:
            return []
        return [Problem("share", self.share, "a number in [0, 0.5)", "above the share of clients that may be wrong")]

    def cannot(self, method: Method) -> str | None:
        if method.sends and not method.averages:
            return f"{method.title} does not average leaves of one shape, so a coordinate has no values to trim"
        return super().cannot(method)

    def arrive(self, uploads: Iterable[Upload], server: ServerState) -> Iterable[Upload]:
        seen = list(uploads)
        b = int(Fraction(str(self.share)) * len(seen))  # exact: 0.7 * 90 in floating point is below 63
        mid = {
            k: torch.stack([u.params[k] for u in seen]).sort(0).values[b : len(seen) - b].mean(0)
            for k, v in (seen[0].params if seen else {}).items()
            if v.is_floating_point()
        }
        return [replace(u, params=u.params | mid) for u in seen]
