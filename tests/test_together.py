"""partition.group: all rows of one group go to one client and to one side of its split, whatever the kind.

Kills: groups torn by the partition, by the split, by a file for testing, by what repairs small clients or lost classes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import rows, write_csv, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlora as fl
from fedlora.data.examples import Rows
from fedlora.data.partitions import PARTITIONS
from fedlora.errors import DataError
from fedlora.recipe import Recipe, build


def whole(splits: dict[str, Rows], groups: np.ndarray) -> None:
    """No group is at two clients or on two sides. Checked row by row, in plain Python."""
    where: dict[Any, tuple[str, int]] = {}
    for side, r in splits.items():
        for k in range(len(r)):
            for row in r[k].tolist():
                assert where.setdefault(groups[row], (side, k)) == (side, k)


def drawn(
    kind: str, seed: int, n: int, groups: int, clients: int, **more: Any
) -> tuple[fl.FederatedData, np.ndarray, np.ndarray]:
    g = np.random.default_rng(seed)
    group = np.concatenate([np.arange(groups), g.integers(0, groups, n - groups)])
    site = (np.arange(groups) % 5)[group]  # inside one client or domain
    # A group counts as its most frequent class, and "classes" needs groups of all four.
    labels = (group + (0 if kind == "classes" else g.integers(0, 2, n))) % 4
    labels[:4] = range(4)
    options = {"column": {"by": site}, "domain": {"by": site, "domains": 5}, "classes": {"classes": 4}}.get(kind, {})
    if kind != "column":
        options["clients"] = clients
    data = fl.from_arrays(
        {"x": np.zeros((n, 1), np.float32), "labels": labels}, kind=kind, seed=seed, together=[f"p{x}" for x in group],
        validation=0.2, test=0.2, **options, **more,
    )  # fmt: skip
    return data, group, labels


@pytest.mark.parametrize("kind", sorted(PARTITIONS))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(12, 60), clients=st.integers(1, 6))
def test_no_group_is_torn(kind: str, seed: int, groups: int, clients: int) -> None:
    """And every row has an owner, every client a row, and every class is trained."""
    data, group, labels = drawn(kind, seed, 200, groups, clients)
    whole(dict(data.splits), group)
    held = np.concatenate([r.rows for r in data.splits.values()])
    assert sorted(held.tolist()) == list(range(200))
    sizes = sum(r.sizes for r in data.splits.values())
    assert (np.asarray(sizes) > 0).all()
    assert set(labels[data.splits["train"].rows]) == set(labels)


def test_small_clients_take_whole_groups() -> None:
    data, group, _ = drawn("quantity", 3, 400, 60, 8, min_size=30, alpha=0.2)
    whole(dict(data.splits), group)
    assert min(np.sum([r.sizes for r in data.splits.values()], axis=0)) >= 30
    with pytest.raises(DataError, match=r"partition\.group: no group is left"):
        drawn("iid", 3, 400, 8, 8, min_size=50)
    with pytest.raises(DataError, match=r"partition\.group: 5 groups for 8 clients"):
        drawn("iid", 3, 400, 5, 8)


def test_shares_are_those_of_groups() -> None:
    data, group, _ = drawn("iid", 1, 2000, 500, 4)
    for side in ("validation", "test"):
        r = data.splits[side]
        for k in range(4):
            mine = np.concatenate([s[k] for s in data.splits.values()])
            assert len(set(group[r[k]])) == pytest.approx(0.2 * len(set(group[mine])), abs=1)


def test_unseen_clients_keep_their_groups() -> None:
    data, group, _ = drawn("dirichlet", 1, 300, 60, 5, unseen=2)
    assert data.unseen == 2
    whole(dict(data.splits), group)


def test_a_group_of_two_natural_clients_is_refused() -> None:
    x = {"x": np.zeros((40, 1), np.float32), "labels": np.arange(40) % 2}
    with pytest.raises(DataError, match=r"the group 'p3' has rows of 'a' and of 'b' .* \(1 groups do\)"):
        fl.from_arrays(
            x, kind="column", by=["a"] * 20 + ["b"] * 20, together=[f"p{3 if i == 30 else i // 4}" for i in range(40)]
        )


def table(n: int, first: int = 0) -> list[tuple[str, ...]]:
    return [(t, label, who, f"passage {first + i // 3}") for i, (t, label, who) in enumerate(rows(n))]


HEADER = ("text", "label", "who", "passage")


def test_a_recipe_names_the_column(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    write_csv(tmp_path / "rows.csv", table(120), HEADER)
    plain = Recipe.load(write_recipe(tmp_path))
    recipe = Recipe.load(write_recipe(tmp_path, partition={"group": "passage"}))
    assert recipe.hash != plain.hash
    data = build.data_of(recipe, build.tokenizer_of(recipe))
    whole(dict(data.splits), np.arange(120) // 3)
    with pytest.raises(AssertionError):
        whole(dict(build.data_of(plain, build.tokenizer_of(plain)).splits), np.arange(120) // 3)
    with pytest.raises(DataError, match=r"partition\.group: no column 'passages' .* did you mean 'passage'"):
        build.data_of(recipe.override("partition.group=passages"), build.tokenizer_of(recipe))


def test_a_test_file_has_groups_of_its_own(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    write_csv(tmp_path / "rows.csv", table(120), HEADER)
    write_csv(tmp_path / "test.csv", table(60, 100), HEADER)
    recipe = Recipe.load(
        write_recipe(tmp_path, partition={"group": "passage"}, data={"test": str(tmp_path / "test.csv")})
    )
    data = build.data_of(recipe, build.tokenizer_of(recipe))
    whole(dict(data.splits), np.concatenate([np.arange(120) // 3, 100 + np.arange(60) // 3]))
    assert sorted(data.splits["test"].rows.tolist()) == list(range(120, 180))
    write_csv(tmp_path / "test.csv", table(60, 30), HEADER)
    with pytest.raises(
        DataError, match=re.escape("has rows of 'the training rows' and of 'data.test' in the files (10 groups do)")
    ):
        build.data_of(recipe, build.tokenizer_of(recipe))


def test_a_class_that_is_rare_in_its_groups_is_trained() -> None:
    """One row of the class, in a group whose most frequent class is another; some seeds would put that group aside."""
    labels = np.arange(90) // 45
    labels[50] = 2
    for seed in range(12):
        data = fl.from_arrays({"x": np.zeros((90, 1), np.float32), "labels": labels}, clients=2, seed=seed, together=np.arange(90) // 3,
                              validation=0.3, test=0.3)  # fmt: skip
        assert 50 in data.splits["train"].rows
