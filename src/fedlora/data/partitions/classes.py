"""Label skew by a fixed number of classes for each client (McMahan et al., arXiv:1602.05629)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ...errors import ConfigError, Problem
from ...seeds import np_rng
from ..examples import Rows
from ..partition import Given, Partition, by_class, check, fill, group


def classes_per_client(
    labels: np.ndarray, clients: int, classes: int, seed: int, min_size: int = 1, field: str = "partition.classes"
) -> Rows:
    """Label skew: each client holds `classes` classes, and the rows of a class are shared evenly by its holders.

    labels int64 [n]. Classes are drawn so that each has as many holders as any other, give or take one. Where a class has fewer
    rows than holders, some of them go without. McMahan et al. 1602.05629 with two classes; flwr_datasets' PathologicalPartitioner.
    """
    n = len(labels)
    check(n, clients, min_size)
    order, counts = by_class(labels, np_rng(seed, "partition", "classes", "rows"))
    total = len(counts)
    if not 1 <= classes <= total:
        raise ConfigError(
            [Problem(field, classes, f"a number from 1 to {total}, the number of different values in the data")]
        )
    if clients * classes < total:
        raise ConfigError([Problem(field, classes, f"at least {-(-total // clients)}, because {clients} clients with {classes} each cannot hold "
                                   f"{total}", f"raise {field} or partition.clients")])  # fmt: skip
    # Clients form blocks with as many clients as there are classes. Each block has the classes on a circle, in random
    # order. Client j of the block takes `classes` neighbours, from place j * classes on. So the classes of a client
    # are distinct, and the block holds each class equally often.
    circles = np_rng(seed, "partition", "classes").permuted(
        np.tile(np.arange(total), (-(-clients // total), 1)), axis=1
    )
    client = np.arange(clients)
    place = (client % total)[:, None] * classes + np.arange(classes)
    held = circles[(client // total)[:, None], place % total].ravel()  # [clients * classes]
    holders = np.argsort(held, kind="stable") // classes  # clients sorted by the class they hold
    slots = np.bincount(held, minlength=total)
    m, h, first = (np.repeat(v, counts) for v in (counts, slots, np.cumsum(slots) - slots))
    rank = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)
    owners = np.empty(n, np.int64)
    owners[order] = holders[first + rank * h // m]
    return group(fill(owners, clients, min_size, np_rng(seed, "partition", "fill")), clients)


@dataclass(frozen=True)
class Classes(Partition):
    """Each client holds so many classes."""

    name: ClassVar[str] = "classes"
    by_label: ClassVar[bool] = True
    classes: int = 2

    def rows(self, given: Given) -> Rows:
        return classes_per_client(given.labels, given.clients, self.classes, given.seed, given.min_size)
