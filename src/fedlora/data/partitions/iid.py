"""Rows dealt at random: the kind without any skew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...seeds import np_rng
from ..examples import Rows
from .partition import Given, Partition, check, group


def iid(n: int, clients: int, seed: int, min_size: int = 1) -> Rows:
    """n rows dealt at random; sizes differ by one at most."""
    check(n, clients, min_size)
    owners = np.empty(n, np.int64)
    owners[np_rng(seed, "partition", "iid").permutation(n)] = np.arange(n) % clients
    return group(owners, clients)


@dataclass(frozen=True)
class IID(Partition):
    """Rows dealt at random."""

    name: ClassVar[str] = "iid"

    def rows(self, given: Given) -> Rows:
        return iid(len(given.labels), given.clients, given.seed, given.min_size)
