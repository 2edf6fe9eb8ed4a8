"""The search of a sweep: every method gets the same number of short runs, the best on validation is taken, nothing is lost."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cli import command, environment, fedlora, write_recipe

from fedlora.errors import ConfigError
from fedlora.recipe import expand, reading
from fedlora.recipe.search import Plan, Trial, best, edges, plan

SWEEP: dict[str, Any] = {"method.name": ["homlora", "pf2lora"], "run.seed": [0, 1]}
LISTS = {"train.lr": [0.001, 0.01, 0.05]}
OWN = {"pf2lora": {"method.lr_personal": [0.01, 0.1]}}


def made(folder: Path, search: Any, sweep: dict[str, Any] = SWEEP, **sections: Any) -> Path:
    """A recipe file with this search."""
    usual = {"method": {"rank": 4, "name": "homlora"}, "federation": {"rounds": 3}}
    partition = {"kind": "iid", "clients": 3, "validation": 0.3, "test": 0.2}
    return write_recipe(folder, **{**usual, "partition": partition, **sections}, sweep={**sweep, "search": search})


def planned(folder: Path, search: Any, **more: Any) -> Plan:
    found = plan(reading.read(made(folder, search, **more)))
    assert found is not None
    return found


def test_every_setting_gets_the_same_number_of_trials(tmp_path: Path) -> None:
    """HomLoRA has three candidates and PF2LoRA six: three of each are tried, in short runs of a seed that no run has."""
    p = planned(tmp_path, {"fields": LISTS, "methods": OWN, "rounds": 2})
    assert (p.trials, p.rounds, p.seed) == (3, 2, 2)
    assert [(s.name, s.method, len(s.trials)) for s in p.settings] == [
        ("homlora", "homlora", 3),
        ("pf2lora", "pf2lora", 3),
    ]
    for s in p.settings:
        assert len({t.recipe.hash for t in s.trials}) == 3
        for t in s.trials:
            assert (t.recipe.run.seed, t.recipe.federation.rounds) == (2, 2)
            assert t.recipe.train.lr == dict(t.choice)["train.lr"]
    assert (
        planned(tmp_path, {"fields": LISTS, "methods": OWN, "rounds": 2}) == p
    )  # the draw of candidates is the seed's


def test_runs_have_what_was_chosen(tmp_path: Path) -> None:
    p = planned(tmp_path, {"fields": LISTS, "methods": OWN, "rounds": 2})
    runs = p.runs([p.settings[0].trials[2].choice, p.settings[1].trials[0].choice])
    assert [(r.method.name, r.run.seed, r.federation.rounds) for r in runs] == [
        ("homlora", 0, 3), ("homlora", 1, 3), ("pf2lora", 0, 3), ("pf2lora", 1, 3),
    ]  # fmt: skip
    assert [r.train.lr for r in runs[:2]] == [0.05, 0.05]
    assert runs[2].method_object().lr_personal == dict(p.settings[1].trials[0].choice)["method.lr_personal"]  # type: ignore[attr-defined]
    assert [r.name for r in runs] == [
        "small-homlora-seed0",
        "small-homlora-seed1",
        "small-pf2lora-seed0",
        "small-pf2lora-seed1",
    ]


def test_all_problems_of_a_search_at_once(tmp_path: Path) -> None:
    bad = {"fields": {"train.rate": [1]}, "methods": {"pf2lora": {"method.lr_personal": []}}, "rounds": 0, "budget": 3}
    with pytest.raises(ConfigError) as e:
        planned(tmp_path, bad)
    text = str(e.value)
    for part in ("sweep.search.methods", "sweep.search.rounds: got 0", "sweep.search.budget"):
        assert part in text
    for search, said in (
        ({"fields": {"train.rate": [1]}}, "sweep.search.fields.train.rate"),
        ({}, "at least one field to search"),
        ([], "sweep.search: got []"),
        ({"fields": LISTS, "trials": 4}, "sweep.search.trials: got 4, expected at most 3"),
        ({"fields": LISTS, "seed": 1}, "sweep.search.seed: got 1, expected a seed that no run"),
        ({"fields": {"train.lr": [-1.0]}}, "train.lr: got -1.0"),
        ({"fields": LISTS, "methods": {"fedsa": {"method.rank": [2]}}}, "sweep.search.methods.fedsa"),
    ):
        with pytest.raises(ConfigError) as e:
            planned(tmp_path, search)
        assert said in str(e.value), search
    with pytest.raises(ConfigError, match=r"partition.validation: got 0.0"):
        planned(tmp_path, {"fields": LISTS}, partition={"kind": "iid", "clients": 3, "validation": 0.0})
    with pytest.raises(ConfigError, match=r"sweep.search: .*fedlora sweep"):
        expand(made(tmp_path, {"fields": LISTS}))


def test_no_search_is_a_plain_sweep(tmp_path: Path) -> None:
    """`search:` without a value is none, as null is elsewhere."""
    recipe = made(tmp_path, None)
    assert plan(reading.read(recipe)) is None
    assert [r.name for r in expand(recipe)][:2] == ["small-homlora-seed0", "small-homlora-seed1"]
    assert "4 runs are valid" in fedlora("check", recipe, "--no-measure").stdout


def test_a_name_that_was_given_stays(tmp_path: Path) -> None:
    p = plan(reading.read(made(tmp_path, {"fields": LISTS})), ["name=mine"])
    assert p is not None
    names = {r.name for r in p.runs([s.trials[0].choice for s in p.settings])}
    assert names | {t.recipe.name for s in p.settings for t in s.trials} == {"mine"}


def test_the_best_by_hand() -> None:
    assert best([0.2, 0.5, 0.5, None], lower=False) == 1
    assert best([0.2, 0.5, math.nan, 0.1], lower=True) == 3
    assert best([math.nan, None], lower=True) is None
    trials = [Trial([("train.lr", v), ("method.name", n)], None) for v in (1.0, 2.0, 3.0) for n in "ab"]  # type: ignore[arg-type]
    assert [edges(trials, i) for i in range(6)] == [["train.lr"], ["train.lr"], [], [], ["train.lr"], ["train.lr"]]


def scores(sweep: Path) -> list[tuple[str, float]]:
    """Of each trial's own summary."""
    return sorted((f.parent.name, json.loads(f.read_text())["validation"]) for f in sweep.glob("search/*/summary.json"))


