"""Train, validation and test rows of a client: cut from its own rows, or taken from a separate file to match them.

Both keep the label proportions of each client. They never draw twice from a Dirichlet distribution, which would give a
client's test data another skew than its training data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import ConfigError, DataError, Problem
from ..seeds import np_rng
from .examples import Rows
from .partition import group


def split(rows: Rows, labels: np.ndarray, shares: Mapping[str, float], seed: int) -> dict[str, Rows]:
    """Cut each client's rows into "train" and the named splits, each label in proportion.

    labels [n]: class ids, or real values (then the splits match in distribution); shares such as {"validation": 0.1, "test": 0.2}.
    A client with n rows has n * share rows in a split, rounded; at least one if it has a row for every split, and training always
    has at least one: a client with few rows goes without the smaller splits first. Within a client each label is in a split n_label * share
    times, less or more than one apart. A class id that would be in nobody's training rows moves there.
    """
    _check(shares)
    sizes = rows.sizes
    clients = np.repeat(np.arange(len(rows)), sizes)
    # By label inside each client, ties at random: any even spacing along this order is in proportion.
    order = np.lexsort((np_rng(seed, "split").random(len(rows.rows)), labels[rows.rows], clients))
    part = np.full(len(order), -1)  # the split of each place in the order: -1 for training, i for the i-th split
    left = np.arange(len(order))
    for i, take in enumerate(_counts(sizes, list(shares.values()))):
        have = np.bincount(clients[left], minlength=len(rows))
        at = np.arange(len(left)) - np.repeat(np.cumsum(have) - have, have)
        shift = np_rng(seed, "split", i).integers(0, np.maximum(have, 1))
        m, t, u = (np.repeat(v, have) for v in (have, take, shift))
        chosen = ((at + 1) * t + u) // m > (at * t + u) // m  # takes exactly t of m places, evenly spaced
        part[left[chosen]] = i
        left = left[~chosen]
    if labels.dtype.kind in "iu" and len(order):
        _learnable(part, labels[rows.rows[order]])
    taken = np.empty(len(order), np.int64)
    taken[order] = part
    return {name: _subset(rows, clients, taken == i) for i, name in enumerate(["train", *shares], -1)}


def _check(shares: Mapping[str, float]) -> None:
    bad = [Problem(f"partition.{n}", s, "a share from 0 to below 1") for n, s in shares.items() if not 0 <= s < 1]
    if not bad and sum(shares.values()) >= 1:
        bad = [
            Problem(
                f"partition.{'+'.join(shares)}",
                sum(shares.values()),
                "below 1 in all, to leave rows to train on",
                "lower one of them",
            )
        ]
    if bad:
        raise ConfigError(bad)


def _counts(sizes: np.ndarray, shares: Sequence[float]) -> list[np.ndarray]:
    """Rows of each client in each split, int64 [clients] each."""
    takes = [np.rint(sizes * share).astype(np.int64) for share in shares]
    room = np.maximum(sizes - 1, 0)
    for i in sorted(range(len(shares)), key=lambda i: -shares[i]):  # large shares take their rows first
        if shares[i] > 0:
            takes[i] = np.maximum(takes[i], np.minimum(room, 1))
            later = sum(
                1 for j in range(len(shares)) if 0 < shares[j] < shares[i] or (shares[j] == shares[i] and j > i)
            )
            takes[i] = np.minimum(takes[i], np.maximum(room - later, np.minimum(room, 1)))
        room = room - takes[i]
    return takes


def _learnable(part: np.ndarray, labels: np.ndarray) -> None:
    """Move one row of each label that no training set has to training, in place."""
    present, first = np.unique(labels, return_index=True)
    trained = np.unique(labels[part < 0])
    part[first[~np.isin(present, trained)]] = -1


def _subset(rows: Rows, clients: np.ndarray, keep: np.ndarray) -> Rows:
    offsets = np.concatenate([[0], np.cumsum(np.bincount(clients[keep], minlength=len(rows)))])
    return Rows(offsets.astype(np.int64), rows.rows[keep])


def like(rows: Rows, labels: np.ndarray, new_labels: np.ndarray, seed: int, names: Sequence[str] = ()) -> Rows:
    """Give the rows of another file to the clients, each label in proportion to who holds it in training.

    rows, labels int64 [n]: the training rows of each client and their labels; new_labels int64 [m]. Each new row goes to exactly one
    client. A client that holds a share q of a label's training rows gets q * m_label of the new ones, rounded up or down.
    Raises DataError for a label that nobody trains on. names: how to call the labels in that error.
    """
    held = labels[rows.rows]
    classes = int(max(held.max(initial=-1), new_labels.max(initial=-1))) + 1
    have, want = (np.bincount(v, minlength=classes) for v in (held, new_labels))
    lost = np.flatnonzero((want > 0) & (have == 0))
    if len(lost):
        shown = ", ".join(repr(names[v] if v < len(names) else int(v)) for v in lost[:5])
        raise DataError(f"partition: {shown} occurs in {want[lost].sum()} test or validation rows but in no training row; "
                        "remove those rows, or give training data that has it")  # fmt: skip
    owners_by_label = np.repeat(np.arange(len(rows)), rows.sizes)[np.argsort(held, kind="stable")]
    shuffled = np_rng(seed, "like").permutation(len(new_labels))
    order = shuffled[np.argsort(new_labels[shuffled], kind="stable")]
    rank = np.arange(len(order)) - np.repeat(np.cumsum(want) - want, want)
    start = np_rng(seed, "like", "start").random(classes)
    h, w, first, u = (np.repeat(v, want) for v in (have, want, np.cumsum(have) - have, start))
    owners = np.empty(len(new_labels), np.int64)
    owners[order] = owners_by_label[first + np.minimum(((rank + u) * h / np.maximum(w, 1)).astype(np.int64), h - 1)]
    return group(owners, len(rows))


def histograms(rows: Rows, labels: np.ndarray, classes: int) -> np.ndarray:
    """Rows of each class that each client holds, int64 [clients classes]."""
    clients = np.repeat(np.arange(len(rows)), rows.sizes)
    return np.bincount(clients * classes + labels[rows.rows], minlength=len(rows) * classes).reshape(len(rows), classes)
