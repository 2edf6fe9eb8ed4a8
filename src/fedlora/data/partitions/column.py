"""Natural clients: one for each value of a column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import DataError
from ..examples import Rows
from .partition import Given, Partition, group


def by_column(column: np.ndarray, names: Sequence[Any], min_size: int = 1) -> tuple[Rows, list[str]]:
    """Natural clients: one per value of a column, and their ids. Raises DataError if none is left.

    column int64 [n] numbers the values, names[v] is value v. Nobody's rows are given to anybody else: clients with fewer than
    min_size rows are left out, with their rows.
    """
    sizes = np.bincount(column, minlength=len(names))
    kept = np.flatnonzero(sizes >= max(min_size, 1))
    if not len(kept):
        raise DataError(f"partition: none of the {len(names)} natural clients has min_size={min_size} rows, the largest has "
                        f"{sizes.max(initial=0)}; lower partition.min_size")  # fmt: skip
    number = np.full(len(names), -1)
    number[kept] = np.arange(len(kept))
    owners = number[column]
    return group(owners, len(kept), np.flatnonzero(owners >= 0)), [str(names[v]) for v in kept.tolist()]


@dataclass(frozen=True)
class ByColumn(Partition):
    """The values of the column are the clients."""

    name: ClassVar[str] = "column"
    by_column: ClassVar[bool] = True
    natural: ClassVar[bool] = True

    def rows(self, given: Given) -> Rows:
        return by_column(given.codes, given.names, given.min_size)[0]

    def ids(self, given: Given) -> list[str]:
        return by_column(given.codes, given.names, given.min_size)[1]
