"""What a partition is: which client holds which rows, as a pure function of (labels or a column, seed).

Every kind but `column` gives each row to exactly one client and each client at least `min_size` rows: a client that the draw
leaves short takes rows of the largest clients. Time and memory are linear in rows (plus clients x classes random numbers
where the distribution asks for them, one class at a time).

flwr_datasets has partitioners for several of these kinds. They are not used here, because they keep one Python list per
client (100,000 clients over 1,000,000 rows: 8 s and 0.5 ms more for each client, against 0.3 s), answer a client that is too small by
drawing ten times and giving up, and may leave classes out; the tests check that where the rules coincide the results do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..errors import ConfigError, DataError, Problem
from ..seeds import np_rng
from .examples import Rows


@dataclass(frozen=True)
class Given:
    """What is to be divided. labels: int64 [n], zeros where there are no classes; column: int64 [n], the number of each row's
    value in `names`, None where no column was named; clients, min_size, seed: of the recipe."""

    labels: np.ndarray
    clients: int
    seed: int
    min_size: int = 1
    column: np.ndarray | None = None
    names: Sequence[Any] = ()

    @property
    def codes(self) -> np.ndarray:
        """The column, of a kind that needs one."""
        assert self.column is not None
        return self.column


class Partition(ABC):
    """A frozen dataclass whose fields are the options of the recipe's section partition that the kind reads."""

    name: ClassVar[str]  # partition.kind in recipes
    by_label: ClassVar[bool] = False  # needs classes
    by_column: ClassVar[bool] = False  # needs a column
    natural: ClassVar[bool] = False  # the column's values are the clients

    @abstractmethod
    def rows(self, given: Given) -> Rows:
        """Rows of each client. Raises ConfigError and DataError for what cannot be divided so."""

    def ids(self, given: Given) -> list[str]:
        """The clients' ids, in the order of `rows`."""
        return [f"c{k}" for k in range(given.clients)]


def label_permutation(clients: int, classes: int, seed: int) -> np.ndarray:
    """Concept shift, whatever the partition: int64 [clients classes], a random order of the classes for each client; it maps a label to the client's.

    A client's permutation does not depend on how many clients there are.
    """
    return np_rng(seed, "partition", "permutation").permuted(np.tile(np.arange(classes), (clients, 1)), axis=1)


def group(owners: np.ndarray, clients: int, rows: np.ndarray | None = None) -> Rows:
    """Rows of each client in ascending order. owners int64 [n]; rows: those to group, all by default."""
    part = owners if rows is None else owners[rows]
    order = np.argsort(part, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(part, minlength=clients))])
    return Rows(offsets.astype(np.int64), order if rows is None else rows[order])


def by_class(labels: np.ndarray, generator: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows sorted by class, inside a class in their order (or shuffled), and rows of each class that occurs."""
    rows = np.arange(len(labels)) if generator is None else generator.permutation(len(labels))
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return rows[np.argsort(codes[rows], kind="stable")], counts


def fill(owners: np.ndarray, clients: int, min_size: int, generator: np.random.Generator) -> np.ndarray:
    """Owners int64 [n] after clients with fewer than min_size rows have taken random rows of the largest clients."""
    sizes = np.bincount(owners, minlength=clients)
    short = np.maximum(min_size - sizes, 0)
    need = int(short.sum())
    if need == 0:
        return owners
    low, high = min_size, int(sizes.max())
    while low < high:  # the highest size limit for the large clients that frees enough rows for the small ones
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.maximum(sizes - middle, 0).sum() >= need else (low, middle - 1)
    gives = np.maximum(sizes - low, 0)
    gives[np.flatnonzero(gives)[: int(gives.sum()) - need]] -= 1
    order = np.lexsort((generator.random(len(owners)), owners))
    rank = np.arange(len(owners)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    given = order[rank < np.repeat(gives, sizes)]
    filled = owners.copy()
    filled[given] = np.repeat(np.arange(clients), short)
    return filled


def check(n: int, clients: int, min_size: int) -> None:
    """Raise ConfigError or DataError where n rows cannot give every client its least."""
    if clients < 1:
        raise ConfigError([Problem("partition.clients", clients, "an integer >= 1")])
    if min_size < 0:
        raise ConfigError([Problem("partition.min_size", min_size, "an integer >= 0")])
    if n < clients * min_size:
        raise DataError(f"partition: {clients} clients with at least min_size={min_size} rows each need {clients * min_size} rows, the data has "
                        f"{n}; lower partition.clients or partition.min_size, or give more data")  # fmt: skip


def positive(field: str, value: float) -> None:
    """Raise ConfigError unless a field's value is a finite number above zero."""
    if not 0 < value < float("inf"):
        raise ConfigError([Problem(field, value, "a finite number > 0")])
