"""Differential privacy of whole clients: DP-FedAvg (McMahan et al., ICLR 2018, arXiv:1710.06963, algorithm 1) at the server.

    server   d_k = up_k - x;   D = sum_k d_k min(1, C / ||d_k||),   ||.|| over all shared leaves together, in float64
             x <- x + (D + N(0, (z C)^2)) / m,   m the clients that a round has in the mean, however many came

Every client weighs the same, whatever the method's weights are, and the denominator does not depend on who came: one client
moves D by C at most. A cohort may be empty; then x moves by noise alone. The method sees one upload, the noisy mean, so what it
does to it afterwards (FedSVD's SVD, a server optimizer) costs nothing.

With `quantile` C follows that quantile of the clients' norms (Andrew et al., NeurIPS 2021, arXiv:1905.03871, algorithm 1):

    b = (sum_k ([||d_k|| <= C] - 1/2) + N(0, s^2)) / m + 1/2;   C <- C exp(-rate (b - quantile))

The count's noise s is paid for by the changes': their z becomes (z^-2 - (2 s)^-2)^(-1/2), and both together cost what z does.

Choices: s is max(m / 20, 2 z), so that z grows by 3 % at most; a refused upload counts as no change; leaves that a client keeps
(FedSA-LoRA's B) are not protected from that client, whose own they are. The number of clients is public.
The arithmetic is in federation/private.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...errors import Problem, TrainingError
from ...methods.contract import Method, ServerState, Upload
from ...tree import Params
from .guard import Guard, Place, no_mean


@dataclass(frozen=True)
class DP(Guard):
    """Clip every client's change, sum, add noise.

    noise: z, null for the least that `epsilon` allows; norm: C, or where it starts; epsilon, delta: the budget; quantile, rate: of
    adaptive clipping; scores: may be kept in the records where the rows behind them are public.
    """

    name: ClassVar[str] = "dp"
    title: ClassVar[str] = "Differential privacy of clients"
    paper: ClassVar[str] = "arXiv:1710.06963"
    noise: float | None = None
    norm: float = 1.0
    epsilon: float | None = None
    delta: float = 1e-5
    quantile: float | None = None
    rate: float = 0.2
    scores: Literal["withheld", "public"] = "withheld"

    def problems(self) -> list[Problem]:
        bad = []
        if self.noise is None and self.epsilon is None:
            bad.append(Problem("noise", None, "a number >= 0, or an epsilon to find it by", "1 is usual"))
        if self.noise is not None and not 0 <= self.noise < math.inf:
            bad.append(Problem("noise", self.noise, "a number >= 0 or null", "0 only clips, and promises nothing"))
        if not 0 < self.norm < math.inf:
            bad.append(Problem("norm", self.norm, "a number > 0", "0.1 to 10 are in use"))
        if self.epsilon is not None and not 0 < self.epsilon < math.inf:
            bad.append(Problem("epsilon", self.epsilon, "a number > 0 or null", "1 to 8 are in use"))
        if self.noise == 0 and self.epsilon is not None:
            bad.append(Problem("epsilon", self.epsilon, "null, since noise is 0", "set noise to null to find it"))
        if not 0 < self.delta < 1:
            bad.append(Problem("delta", self.delta, "a number in (0, 1)", "less than 1 / clients"))
        if self.quantile is not None and not 0 < self.quantile < 1:
            bad.append(Problem("quantile", self.quantile, "a number in (0, 1) or null", "0.5 is usual"))
        if not self.rate > 0:
            bad.append(Problem("rate", self.rate, "a number > 0", "0.2 is the paper's"))
        return bad

    def cannot(self, method: Method) -> str | None:
        return no_mean(
            method, "what one client sends decides how others' count or are cut, and nobody has bounded by how much"
        )

    def beside(self, other: Guard) -> str | None:
        if type(other).arrive is not Guard.arrive:
            return f"{other.name} compares uploads with each other, so one client would change what others count"
        if other.encodes:
            return f"{other.name} sends later what it has cut now, so a round's change is no bounded part of a client"
        return None

    @property
    def withholds(self) -> bool:
        return self.scores == "withheld"

    def placed(self, place: Place) -> Guard:
        from ..private import Placed

        return Placed(self, place)

    def opened(
        self, server: ServerState, state: Params, like: Callable[[], Params], weight: Callable[[Upload], float]
    ) -> Guard:
        raise TrainingError(
            "the guard dp needs a Federation, which knows how many clients there are and who takes part"
        )
