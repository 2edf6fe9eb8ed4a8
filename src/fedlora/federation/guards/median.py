"""Coordinate-wise median (Yin et al., ICML 2018, arXiv:1803.01498, definition 1).

    server   of the K values of a coordinate the middle one, or the mean of the two middle ones, stands for all

Every upload is replaced by the median, so any weighted mean of them is it: the method's own weights have no effect. A
factor's coordinate is a coordinate here; B A is not, so this bounds what a few clients can do to A and to B apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...methods.contract import Method, ServerState, Upload
from .guard import Guard


@dataclass(frozen=True)
class Median(Guard):
    """The median of each coordinate instead of the mean."""

    name: ClassVar[str] = "median"
    title: ClassVar[str] = "Coordinate median"
    paper: ClassVar[str] = "arXiv:1803.01498"

    def cannot(self, method: Method) -> str | None:
        if method.sends and not method.averages:
            return f"{method.title} does not average leaves of one shape, so a coordinate has no values to take a median of"
        return super().cannot(method)

    def arrive(self, uploads: Iterable[Upload], server: ServerState) -> Iterable[Upload]:
        seen = list(uploads)
        low, high = (len(seen) - 1) // 2, len(seen) // 2
        mid = {
            k: torch.stack([u.params[k] for u in seen]).sort(0).values[[low, high]].mean(0)
            for k, v in (seen[0].params if seen else {}).items()
            if v.is_floating_point()
        }
        return [replace(u, params=u.params | mid) for u in seen]
