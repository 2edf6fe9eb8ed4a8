"""The guard dp at work: its place in a run, and the noisy sum of a round (guards/dp.py says which).

What a round carries from its uploads to the next clip norm lies in an object of that round, so the guard itself has no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..methods.contract import Client, Method, ServerState, Upload
from ..tree import Key, Params
from .accountant import Mechanism, least_noise
from .guards.dp import DP
from .guards.guard import Guard, Place
from .noise import gaussian, secret, seeded

NORM = Key("", "", "norm")  # the clip norm of the next round
MARGIN = 1 - 1e-12  # so that rounding does not lift a clipped norm above C


@dataclass(frozen=True)
class Placed(Guard):
    """The guard in a run."""

    rule: DP
    place: Place
    name = DP.name
    title = DP.title

    @property
    def withholds(self) -> bool:
        return self.rule.withholds

    def cannot(self, method: Method) -> str | None:
        return self.rule.cannot(method)

    def beside(self, other: Guard) -> str | None:
        return self.rule.beside(other)

    @property
    def mechanism(self) -> Mechanism:
        """What a round releases; its noise is what the budget allows where the recipe has none. Raises FedloraError."""
        return _mechanism(self.rule.noise, self.rule.epsilon, self.rule.delta, self.place)

    def opened(
        self, server: ServerState, state: Params, like: Callable[[], Params], weight: Callable[[Upload], float]
    ) -> Guard:
        norm = float(state[NORM]) if NORM in state else self.rule.norm
        draw = secret() if self.place.fresh else seeded(self.place.seed, "dp", server.round)
        return Round(self.rule, self.mechanism, norm, like(), draw)


@lru_cache(maxsize=256)
def _mechanism(noise: float | None, epsilon: float | None, delta: float, p: Place) -> Mechanism:
    if noise is None:
        assert epsilon is not None
        noise = least_noise(p.cohort, p.clients, p.expected, p.rounds, delta, epsilon)
    return Mechanism(noise, p.cohort, p.clients, p.expected)


class Round(Guard):
    """One aggregation. like: the leaves that clients upload in this round."""

    name = DP.name
    title = DP.title

    def __init__(
        self, rule: DP, mechanism: Mechanism, norm: float, like: Params, draw: Callable[[tuple[int, ...]], Tensor]
    ):
        self.rule, self.norm, self.like, self.draw = rule, norm, like, draw
        self.noise, self.expected = mechanism.noise, mechanism.expected
        self.share: float | None = None  # of clients whose norm is at most C, with noise

    @property
    def count_noise(self) -> float:
        """s, the standard deviation on the number of clients below C."""
        return max(self.expected / 20, 2 * self.noise) if self.noise else 0.0

    @property
    def std(self) -> float:
        """Of the noise on each entry of the sum."""
        z = self.noise
        if self.rule.quantile is not None and z:
            z = (z**-2 - (2 * self.count_noise) ** -2) ** -0.5
        return z * self.norm

    def arrive(self, uploads: Iterable[Upload], server: ServerState) -> Iterable[Upload]:
        x = {k: server.params[k] for k in self.like}
        total = {k: torch.zeros(v.shape, dtype=torch.float64) for k, v in x.items()}
        below = 0.0
        for u in uploads:
            d = {k: u.params[k].double() - v.double() for k, v in x.items()}
            size = float(torch.stack([torch.linalg.vector_norm(v) for v in d.values()]).norm())
            below += (size <= self.norm) - 0.5
            clipped_ = clipped(d, size, self.norm)
            for k, v in clipped_.items():
                total[k] += v
        noise = gaussian(total, self.std, self.draw)
        if self.rule.quantile is not None:
            counted = below + float(self.draw((1,))) * self.count_noise
            self.share = counted / self.expected + 0.5
        mean = {k: (v.double() + (total[k] + noise[k]) / self.expected).to(v.dtype) for k, v in x.items()}
        yield Upload(Client("the mean of the round", 1), mean)

    def settle(self, new: ServerState, old: ServerState, state: Params) -> tuple[ServerState, Params]:
        if self.rule.quantile is None or self.share is None:
            return new, state
        norm = self.norm * math.exp(-self.rule.rate * (self.share - self.rule.quantile))
        return new, {NORM: torch.tensor(norm, dtype=torch.float64)}


def clipped(d: Params, size: float, norm: float) -> Params:
    """A change d of norm `size`, scaled so that its norm is at most `norm`."""
    return d if size <= norm else {k: v * (norm / size * MARGIN) for k, v in d.items()}
