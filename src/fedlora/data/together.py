"""Rows that stay together (`partition.group`): all questions of a passage go to one client, and to one side of its split.

A group counts as one row whose class is the most frequent one in it. Partitions and splits see these rows alone, so every kind
of partition serves; shares and skews are then those of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from ..seeds import np_rng
from .examples import Rows
from .partition import check, group
from .split import split

FIELD = "partition.group"


@dataclass(frozen=True)
class Together:
    """of int64 [n]: the group of each row; names: of the groups, for errors."""

    of: np.ndarray
    names: Sequence[Any]

    def one_each(self, rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of the groups of `rows`: a row that stands for each, int64 [g], and the group of each of `rows` as 0..g-1.

        labels: of all rows; a row of the most frequent label stands for its group, the first one.
        """
        _, number = np.unique(self.of[rows], return_inverse=True)
        _, label = np.unique(labels[rows], return_inverse=True)
        pairs, first, counts = np.unique(np.stack([number, label]), axis=1, return_index=True, return_counts=True)
        best = np.lexsort((first, -counts, pairs[0]))
        starts = best[np.searchsorted(pairs[0][best], np.arange(int(number.max(initial=-1)) + 1))]
        return rows[first[starts]], number

    def within(self, values: np.ndarray, names: Sequence[Any], field: str) -> None:
        """Raise DataError unless all rows of a group have one of the values int64 [n]."""
        order = np.lexsort((values, self.of))
        torn = np.flatnonzero((np.diff(self.of[order]) == 0) & (np.diff(values[order]) != 0))
        if len(torn):
            a, b = order[torn[0]], order[torn[0] + 1]
            raise DataError(
                f"{FIELD}: the group {self.names[self.of[a]]!r} has rows of {names[values[a]]!r} and of {names[values[b]]!r} in "
                f"{field} ({len(np.unique(self.of[order[torn]])):,} groups do), expected every group inside one; "
                "choose another column for the groups, or give each part a name of its own"
            )

    def apart(self, origin: np.ndarray) -> None:
        """Raise DataError where a group has rows in the training data and in a file for validation or test. origin int8 [n]."""
        where = {0: "the training rows", 1: "data.validation", 2: "data.test"}
        self.within(origin.astype(np.int64), [where[i] for i in range(3)], "the files")


def divided(
    together: Together, rows: np.ndarray, labels: np.ndarray, clients: int, min_size: int, seed: int,
    partition: Callable[[np.ndarray], Rows],
) -> Rows:  # fmt: skip
    """Rows of each client, no group of them apart. partition: which client gets which of the rows that stand for groups, numbered
    as `rows`. Raises DataError where there are too few groups."""
    check(len(rows), clients, min_size)
    chosen, number = together.one_each(rows, labels)
    if len(chosen) < clients:
        raise DataError(f"{FIELD}: {len(chosen)} groups for {clients} clients, expected at least one for each; lower partition.clients, "
                        "or choose a column with more values")  # fmt: skip
    units = partition(chosen)
    owner = np.empty(len(chosen), np.int64)
    owner[units.rows] = np.repeat(np.arange(len(units)), units.sizes)
    owner = _filled(owner, np.bincount(number), clients, min_size, seed)
    return group(owner[number], clients)


def _filled(owner: np.ndarray, sizes: np.ndarray, clients: int, min_size: int, seed: int) -> np.ndarray:
    """Owners of groups after clients with fewer than min_size rows have taken random groups of the largest clients."""
    owner, draw = owner.copy(), np_rng(seed, "partition", "group")
    have = np.bincount(owner, sizes, clients).astype(np.int64)
    while (have < min_size).any():
        poor = int(have.argmin())
        for rich in np.argsort(-have, kind="stable").tolist():
            spare = np.flatnonzero((owner == rich) & (have[rich] - sizes >= min_size))
            if rich != poor and len(spare):
                break
        else:
            raise DataError(f"{FIELD}: no group is left to give client c{poor} min_size={min_size} rows, since groups have up to "
                            f"{sizes.max()}; lower partition.min_size or partition.clients")  # fmt: skip
        moved = int(draw.choice(spare))
        owner[moved] = poor
        have[rich] -= sizes[moved]
        have[poor] += sizes[moved]
    return owner


def split_together(
    together: Together, rows: Rows, labels: np.ndarray, shares: Mapping[str, float], seed: int
) -> dict[str, Rows]:
    """`split` of groups instead of rows: {"train": ..., and the named splits}. Raises ConfigError for shares that are none.

    A class that would be in nobody's training rows moves there with the first group that has it.
    """
    chosen, number = together.one_each(rows.rows, labels)
    clients = np.repeat(np.arange(len(rows)), rows.sizes)
    owner = np.empty(len(chosen), np.int64)
    owner[number] = clients
    units = group(owner, len(rows))
    cut = split(units, labels[chosen], shares, seed)
    names = list(cut)
    side = np.empty(len(chosen), np.int64)
    for i, name in enumerate(names):
        side[cut[name].rows] = i
    if labels.dtype.kind in "iu":
        mine = labels[rows.rows]
        for label in np.setdiff1d(mine, mine[side[number] == names.index("train")]):
            side[number[np.flatnonzero(mine == label)[0]]] = names.index("train")
    return {n: _of(rows, clients, side[number] == i) for i, n in enumerate(names)}


def given(together: Together, new: np.ndarray, labels: np.ndarray, deal: Callable[[np.ndarray], Rows]) -> Rows:
    """Rows of another file for each client. deal: which client gets which of the rows that stand for groups, by their places."""
    chosen, number = together.one_each(new, labels)
    units = deal(chosen)
    owner = np.empty(len(chosen), np.int64)
    owner[units.rows] = np.repeat(np.arange(len(units)), units.sizes)
    return group(owner[number], len(units))


def _of(rows: Rows, clients: np.ndarray, keep: np.ndarray) -> Rows:
    offsets = np.concatenate([[0], np.cumsum(np.bincount(clients[keep], minlength=len(rows)))])
    return Rows(offsets.astype(np.int64), rows.rows[keep])
