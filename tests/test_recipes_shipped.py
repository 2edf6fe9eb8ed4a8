"""Every shipped recipe runs, shortened: two rounds of one step on a part of its data, and of its files for testing."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import fedlora as fl
from fedlora.recipe import expand

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SHORT = ["federation.rounds=2", "train.epochs=null", "train.steps=1", "train.batch_size=4", "evaluation.every=2"]


def test_there_are_recipes() -> None:
    assert {"sst2", "mnli", "20newsgroups", "huffpost", "e2e"} <= {p.stem for p in RECIPES}


def head_of(path: str, to: Path) -> str:
    """The first rows of a file, as a file."""
    pq.write_table(pq.read_table(path).slice(0, 300), to)
    return str(to)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_runs(path: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    limit = "data.limit=600" if "20news" in path.stem else "data.limit=300"
    recipes = expand(path, [*SHORT, limit, "partition.min_size=2"])
    recipe = recipes[-1]
    where = recipe.resolved()
    for field in ("source", "test", "validation"):  # the recipes name the data folder as it lies beside the project
        if where["data"][field]:
            where["data"][field] = str(shared / where["data"][field].removeprefix("../shared/"))
            if field != "source" and where["data"][field].endswith(".parquet"):
                where["data"][field] = head_of(where["data"][field], tmp_path / f"{field}.parquet")
    where["model"]["name"] = where["model"]["name"].replace("../shared", str(shared))
    summary = fl.run(where, output=tmp_path / "run")
    assert summary["rounds"] == 2
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [x["round"] for x in lines if x["kind"] == "train"] == [1, 2]
    assert summary["test"] is not None
    assert summary["bytes"]["up"] > 0 or summary["method"]["name"] == "local"
