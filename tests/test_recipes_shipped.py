"""Every shipped recipe runs, shortened: two rounds of one step on a part of its data, and of its files for testing."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import local
import pytest
from cli import fedlora

import fedlora as fl
from fedlora.checkpoints import pretrained
from fedlora.errors import ConfigError
from fedlora.recipe import Recipe, expand, schema
from fedlora.recipe.reading import read
from fedlora.recipe.search import plan
from fedlora.recipe.shipped import FOLDER, MARK, SCHEMA, Shipped, copy, shipped

RECIPES = shipped()
SHORT = ["federation.rounds=2", "train.epochs=null", "train.steps=1", "train.batch_size=4", "evaluation.every=2"]


def runs_of(path: Path, sets: Sequence[str] = ()) -> list[Recipe]:
    """The runs of a recipe; of one with a search, those with what is tried first."""
    made = plan(read(path), sets)
    return expand(path, sets) if made is None else made.runs([s.trials[0].choice for s in made.settings])


def test_there_are_recipes() -> None:
    names = [r.name for r in RECIPES]
    assert {"sst2", "mnli", "20newsgroups", "huffpost", "e2e", "pf2lora-sst2"} <= set(names)
    assert len(set(names)) == len(names) == len(list(FOLDER.rglob("*.yaml")))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_a_recipe_names_what_its_reader_can_get(recipe: Shipped) -> None:
    """A hub id or the texts that Python carries, never a path; and its first lines say what it shows and how large it is."""
    for r in runs_of(recipe.path):
        paths = [r.data.source, r.data.test, r.data.validation, r.model.name]
        assert not [p for p in paths if p and re.search(r"^[./~]|\.(parquet|csv|jsonl?)$", p)]
        known = (r.data.source, r.data.subset) in local.COPIES
        assert known or r.data.source == "demo"
        assert r.model.name in ("minilm", "mpnet", "smollm2") or r.model.name in local.MODELS
        assert r.name.startswith(recipe.name)
    assert recipe.shows.endswith(".")
    runs = re.match(r"(one|\d+) runs? of (\d+) rounds", recipe.size)
    assert runs, recipe.size
    assert (1 if runs[1] == "one" else int(runs[1])) == len(runs_of(recipe.path))
    assert {int(runs[2])} == {r.federation.rounds for r in runs_of(recipe.path)}


def test_every_recipe_names_its_schema_and_keeps_to_it() -> None:
    """Checked by a validator that is not ours; the file is what `make docs` writes."""
    from jsonschema import Draft202012Validator as validator

    kept = json.loads(SCHEMA.read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(schema())), "run `make docs`"
    validator.check_schema(kept)
    for r in RECIPES:
        first = r.path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith(MARK)
        assert (r.path.parent / first.removeprefix(MARK)).resolve() == SCHEMA.resolve()
        validator(kept).validate(read(r.path))
    wrong = read(RECIPES[0].path)
    assert not validator(kept).is_valid(wrong | {"train": {"lr": "fast"}})
    assert not validator(kept).is_valid(wrong | {"trian": {}})


# Those of the papers are many and long: two of them stand for all in the quick suite.
QUICK = {r.name for r in RECIPES if not r.paper} | {"fedsa-sst2", "hetlora-huffpost"}


@pytest.mark.parametrize(
    "recipe", [pytest.param(r, marks=() if r.name in QUICK else pytest.mark.slow, id=r.name) for r in RECIPES]
)
# Recipes of long texts say how many lose their ends. (pytest splits a filter at its colons, so the message has none here.)
@pytest.mark.filterwarnings(r"ignore:data\.max_length. \d+ of \d+ rows are longer:UserWarning")
def test_recipe_runs(recipe: Shipped, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    limit = "data.limit=600" if "20news" in recipe.name else "data.limit=300"
    sets = local.overrides(read(recipe.path), shared, tmp_path)
    # A CPU without bf16 instructions takes a hundred times as long with them; bf16 itself is tested on tiny models.
    chosen = runs_of(recipe.path, [*SHORT, limit, "partition.min_size=2", "model.dtype=fp32", *sets])[-1]
    if (base := chosen.model.name) in ("mpnet", "smollm2") and not Path(pretrained.locate(base)).is_dir():
        pytest.skip(f"the base {base} is not on this machine")
    summary = fl.run(chosen, output=tmp_path / "run")
    assert summary["rounds"] == 2
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [x["round"] for x in lines if x["kind"] == "train"] == [1, 2]
    assert summary["test"] is not None
    assert summary["bytes"]["up"] > 0 or summary["method"]["name"] == "local"


def test_a_copy_is_the_recipe_and_overwrites_nothing(tmp_path: Path) -> None:
    file = copy("sst2", tmp_path)
    assert file == tmp_path / "sst2.yaml"
    first, _, rest = file.read_text(encoding="utf-8").partition("\n")
    assert rest == (FOLDER / "sst2.yaml").read_text(encoding="utf-8").partition("\n")[2]
    assert (
        json.loads(Path(url2pathname(urlparse(first.removeprefix(MARK)).path)).read_text(encoding="utf-8")) == schema()
    )
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"sst2\.yaml', expected a file that is not there yet; move the file away"):
        copy("sst2", tmp_path)
    assert file.read_text(encoding="utf-8") == "mine"
    with pytest.raises(ConfigError, match=r"got 'sst', expected the name of a shipped recipe; did you mean 'sst2'"):
        copy("sst", tmp_path)
    with pytest.raises(ConfigError, match=r"mnli\.yaml', expected a file to write .* check its folder"):
        copy("mnli", tmp_path / "nowhere")


def test_the_command_lists_and_copies(tmp_path: Path, shared: Path) -> None:
    """In a bare folder: the list, a copy, and a check of it, with data of one's own and without a network."""
    said = fedlora("recipes", cwd=tmp_path).stdout
    assert all(r.name in said for r in RECIPES)
    rows = json.loads(fedlora("recipes", "--json", cwd=tmp_path).stdout)
    assert [(r["name"], r["shows"], r["paper"]) for r in rows] == [(r.name, r.shows, r.paper) for r in RECIPES]
    assert "sst2.yaml" in fedlora("recipes", "sst2", cwd=tmp_path).stdout
    source = f"data.source={shared / 'data/sst2/train.parquet'}"
    assert "2,800 train" in fedlora("check", "sst2.yaml", "--set", source, cwd=tmp_path).stdout
    failed = fedlora("check", "sst2.yaml", cwd=tmp_path, code=2)
    assert re.search(r"data\.source: 'nyu-mll/glue' .* --set data\.source=FILE", failed.stderr)
    assert len(failed.stderr.strip().splitlines()) == 2


def test_the_recipes_are_in_the_wheel(tmp_path: Path) -> None:
    """They are package data, so a copy from an installed wheel is a copy of the same file."""
    build = pytest.importorskip("hatchling.builders.wheel")
    root = Path(__file__).parents[1]
    (wheel,) = build.WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as z:
        for r in RECIPES:
            inside = f"fedlora/recipes/{r.path.relative_to(FOLDER).as_posix()}"
            assert z.read(inside) == r.path.read_bytes()
