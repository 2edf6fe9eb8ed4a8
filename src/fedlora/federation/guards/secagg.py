"""Secure aggregation (SecAgg+: Bell et al., CCS 2020): the server learns the weighted sum of a round's changes, and no change.

    client   w_k d_k as fixed-point numbers modulo 2^32, behind masks that cancel in the sum (federation/secagg.py)
    server   x <- x + sum_k w_k d_k / sum_k w_k,   over the clients that did not vanish

The weights are the method's own, relative to the largest of the round; they follow from what the server knows of a client
(examples), so the client can apply its own before it masks. A method whose server is no weighted mean is refused: FLoRA stacks, FlexLoRA
multiplies factors, HetLoRA weighs by norms that the server would have to see.

Here clients and server are objects of one process: a simulation of the protocol with true keys and masks. `vanish` lets that share of
the clients go after they have shared their secrets, so that their masks have to be taken away from shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from ...errors import Problem
from ...methods.contract import Method, ServerState, Upload
from ...tree import Params
from .guard import Guard, no_mean


@dataclass(frozen=True)
class SecAgg(Guard):
    """The server sees a round's sum alone.

    range: no entry of a change is larger; neighbours: with whom each client shares its secrets, null for all; threshold: share of
    them whose answers open a mask; vanish: share of clients that vanish, for simulations.
    """

    name: ClassVar[str] = "secagg"
    title: ClassVar[str] = "Secure aggregation"
    paper: ClassVar[str] = "eprint 2020/704"
    range: float = 8.0
    neighbours: int | None = None
    threshold: float = 0.6
    vanish: float = 0.0

    def problems(self) -> list[Problem]:
        bad = []
        if not 0 < self.range < math.inf:
            bad.append(Problem("range", self.range, "a number > 0", "8 leaves room for any honest change"))
        if self.neighbours is not None and self.neighbours < 2:
            bad.append(Problem("neighbours", self.neighbours, "2 or more, or null for all"))
        if not 0.5 < self.threshold <= 1:
            bad.append(Problem("threshold", self.threshold, "a number in (0.5, 1]", "0.6 lets 40 % vanish"))
        if not 0 <= self.vanish < 1:
            bad.append(Problem("vanish", self.vanish, "a number in [0, 1)"))
        return bad

    def cannot(self, method: Method) -> str | None:
        return no_mean(method, "a sum is all that it would get")

    def beside(self, other: Guard) -> str | None:
        if type(other).arrive is not Guard.arrive or other.withholds:
            return f"{other.name} looks at single uploads at the server, which secagg hides"
        return None

    def opened(
        self, server: ServerState, state: Params, like: Callable[[], Params], weight: Callable[[Upload], float]
    ) -> Guard:
        from ..secure import Round

        return Round(self, like, weight)
