"""Label skew by a share of rows that stay sorted (PF2LoRA, Hao et al., arXiv:2503.03920)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import ConfigError, Problem
from ...seeds import np_rng
from ..examples import Rows
from .partition import Given, Partition, by_class, check, fill, group


def label_sorting(labels: np.ndarray, clients: int, share: float, seed: int, min_size: int = 1) -> Rows:
    """Label skew of PF2LoRA (Hao et al. 2503.03920): `share` 0 is IID, 1 is sorted by label.

    labels int64 [n]. Per label the first (1 - share) of its rows, in their order, goes to a pool that is shuffled, the rest to
    a pool in label order; client j gets the j-th slice of each. A part of a row stays in the sorted pool.
    """
    n = len(labels)
    check(n, clients, min_size)
    if not 0 <= share <= 1:
        raise ConfigError([Problem("partition.share", share, "a number from 0 (IID) to 1 (sorted by label)")])
    order, counts = by_class(labels)
    rank = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)  # of each row within its label
    shuffled = rank < np.repeat(np.floor((1 - share) * counts + 1e-9).astype(np.int64), counts)
    pool = np_rng(seed, "partition", "label-sorting").permutation(order[shuffled])
    owners = np.empty(n, np.int64)
    for rows in (pool, order[~shuffled]):
        owners[rows] = np.arange(len(rows)) * clients // max(len(rows), 1)
    return group(fill(owners, clients, min_size, np_rng(seed, "partition", "fill")), clients)


@dataclass(frozen=True)
class LabelSorting(Partition):
    """Label skew. share: of rows that stay in label order."""

    name: ClassVar[str] = "label-sorting"
    by_label: ClassVar[bool] = True
    share: float = 0.5

    def rows(self, given: Given) -> Rows:
        return label_sorting(given.labels, given.clients, self.share, given.seed, given.min_size)
