"""Methods over several data sets: Demsar's example, published critical values, and what is claimed where nothing differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import fake

from fedlora.files import sealed
from fedlora.report import datasets, write_comparison
from fedlora.report.read import records

# Four classifiers on 14 data sets: Demsar, JMLR 7 (2006), table 6. It ranks the last but one by more digits than it prints.
NAMES = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")
AUC = """.763 .768 .771 .798  .599 .591 .590 .569  .954 .971 .968 .967  .628 .661 .654 .657  .882 .888 .886 .898  .936 .931 .916 .931
.661 .668 .609 .685  .583 .583 .563 .625  .775 .838 .866 .875  1 1 1 1  .940 .962 .965 .962  .619 .666 .614 .669  .972 .981 .9751 .975
.957 .978 .946 .970"""


def table(values: np.ndarray, names: Any = NAMES) -> dict[str, dict[str, list[float]]]:
    return {n: {f"d{i}": [float(v)] for i, v in enumerate(values[:, j])} for j, n in enumerate(names)}


def test_demsars_example() -> None:
    values = np.array([float(x) for x in AUC.split()]).reshape(14, 4)
    found = datasets.ranks(table(values), lower=False)
    assert [round(r, 3) for r in found.average.values()] == [3.143, 2.000, 2.893, 1.964]
    assert found.apart == pytest.approx(1.25, abs=0.005)
    assert found.p < 0.05 and found.groups == (("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"),)  # 1.18 is less
    turned = datasets.ranks(table(-values), lower=True)
    assert turned == found


@pytest.mark.parametrize(("k", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_critical_values_are_the_published_ones(k: int, q: float) -> None:
    """Demsar's table 5a."""
    found = datasets.ranks(table(np.random.default_rng(0).random((9, k)), [f"m{i}" for i in range(k)]), lower=False)
    assert found.apart == pytest.approx(q * np.sqrt(k * (k + 1) / (6 * 9)), rel=1e-3)


def test_nothing_is_claimed_where_nothing_differs() -> None:
    draw, claims = np.random.default_rng(1), 0
    for _ in range(400):
        found = datasets.ranks(table(draw.random((8, 4))), lower=False)
        claims += "within chance" not in datasets.verdict(found)
    assert claims / 400 < 0.06


def test_an_interquartile_mean_is_of_the_middle_half() -> None:
    scores = {"a": {"x": [0.0, 0.4, 0.5, 1.0], "y": [0.1, 0.6, 0.7, 0.9]}, "b": {"x": [0.3], "y": [0.5]}}
    found = datasets.middles(scores)
    assert found["a"].mean == pytest.approx((0.4 + 0.5 + 0.6 + 0.7) / 4)
    assert found["b"].low is None and found["a"].low is not None and found["a"].high is not None
    assert found["a"].low < found["a"].mean < found["a"].high
    draw, held = np.random.default_rng(2), 0
    for _ in range(200):
        one = {d: list(mean + 0.05 * draw.standard_normal(10)) for d, mean in (("x", 0.4), ("y", 0.5), ("z", 0.6))}
        m = datasets.middles({"a": one})["a"]
        assert m.low is not None and m.high is not None
        held += m.low <= 0.5 <= m.high
    assert held / 200 > 0.85


def test_a_page_over_data_sets(tmp_path: Path) -> None:
    """Shown from three data sets on, of the methods that every one has, and not for several settings of a method."""
    folders = []
    for d in ("a.csv", "b.csv", "c.csv"):
        for m, better in (("homlora", 0.0), ("fedsa", 0.1), ("local", 0.05)):
            for seed in (0, 1):
                if (m, d) == ("local", "c.csv"):
                    continue
                score = 0.5 + better + 0.01 * seed
                folder = fake(tmp_path / f"{m}-{d}-{seed}", seed, m, [[0.3, 0.3], [score, score]])
                whole = sealed.read(folder / "recipe.json")
                recipe = whole["recipe"] | {"data": {"source": d}, "model": {"name": "minilm"}}
                sealed.write(folder / "recipe.json", {"hash": json.dumps(recipe)[:20], "recipe": recipe})
                folders.append(folder)
    runs = [records(f) for f in folders]
    found = datasets.by_dataset(runs)
    assert found.keys() == {"homlora", "fedsa"} and found["fedsa"]["a.csv"] == pytest.approx([0.6, 0.61])
    page = write_comparison(folders, tmp_path / "c.html").read_text(encoding="utf-8")
    assert "Over data sets" in page and "average rank" in page
    assert datasets.by_dataset([r for r in runs if r.recipe["data"]["source"] != "a.csv"]) == {}
    assert datasets.by_dataset([*runs, runs[0]]) == {}
