"""Partitions and splits: exact covers, pure functions, the skew that was asked for.

Kills: a split that draws a second Dirichlet; a client left short; a row given twice; a partition that depends on order.
"""

from __future__ import annotations

import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest

from fedlora.data.examples import Arrays, Rows
from fedlora.data.federated import FederatedData, roster
from fedlora.data.partition import Given, Partition, label_permutation
from fedlora.data.partitions import PARTITIONS
from fedlora.data.partitions.classes import classes_per_client
from fedlora.data.partitions.column import by_column
from fedlora.data.partitions.dirichlet import dirichlet
from fedlora.data.partitions.iid import iid
from fedlora.data.partitions.label_sorting import label_sorting
from fedlora.data.split import histograms, like, split
from fedlora.errors import ConfigError, DataError
from fedlora.seeds import np_rng

LABELS = np_rng("labels").integers(0, 5, 1000)
# Those that give every row away.
KINDS: dict[str, Partition] = {
    "iid": PARTITIONS["iid"](),
    "dirichlet": PARTITIONS["dirichlet"](alpha=0.3),
    "label-sorting": PARTITIONS["label-sorting"](share=0.5),
    "classes": PARTITIONS["classes"](classes=2),
    "quantity": PARTITIONS["quantity"](alpha=0.3),
    "domain": PARTITIONS["domain"](domains=1),
}


def test_every_partition_is_here() -> None:
    assert set(KINDS) == {name for name, cls in PARTITIONS.items() if not cls.natural}


def divided(kind: str, seed: int, least: int) -> Rows:
    return KINDS[kind].rows(Given(LABELS, 12, seed, least, LABELS, range(5)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("least", [0, 1, 40])
def test_every_row_has_one_owner_and_nobody_is_short(kind: str, least: int) -> None:
    r = divided(kind, 3, least)
    assert len(r) == 12
    assert sorted(r.rows) == list(range(1000))
    assert r.sizes.min() >= least
    assert all((np.diff(r[k]) > 0).all() for k in range(12))


@pytest.mark.parametrize("kind", KINDS)
def test_a_partition_is_a_function_of_its_seed(kind: str) -> None:
    a, b, c = (divided(kind, s, 1) for s in (0, 0, 1))
    assert np.array_equal(a.rows, b.rows)
    assert np.array_equal(a.offsets, b.offsets)
    assert not np.array_equal(a.rows, c.rows)


def test_iid_sizes_differ_by_one() -> None:
    assert set(iid(1000, 7, 0).sizes) == {142, 143}


@pytest.mark.parametrize("alpha", [0.05, 100.0])
def test_dirichlet_skew(alpha: float) -> None:
    """Mean over clients of the largest class share: near 1 for a small alpha, near the class share for a large one."""
    r = dirichlet(LABELS, 10, alpha, 0, 20)
    h = histograms(r, LABELS, 5)
    share = (h.max(1) / h.sum(1)).mean()
    assert share > 0.75 if alpha < 1 else share < 0.35


def test_dirichlet_agrees_with_flwr_datasets() -> None:
    """The same rule: over many seeds the same mean skew, within sampling error."""
    flwr = pytest.importorskip("flwr_datasets.partitioner")
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"y": LABELS.tolist()})
    ours, theirs = [], []
    for seed in range(25):
        h = histograms(dirichlet(LABELS, 5, 0.5, seed, 0), LABELS, 5)
        ours.append((h.max(1) / np.maximum(h.sum(1), 1)).mean())
        other = flwr.DirichletPartitioner(5, "y", 0.5, min_partition_size=0, self_balancing=False, seed=seed)
        other.dataset = data
        counts = np.array([np.bincount(other.load_partition(k)["y"], minlength=5) for k in range(5)])
        theirs.append((counts.max(1) / np.maximum(counts.sum(1), 1)).mean())
    error = (np.var(ours) / 25 + np.var(theirs) / 25) ** 0.5
    assert abs(np.mean(ours) - np.mean(theirs)) < 4 * error


