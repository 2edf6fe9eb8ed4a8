"""Epsilon and delta of rounds with noise, counted by dp-accounting (pip install 'fedlora[privacy]').

Neighbours are data sets that differ in one whole client, and epsilon depends on how the clients of a round are chosen:

    poisson     every client takes part with probability q, alone       one client more or less   PoissonSampled(q, Gaussian(z))
    everybody   all clients, in every round                             one client more or less   Gaussian(z)
    uniform     n of N clients without replacement, anew each round     one client exchanged      SampledWithoutReplacement(N, n, Gaussian(z/2))
    fixed       one cohort for the whole run                            one client exchanged      Gaussian(z/2)

z is the noise's standard deviation over the clip norm C. Where a client is exchanged for another, the sum of clipped changes
moves by up to 2 C, hence z/2. Renyi accounting (Mironov et al., arXiv:1908.10530; Wang et al., arXiv:1808.00087) knows all four
events, privacy loss distributions (Koskela et al., arXiv:1906.03049) all but sampling without replacement; both are upper
bounds, so the smaller one counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from ..errors import FedloraError

Cohort = Literal["poisson", "everybody", "uniform", "fixed"]
# Of privacy losses on their grid. The result is an upper bound at every step; a tenth of it is ten times as slow and changes
# epsilon in the fifth digit for hundreds of rounds, and by 1 % for ten thousand.
STEP = 1e-3
# Renyi orders. Fractional ones gain little, and for Poisson sampling their series may not converge, which is then printed.
ORDERS = (*range(2, 64), 80, 96, 128, 192, 256, 512, 1024)


def library() -> Any:
    """dp_accounting, or a FedloraError that says what to install."""
    try:
        import dp_accounting
    except ModuleNotFoundError as e:
        if e.name != "dp_accounting":
            raise
        raise FedloraError(
            "differential privacy needs the package dp-accounting, which is not installed: pip install 'fedlora[privacy]'"
        ) from e
    return dp_accounting


@dataclass(frozen=True)
class Mechanism:
    """What one round releases. noise: z; clients: N; expected: clients of a round, in the mean under Poisson sampling."""

    noise: float
    cohort: Cohort
    clients: int
    expected: float

    @property
    def exchanges(self) -> bool:
        """Whether neighbours exchange a client; one is more or less otherwise."""
        return self.cohort in ("uniform", "fixed")

    def event(self) -> Any:
        """The round as dp-accounting has it."""
        dp = library()
        if self.cohort == "poisson":
            return dp.PoissonSampledDpEvent(min(1.0, self.expected / self.clients), dp.GaussianDpEvent(self.noise))
        if self.cohort == "uniform":
            inner = dp.GaussianDpEvent(self.noise / 2)
            return dp.SampledWithoutReplacementDpEvent(self.clients, int(self.expected), inner)
        return dp.GaussianDpEvent(self.noise / 2 if self.exchanges else self.noise)

    def renyi(self, rounds: int, delta: float) -> float:
        """Epsilon of so many rounds by Renyi accounting; inf without noise."""
        return 0.0 if rounds == 0 else _renyi(self, rounds, delta)

    def losses(self, rounds: int, delta: float) -> float | None:
        """Epsilon by privacy loss distributions; None for an event that they do not have."""
        return 0.0 if rounds == 0 else _losses(self, rounds, delta)

    def epsilon(self, rounds: int, delta: float) -> float:
        """The smaller of the two bounds."""
        found = self.losses(rounds, delta)
        return min(self.renyi(rounds, delta), math.inf if found is None else found)

    def affordable(self, rounds: int, delta: float, budget: float) -> int:
        """The most rounds, up to `rounds`, that cost at most `budget`."""
        if self.renyi(rounds, delta) <= budget or self.epsilon(rounds, delta) <= budget:
            return rounds
        low, high = 0, rounds
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.epsilon(middle, delta) <= budget else (low, middle)
        return low


@lru_cache(maxsize=4096)
def _renyi(m: Mechanism, rounds: int, delta: float) -> float:
    if m.noise == 0:
        return math.inf
    from dp_accounting import NeighboringRelation as Relation
    from dp_accounting import rdp

    library()
    relation = Relation.REPLACE_ONE if m.exchanges else Relation.ADD_OR_REMOVE_ONE
    accountant = rdp.RdpAccountant(orders=ORDERS, neighboring_relation=relation)
    return float(accountant.compose(m.event(), rounds).get_epsilon(delta))


@lru_cache(maxsize=4096)
def _losses(m: Mechanism, rounds: int, delta: float) -> float | None:
    if m.noise == 0:
        return math.inf
    if m.cohort == "uniform":
        return None
    from dp_accounting import NeighboringRelation as Relation
    from dp_accounting import pld

    # For a Gaussian alone the two relations differ in the sensitivity only, which z/2 has said already.
    accountant = pld.PLDAccountant(Relation.ADD_OR_REMOVE_ONE, value_discretization_interval=STEP)
    return float(accountant.compose(m.event(), rounds).get_epsilon(delta))


def least_noise(cohort: Cohort, clients: int, expected: float, rounds: int, delta: float, budget: float) -> float:
    """The smallest z, to half a percent and rounded up, with which `rounds` rounds cost at most `budget`."""
    library()
    of = lambda z: Mechanism(z, cohort, clients, expected)  # noqa: E731
    # Renyi accounting is quick and asks for too much noise, so it gives the bracket in which the slow one looks.
    high = _least(lambda z: of(z).renyi(rounds, delta), 0.0, 1.0, budget, 0.01)
    if cohort != "uniform":
        high = _least(lambda z: of(z).epsilon(rounds, delta), 0.7 * high, high, budget, 2e-3)
    else:
        high = _least(lambda z: of(z).renyi(rounds, delta), 0.98 * high, high, budget, 2e-3)
    digits = 2 - math.floor(math.log10(high))
    return math.ceil(high * 10**digits) / 10**digits


def _least(cost: Callable[[float], float], low: float, high: float, budget: float, within: float) -> float:
    """The smallest z, to a share `within` of it, that costs at most `budget`; cost falls with z."""
    if low > 0 and cost(low) <= budget:
        low, high = 0.0, low
    while cost(high) > budget:
        low, high = high, high * 2
        if high > 1e6:
            raise FedloraError(f"no noise below 1e6 times the clip norm keeps the run within epsilon {budget:g}")
    while high - low > within * high:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) > budget else (low, middle)
    return high
