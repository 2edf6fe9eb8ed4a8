"""Which client holds which rows: pure functions of (labels or a column, seed).

Every function but `by_column` gives each row to exactly one client and each client at least `min_size` rows: a client that
the draw leaves short takes rows of the largest clients. Time and memory are linear in rows (plus clients x classes random
numbers where the distribution asks for them, one class at a time).

flwr_datasets has partitioners for several of these kinds. They are not used here, because they keep one Python list per
client (100,000 clients over 1,000,000 rows: 8 s and 0.5 ms more for each client, against 0.3 s), answer a client that is too small by
drawing ten times and giving up, and may leave classes out; the tests check that where the rules coincide the results do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, Problem
from ..seeds import np_rng
from .examples import Rows


def iid(n: int, clients: int, seed: int, min_size: int = 1) -> Rows:
    """n rows dealt at random; sizes differ by one at most."""
    _check(n, clients, min_size)
    owners = np.empty(n, np.int64)
    owners[np_rng(seed, "partition", "iid").permutation(n)] = np.arange(n) % clients
    return group(owners, clients)


def dirichlet(labels: np.ndarray, clients: int, alpha: float, seed: int, min_size: int = 1) -> Rows:
    """Label skew: the rows of each class are shared out by a draw from Dirichlet(alpha, ..., alpha) over the clients.

    labels int64 [n]. The rule of Hsu et al. 1909.06335 and NIID-Bench 2102.02079 as flwr_datasets' DirichletPartitioner has it
    without balancing; a small alpha is skewed, in labels and in sizes.
    """
    _check(len(labels), clients, min_size)
    _positive("partition.alpha", alpha)
    alpha = min(float(alpha), 1e12)  # even shares long before; the sum of larger ones overflows
    draw = np_rng(seed, "partition", "dirichlet")
    order, counts = _by_class(labels, np_rng(seed, "partition", "dirichlet", "rows"))
    owners = np.empty(len(labels), np.int64)
    start = 0
    for m in counts.tolist():
        share = np.cumsum(draw.dirichlet(np.full(clients, alpha)))
        cuts = np.minimum((share * m).astype(np.int64), m)
        cuts[-1] = m
        owners[order[start : start + m]] = np.repeat(np.arange(clients), np.diff(cuts, prepend=0))
        start += m
    return group(_fill(owners, clients, min_size, np_rng(seed, "partition", "fill")), clients)


def label_sorting(labels: np.ndarray, clients: int, share: float, seed: int, min_size: int = 1) -> Rows:
    """Label skew of PF2LoRA (Hao et al. 2503.03920): `share` 0 is IID, 1 is sorted by label.

    labels int64 [n]. Per label the first (1 - share) of its rows, in their order, goes to a pool that is shuffled, the rest to
    a pool in label order; client j gets the j-th slice of each. A part of a row stays in the sorted pool.
    """
    n = len(labels)
    _check(n, clients, min_size)
    if not 0 <= share <= 1:
        raise ConfigError([Problem("partition.share", share, "a number from 0 (IID) to 1 (sorted by label)")])
    order, counts = _by_class(labels)
    rank = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)  # of each row within its label
    shuffled = rank < np.repeat(np.floor((1 - share) * counts + 1e-9).astype(np.int64), counts)
    pool = np_rng(seed, "partition", "label-sorting").permutation(order[shuffled])
    owners = np.empty(n, np.int64)
    for rows in (pool, order[~shuffled]):
        owners[rows] = np.arange(len(rows)) * clients // max(len(rows), 1)
    return group(_fill(owners, clients, min_size, np_rng(seed, "partition", "fill")), clients)


def classes_per_client(
    labels: np.ndarray, clients: int, classes: int, seed: int, min_size: int = 1, field: str = "partition.classes"
) -> Rows:
    """Label skew: each client holds `classes` classes, and the rows of a class are shared evenly by its holders.

    labels int64 [n]. Classes are drawn so that each has as many holders as any other, give or take one. Where a class has fewer
    rows than holders, some of them go without. McMahan et al. 1602.05629 with two classes; flwr_datasets' PathologicalPartitioner.
    """
    n = len(labels)
    _check(n, clients, min_size)
    order, counts = _by_class(labels, np_rng(seed, "partition", "classes", "rows"))
    total = len(counts)
    if not 1 <= classes <= total:
        raise ConfigError(
            [Problem(field, classes, f"a number from 1 to {total}, the number of different values in the data")]
        )
    if clients * classes < total:
        raise ConfigError([Problem(field, classes, f"at least {-(-total // clients)}, because {clients} clients with {classes} each cannot hold "
                                   f"{total}", f"raise {field} or partition.clients")])  # fmt: skip
    # Clients come in blocks as large as there are classes; within a block client j holds the classes at j * classes, ...
    # of a random circle, so its classes are distinct and the block holds each class equally often.
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
    return group(_fill(owners, clients, min_size, np_rng(seed, "partition", "fill")), clients)


def domain(column: np.ndarray, clients: int, domains: int, seed: int, min_size: int = 1) -> Rows:
    """Feature shift: each client holds `domains` values of a column (int64 [n]), by the rule of `classes_per_client`."""
    return classes_per_client(column, clients, domains, seed, min_size, "partition.domains")


def quantity(n: int, clients: int, alpha: float, seed: int, min_size: int = 1) -> Rows:
    """Size skew: sizes are shares of n from one draw of Dirichlet(alpha, ..., alpha), rows are dealt at random."""
    return dirichlet(np.zeros(n, np.int64), clients, alpha, seed, min_size)


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


def label_permutation(clients: int, classes: int, seed: int) -> np.ndarray:
    """Concept shift: int64 [clients classes], a random order of the classes for each client; it maps a label to the client's.

    A client's permutation does not depend on how many clients there are.
    """
    return np_rng(seed, "partition", "permutation").permuted(np.tile(np.arange(classes), (clients, 1)), axis=1)


# shared by the kinds --------------------------------------------------------------------------------------------------


def group(owners: np.ndarray, clients: int, rows: np.ndarray | None = None) -> Rows:
    """Rows of each client in ascending order. owners int64 [n]; rows: those to group, all by default."""
    part = owners if rows is None else owners[rows]
    order = np.argsort(part, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(part, minlength=clients))])
    return Rows(offsets.astype(np.int64), order if rows is None else rows[order])


def _by_class(labels: np.ndarray, generator: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows sorted by class, inside a class in their order (or shuffled), and rows of each class that occurs."""
    rows = np.arange(len(labels)) if generator is None else generator.permutation(len(labels))
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return rows[np.argsort(codes[rows], kind="stable")], counts


def _fill(owners: np.ndarray, clients: int, min_size: int, generator: np.random.Generator) -> np.ndarray:
    """Owners int64 [n] after clients with fewer than min_size rows have taken random rows of the largest clients."""
    sizes = np.bincount(owners, minlength=clients)
    short = np.maximum(min_size - sizes, 0)
    need = int(short.sum())
    if need == 0:
        return owners
    low, high = min_size, int(sizes.max())
    while low < high:  # the highest ceiling at which what sticks out is enough
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


def _check(n: int, clients: int, min_size: int) -> None:
    if clients < 1:
        raise ConfigError([Problem("partition.clients", clients, "an integer >= 1")])
    if min_size < 0:
        raise ConfigError([Problem("partition.min_size", min_size, "an integer >= 0")])
    if n < clients * min_size:
        raise DataError(f"partition: {clients} clients with at least min_size={min_size} rows each need {clients * min_size} rows, the data has "
                        f"{n}; lower partition.clients or partition.min_size, or give more data")  # fmt: skip


def _positive(field: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError([Problem(field, value, "a finite number > 0")])
