"""Size skew: sizes from one Dirichlet draw, rows dealt at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..examples import Rows
from .dirichlet import dirichlet
from .partition import Given, Partition


def quantity(n: int, clients: int, alpha: float, seed: int, min_size: int = 1) -> Rows:
    """Size skew: sizes are shares of n from one draw of Dirichlet(alpha, ..., alpha), rows are dealt at random."""
    return dirichlet(np.zeros(n, np.int64), clients, alpha, seed, min_size)


@dataclass(frozen=True)
class Quantity(Partition):
    """Size skew. alpha: small is skewed."""

    name: ClassVar[str] = "quantity"
    alpha: float = 0.5

    def rows(self, given: Given) -> Rows:
        return quantity(len(given.labels), given.clients, self.alpha, given.seed, given.min_size)
