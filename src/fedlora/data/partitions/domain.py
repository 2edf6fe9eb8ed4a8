"""Feature shift: each client holds some values of a column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..examples import Rows
from .classes import classes_per_client
from .partition import Given, Partition


def domain(column: np.ndarray, clients: int, domains: int, seed: int, min_size: int = 1) -> Rows:
    """Feature shift: each client holds `domains` values of a column (int64 [n]), by the rule of `classes_per_client`."""
    return classes_per_client(column, clients, domains, seed, min_size, "partition.domains")


@dataclass(frozen=True)
class Domain(Partition):
    """Each client holds so many values of the column."""

    name: ClassVar[str] = "domain"
    by_column: ClassVar[bool] = True
    domains: int = 1

    def rows(self, given: Given) -> Rows:
        return domain(given.codes, given.clients, self.domains, given.seed, given.min_size)