def test_a_search_takes_the_best_on_validation_and_can_be_killed(tmp_path: Path) -> None:
    """Killed in the search and gone on with: the same files as without; what was taken is the best by the trials' summaries."""
    small = {"method.name": ["homlora"], "run.seed": [0]}
    recipe = made(tmp_path, {"fields": {"train.lr": [1e-9, 0.05]}, "rounds": 3}, sweep=small)
    fedlora("sweep", recipe, "-o", tmp_path / "whole", "-q")
    facts = json.loads((tmp_path / "whole/search.json").read_text())
    [setting] = facts["settings"]
    tried = setting["trials"]
    found = dict(scores(tmp_path / "whole"))
    assert [t["validation"] for t in tried] == [found[Path(t["folder"]).name] for t in tried]
    assert setting["chosen"] == best([t["validation"] for t in tried], lower=False)
    [run] = (tmp_path / "whole").glob("small-*/recipe.json")
    assert json.loads(run.read_text())["recipe"]["train"]["lr"] == tried[setting["chosen"]]["fields"]["train.lr"]
    page = (tmp_path / "whole/comparison.html").read_text(encoding="utf-8")
    assert ">Search<" in page and "2 trials of 3 rounds" in page

    p = subprocess.Popen(
        command("sweep", recipe, "-o", tmp_path / "cut", "--json"), stdout=subprocess.PIPE, text=True, env=environment()
    )
    assert p.stdout
    for line in p.stdout:
        if json.loads(line).get("round") == 2:
            break
    os.kill(p.pid, signal.SIGKILL)
    p.communicate()
    assert not (tmp_path / "cut/search.json").exists()
    fedlora("resume", tmp_path / "cut", "-q")
    for file in ("metrics.jsonl", "recipe.json"):
        for a in (tmp_path / "whole").rglob(file):
            b = tmp_path / "cut" / a.relative_to(tmp_path / "whole")
            if file == "metrics.jsonl":
                assert a.read_bytes() == b.read_bytes()
            else:
                assert json.loads(a.read_text())["hash"] == json.loads(b.read_text())["hash"]


@pytest.mark.slow
def test_jobs_change_nothing_but_the_time(tmp_path: Path) -> None:
    recipe = made(tmp_path, {"fields": LISTS, "methods": OWN, "rounds": 2})
    for name, jobs in (("one", 1), ("three", 3)):
        fedlora("sweep", recipe, "-o", tmp_path / name, "--jobs", str(jobs), "-q")
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("metrics.jsonl"))
    assert len(names) == 10
    for n in names:
        assert (tmp_path / "one" / n).read_bytes() == (tmp_path / "three" / n).read_bytes()
    for name in ("one", "three"):  # the pages of a sweep share one copy of the plotting library
        pages = list((tmp_path / name).rglob("report.html"))
        assert len(pages) == 10 and max(p.stat().st_size for p in pages) < 1_000_000


@pytest.mark.slow
def test_jobs_end_with_their_parent(tmp_path: Path) -> None:
    """The command is killed: its processes end at their next round, and the sweep can be gone on with."""
    recipe = made(tmp_path, {"fields": LISTS, "rounds": 200}, federation={"rounds": 300})
    p = subprocess.Popen(command("sweep", recipe, "-o", tmp_path / "s", "--jobs", "2", "-q"), env=environment())
    import psutil

    while not list(tmp_path.glob("s/search/*/metrics.jsonl")):
        assert p.poll() is None
        signal.sigtimedwait([], 0.2)
    children = psutil.Process(p.pid).children()
    assert children
    p.kill()
    p.wait()
    gone, alive = psutil.wait_procs(children, timeout=120)
    assert len(gone) == len(children) and not alive