def literal_sorting(labels: np.ndarray, clients: int, share: float, order: np.ndarray) -> list[list[int]]:
    """PF2LoRA's rule word by word; `order` is the shuffled pool."""
    sorted_pool = []
    for c in sorted(set(labels.tolist())):
        rows = [i for i, y in enumerate(labels) if y == c]
        sorted_pool += rows[int((1 - share) * len(rows) + 1e-9) :]
    out: list[list[int]] = []
    for j in range(clients):
        part = []
        for pool in (list(order), sorted_pool):
            a, b = (-(-len(pool) * x // clients) for x in (j, j + 1))
            part += pool[a:b]
        out.append(sorted(part))
    return out


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_label_sorting_against_its_text(share: float) -> None:
    labels = LABELS[:97]
    r = label_sorting(labels, 6, share, 0, 0)
    shuffled = [
        i for c in range(5) for i in np.flatnonzero(labels == c)[: int((1 - share) * (labels == c).sum() + 1e-9)]
    ]
    order = np_rng(0, "partition", "label-sorting").permutation(np.array(shuffled, np.int64))
    assert [list(r[k]) for k in range(6)] == literal_sorting(labels, 6, share, order)
    if share == 1.0:
        h = histograms(r, labels, 5)
        assert (h > 0).sum() <= 6 + 5 - 1  # sorted: neighbours share at most one class


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_classes_per_client(classes: int) -> None:
    h = histograms(classes_per_client(LABELS, 15, classes, 0, 0), LABELS, 5)
    assert ((h > 0).sum(1) == classes).all()
    holders = (h > 0).sum(0)
    assert holders.max() - holders.min() <= 1
    for c in range(5):
        have = h[:, c][h[:, c] > 0]
        assert have.max() - have.min() <= 1


def test_natural_clients() -> None:
    column = np.array([2, 0, 2, 1, 2, 0])
    r, ids = by_column(column, ["x", "y", "z"], 1)
    assert ids == ["x", "y", "z"]
    assert [list(r[k]) for k in range(3)] == [[1, 5], [3], [0, 2, 4]]
    r, ids = by_column(column, ["x", "y", "z"], 2)
    assert ids == ["x", "z"]
    assert [list(r[k]) for k in range(2)] == [[1, 5], [0, 2, 4]]
    with pytest.raises(DataError, match=r"none of the 3 natural clients has min_size=9 rows, the largest has 3"):
        by_column(column, ["x", "y", "z"], 9)


def test_label_permutations() -> None:
    maps = label_permutation(50, 5, 0)
    assert (np.sort(maps, 1) == np.arange(5)).all()
    assert len({tuple(m) for m in maps}) > 30
    assert np.array_equal(label_permutation(3, 5, 0), maps[:3])  # not a matter of how many there are


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"2000 clients with at least min_size=1 rows each need 2000 rows, the data has 1000"
    ):
        iid(1000, 2000, 0, 1)
    with pytest.raises(ConfigError, match=r"partition.alpha: got 0, expected a finite number > 0"):
        dirichlet(LABELS, 3, 0, 0)
    with pytest.raises(ConfigError, match=r"partition.share: got 1.5"):
        label_sorting(LABELS, 3, 1.5, 0)
    with pytest.raises(ConfigError, match=r"partition.classes: got 6, expected a number from 1 to 5"):
        classes_per_client(LABELS, 3, 6, 0)
    with pytest.raises(ConfigError, match=r"at least 2, because 3 clients with 1 each cannot hold 5"):
        classes_per_client(LABELS, 3, 1, 0)


# splits -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "classes"])
def test_splits_of_a_client_have_its_proportions(kind: str) -> None:
    """Every label of every client: its share of the split, less or more than one apart. No row in two splits."""
    r = divided(kind, 0, 20)
    parts = split(r, LABELS, {"validation": 0.1, "test": 0.2}, 0)
    assert sorted(np.concatenate([x.rows for x in parts.values()])) == list(range(1000))
    whole = histograms(r, LABELS, 5)
    for name, share in (("validation", 0.1), ("test", 0.2), ("train", 0.7)):
        h = histograms(parts[name], LABELS, 5)
        assert (abs(h - whole * share) <= 2).all(), name
    for k in range(12):
        assert set(np.concatenate([x[k] for x in parts.values()])) == set(r[k])


def test_sizes_of_splits_are_rounded() -> None:
    """By hand for one client of n rows and for many: n * share, a half to the even number; the larger share first."""
    for n, validation, test in ((17, 2, 3), (26, 3, 5), (19, 2, 4), (90, 9, 18), (8, 1, 2), (4, 1, 1)):
        parts = split(iid(n, 1, 0), np.zeros(n, np.int64), {"validation": 0.1, "test": 0.2}, 0)
        assert {k: int(v.sizes[0]) for k, v in parts.items()} == {
            "train": n - validation - test, "validation": validation, "test": test,
        }, n  # fmt: skip


def test_small_clients_keep_a_training_row() -> None:
    r = Rows(np.array([0, 1, 3, 6]), np.arange(6))
    parts = split(r, np.zeros(6, np.int64), {"validation": 0.1, "test": 0.2}, 0)
    assert list(parts["train"].sizes) == [1, 1, 1]
    assert list(parts["test"].sizes) == [0, 1, 1]
    assert list(parts["validation"].sizes) == [0, 0, 1]


def test_every_class_can_be_learned() -> None:
    labels = np.array([0] * 20 + [1])
    for seed in range(20):
        parts = split(iid(21, 2, seed), labels, {"test": 0.5}, seed)
        assert 1 in labels[parts["train"].rows]


def test_regression_targets_are_spread_evenly() -> None:
    values = np_rng("y").normal(size=400)
    parts = split(iid(400, 1, 0), values, {"test": 0.25}, 0)
    order = np.argsort(np.argsort(values))
    ranks = np.sort(order[parts["test"].rows])
    assert np.diff(ranks).max() <= 5  # every fourth value, not a lump


def test_a_test_file_is_shared_out_like_training() -> None:
    r = dirichlet(LABELS, 8, 0.3, 0, 10)
    new = np_rng("new").integers(0, 5, 600)
    got = like(r, LABELS, new, 0)
    assert sorted(got.rows) == list(range(600))
    have, want = histograms(r, LABELS, 5), histograms(got, new, 5)
    expected = have / have.sum(0) * np.bincount(new, minlength=5)
    assert (abs(want - expected) <= 1).all()
    with pytest.raises(DataError, match=r"'five' occurs in 2 test or validation rows but in no training row"):
        like(r, LABELS, np.array([0, 5, 5]), 0, ["zero", "one", "two", "three", "four", "five"])


def test_single_rows_of_a_test_file_go_to_all_holders_alike() -> None:
    """Four clients hold each of 400 labels once; a test file has one row of each. Nobody is served first: each gets about 100."""
    classes = 400
    labels = np.tile(np.arange(classes), 4)
    r = Rows(np.arange(5) * classes, np.arange(4 * classes))
    got = like(r, labels, np.arange(classes), 0)
    assert (abs(got.sizes - 100) < 5 * (classes * 0.25 * 0.75) ** 0.5).all()  # five deviations of a fair draw


def test_a_hundred_thousand_clients() -> None:
    """Over a million rows: work and memory are those of a few arrays of rows, without a call or an object per client."""
    labels = np_rng("million").integers(0, 10, 1_000_000)
    for make in (
        lambda: iid(1_000_000, 100_000, 0),
        lambda: dirichlet(labels, 100_000, 0.5, 0),
        lambda: classes_per_client(labels, 100_000, 2, 0),
    ):
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            r = make()
        finally:
            sys.setprofile(None)
        assert len(r) == 100_000
        assert calls < 10_000
    tracemalloc.start()
    parts = split(iid(1_000_000, 100_000, 0), labels, {"test": 0.2}, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300 * 1_000_000
    assert parts["train"].sizes.sum() + parts["test"].sizes.sum() == 1_000_000


def test_what_needs_no_model() -> None:
    """By hand: client a has mostly class 1 in training and 1 of 4 in test, b mostly 0 and 2 of 2; c has no test rows; d never
    trains."""
    labels = np.array([1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 1])
    rows = {
        "train": ([0, 1, 2], [7, 8, 9], [12], []),
        "test": ([3, 4, 5, 6], [10, 11], [], [13, 14]),
    }

    def held(parts: tuple[list[int], ...]) -> Rows:
        return Rows(np.cumsum([0, *map(len, parts)]), np.concatenate([np.array(x, np.int64) for x in parts]))

    splits = {n: held(parts) for n, parts in rows.items()}
    data = FederatedData(Arrays({"labels": labels}), "abcd", splits, ("no", "yes"), unseen=1)
    assert data.constant() == pytest.approx((1 / 4 + 2 / 2) / 2)
    assert (
        FederatedData(Arrays({"labels": labels}), "abcd", {"train": splits["train"]}, ("no", "yes")).constant() is None
    )
    assert roster("ab", {"train": [3, 4], "test": [1, 1]}, ("no", "yes")).constant() is None
