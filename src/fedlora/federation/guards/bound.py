"""A bound on a client's change (Sun et al., arXiv:1911.07963, section 5) by the cohort's median in place of a fixed norm.

    server   c_k = the norm of what client k changed, in products B A where both factors travel (geometry.py)
             where c_k > times * median(c): the client's leaves go back towards the server's until c_k is that bound

An absolute bound on norms lets a change through that is ten times everybody's. This one follows the run: changes are large at
its start and small at its end. A client's change may honestly be large, since it has more rows; `times` leaves room for that.

Choices: of fewer than three uploads all pass; an upload that states norms of its leaves (HetLoRA on A) is left out instead,
since scaling would make them untrue. Whom it hit is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from ...errors import Problem
from ...methods.contract import Method, ServerState, Upload
from ...tree import Params
from .geometry import moved, received
from .guard import Guard, no_change

HALVINGS = 40


@dataclass(frozen=True)
class Bound(Guard):
    """A change of at most `times` the median change of the round."""

    name: ClassVar[str] = "bound"
    title: ClassVar[str] = "Bound by the median change"
    paper: ClassVar[str] = "arXiv:1911.07963"
    times: float = 3.0

    def problems(self) -> list[Problem]:
        return (
            []
            if self.times >= 1
            else [Problem("times", self.times, "a number >= 1", "3 leaves room for larger clients")]
        )

    def cannot(self, method: Method) -> str | None:
        return no_change(method) or super().cannot(method)

    def arrive(self, uploads: Iterable[Upload], server: ServerState) -> Iterable[Upload]:
        seen = list(uploads)
        if len(seen) < 3:
            return seen
        sizes = torch.tensor([moved(u.params, server.params) for u in seen], dtype=torch.float64)
        middle = float(sizes.quantile(0.5))
        most, out = self.times * middle, []
        for u, size in zip(seen, sizes.tolist(), strict=True):
            if size <= most or not middle:
                out.append(u)  # to the bit what it was
                continue
            states = any(k.part == "norm" for k in u.params)
            what = "left out" if states else f"scaled to {self.times:g} times"
            warnings.warn(
                f"round {server.round + 1}: the change of {u.client.id} is {size / middle:.1f} times the median of the round; it is "
                f"{what}",
                stacklevel=2,
            )
            if not states:
                out.append(replace(u, params=_nearer(u.params, server.params, most)))
        return out


def _nearer(up: Params, server: Params, most: float) -> Params:
    """`up`, moved towards the server's leaves until its change is `most`; the change of a product is no multiple of its factors'."""
    old = {k: v for k, v in received(up, server).items() if v.is_floating_point()}
    at = lambda t: up | {k: (v + t * (up[k] - v)).to(up[k].dtype) for k, v in old.items()}  # noqa: E731
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        t = (low + high) / 2
        low, high = (t, high) if moved(at(t), server) <= most else (low, t)
    return at(low)
