"""A run folder finds its recipe and its files again: resumed from elsewhere, moved, or with a damaged recipe."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import yaml

from fedlora.deploy.coordinator import told_to_sites
from fedlora.deploy.site import Holding
from fedlora.errors import ConfigError, StateError
from fedlora.federation.store import Store
from fedlora.recipe import Recipe, places
from fedlora.report.page import shared

RAW = {"model": {"name": "nets/tiny"}, "data": {"source": ["rows.csv", "more-*.csv"], "text": "text", "label": "label"},
       "method": "fedsa", "run": {"output": "run"}}  # fmt: skip


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder that a run was started in, by relative paths."""
    root = tmp_path / "project"
    for file in ("rows.csv", "more-1.csv", "nets/tiny/config.json"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("x")
    monkeypatch.chdir(root)
    recipe = Recipe.from_dict(RAW)
    s = Store("run")
    s.places = places.of(recipe, s.root)
    with s.lock():
        s.claim(recipe.hash, recipe.resolved())
    return root


def found(folder: Path) -> list[str]:
    r = places.located(places.recipe_in(folder), folder)
    assert (r.hash, r.resolved()) == (Recipe.from_dict(RAW).hash, Recipe.from_dict(RAW).resolved())
    assert r.override("train.lr=0.5").data.source == ("rows.csv", "more-*.csv")
    return [*r.data.source, r.model.name]


def test_from_elsewhere_and_moved(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("rows.csv", "more-*.csv", "nets/tiny")
    monkeypatch.chdir("/")
    assert found(project / "run") == [str(project / n) for n in names]
    shutil.move(project / "run", tmp_path / "kept")  # the folder of the run alone
    assert found(tmp_path / "kept") == [str(project / n) for n in names]
    shutil.move(tmp_path / "kept", project / "run")
    shutil.move(project, tmp_path / "renamed")  # all of it
    assert found(tmp_path / "renamed/run") == [str(tmp_path / "renamed" / n) for n in names]
    (tmp_path / "renamed/rows.csv").unlink()
    with pytest.raises(
        StateError, match=r"data.source: rows.csv is gone: it was .*project/rows.csv when .* put it back"
    ):
        found(tmp_path / "renamed/run")


def test_a_recipe_that_was_damaged(project: Path) -> None:
    file, sure = project / "run/recipe.yaml", Recipe.from_dict(RAW)
    good = file.read_text()
    file.write_text(good.replace("seed: 0", "seed: 0\n  thread: ["))
    with pytest.warns(UserWarning, match=r"recipe.yaml is damaged: recipe.json is used instead"):
        assert places.recipe_in(project / "run") == sure
    file.unlink()
    with pytest.warns(UserWarning, match=r"recipe.yaml is gone: recipe.json is used instead"):
        assert places.recipe_in(project / "run") == sure
    raw = yaml.safe_load(good)
    raw["run"]["threads"] = 3
    file.write_text(yaml.safe_dump(raw))
    with pytest.warns(UserWarning, match=r"changed since the run was started, in run.threads; it is used as it is now"):
        assert places.recipe_in(project / "run").run.threads == 3
    file.write_text(good)
    (project / "run/recipe.json").write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert places.recipe_in(project / "run") == sure
    file.write_text("[")
    with pytest.raises(StateError, match=r"recipe.yaml: is no recipe any more"):
        places.recipe_in(project / "run")


def test_no_folder_of_a_machine_istold_to_sites(tmp_path: Path) -> None:
    """Neither to sites nor in a page."""
    raw = RAW | {"model": {"name": str(tmp_path / "net")}, "run": {"output": str(tmp_path / "run")}}
    raw["data"] = {"source": str(tmp_path / "rows.csv"), "validation": str(tmp_path / "v.csv"), "text": "text", "label": "label",
                   "classes": ["a", "b"]}  # fmt: skip
    recipe = Recipe.from_dict(raw)
    for said in (told_to_sites(recipe), shared(recipe.resolved())):
        assert str(tmp_path) not in json.dumps(said)
    with pytest.raises(ConfigError, match=r"--model: got None, expected this site's copy of the server's folder net"):
        Holding("a", "rows.csv", {}).recipe(told_to_sites(recipe))
    assert Holding("a", "rows.csv", {}, model="here").recipe(told_to_sites(recipe)).model.name == "here"
