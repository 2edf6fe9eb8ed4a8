"""Label skew by a Dirichlet draw for each class (Hsu et al., arXiv:1909.06335)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...seeds import np_rng
from ..examples import Rows
from ..partition import Given, Partition, by_class, check, fill, group, positive


def dirichlet(labels: np.ndarray, clients: int, alpha: float, seed: int, min_size: int = 1) -> Rows:
    """Label skew: the rows of each class are shared out by a draw from Dirichlet(alpha, ..., alpha) over the clients.

    labels int64 [n]. The rule of Hsu et al. 1909.06335 and NIID-Bench 2102.02079 as flwr_datasets' DirichletPartitioner has it
    without balancing; a small alpha is skewed, in labels and in sizes.
    """
    check(len(labels), clients, min_size)
    positive("partition.alpha", alpha)
    alpha = min(float(alpha), 1e12)  # from here on the shares are equal anyway; a sum of larger values would overflow
    draw = np_rng(seed, "partition", "dirichlet")
    order, counts = by_class(labels, np_rng(seed, "partition", "dirichlet", "rows"))
    owners = np.empty(len(labels), np.int64)
    start = 0
    for m in counts.tolist():
        share = np.cumsum(draw.dirichlet(np.full(clients, alpha)))
        cuts = np.minimum((share * m).astype(np.int64), m)
        cuts[-1] = m
        owners[order[start : start + m]] = np.repeat(np.arange(clients), np.diff(cuts, prepend=0))
        start += m
    return group(fill(owners, clients, min_size, np_rng(seed, "partition", "fill")), clients)


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Label skew. alpha: small is skewed."""

    name: ClassVar[str] = "dirichlet"
    by_label: ClassVar[bool] = True
    alpha: float = 0.5

    def rows(self, given: Given) -> Rows:
        return dirichlet(given.labels, given.clients, self.alpha, given.seed, given.min_size)
