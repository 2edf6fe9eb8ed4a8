"""What a page says of how a run was made: command, commit, digests, time."""

from __future__ import annotations

import html
import json
import subprocess
from pathlib import Path

import pytest
from cli import environment, fedlora, write_recipe

from fedlora.federation.provenance import command, commit

pytest.importorskip("plotly")
from fedlora.report.comparison import comparison_page
from fedlora.report.page import about, run_page
from fedlora.report.read import records
from fedlora.report.tables import compare_rows


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_gits_own(tmp_path: Path) -> None:
    """And says where files have changed since; without a repository there is none."""
    (tmp_path / "own").mkdir()
    assert commit(tmp_path / "own") is None
    git(tmp_path / "own", "init", "-q")
    assert commit(tmp_path / "own") is None  # nothing is committed
    (tmp_path / "own/a").write_text("1")
    git(tmp_path / "own", "add", "a")
    git(tmp_path / "own", "commit", "-qm", "a")
    head = git(tmp_path / "own", "rev-parse", "HEAD")
    assert commit(tmp_path / "own") == head
    (tmp_path / "own/a").write_text("2")
    assert commit(tmp_path / "own") == f"{head}, with changes that are not committed"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["/usr/bin/fedlora", "run", "a.yaml", "--set", "train.lr=1e-3"], "fedlora run a.yaml --set train.lr=1e-3"),
        (["fedlora", "run", "/home/thesis/work/a.yaml"], "fedlora run work/a.yaml"),
        (["fedlora", "run", "a.yaml", "--set", "data.source=/srv/patients/x.csv"], "fedlora run a.yaml --set data.source=patients/x.csv"),
        (["fedlora", "run", "--set", "data.source=postgresql://me:secret@db/x"], "fedlora run --set 'data.source=postgresql://me:***@db/x'"),
        (["fedlora", "run", "C:\\Users\\me\\a.yaml"], "fedlora run me/a.yaml"),
        (["/x/ipykernel_launcher.py", "-f", "kernel.json"], None),
        (["-c"], None),
    ],
)  # fmt: skip
def test_a_command_shows_no_folders_and_no_passwords(given: list[str], said: str | None) -> None:
    assert command(given) == said


def test_pages_tell_what_they_were_made_from(tmp_path: Path) -> None:
    """The run's own page and a comparison's; the numbers are those of the files."""
    git(tmp_path, "init", "-q")
    recipe = write_recipe(tmp_path)
    git(tmp_path, "add", "recipe.yaml")
    git(tmp_path, "commit", "-qm", "a")
    fedlora("run", recipe, "--set", "federation.rounds=1", "-o", tmp_path / "run", "--quiet", cwd=tmp_path)
    page = html.unescape((tmp_path / "run/report.html").read_text(encoding="utf-8"))
    stored = json.loads((tmp_path / "run/recipe.json").read_text(encoding="utf-8"))
    r = records(tmp_path / "run")
    (block,) = [b for b in about(r) if b.title == "What this was made from"]
    facts = dict(block.table)  # type: ignore[arg-type]
    assert facts["git commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert stored["inputs"]["texts"] in facts["data"] and facts["base's weights"] == stored["inputs"]["base"]
    assert facts["recipe"] == stored["hash"] and "in 1 rounds" in facts["time"]
    assert str(tmp_path) not in page and all(v in page for v in facts.values())
    comparison = comparison_page([r], compare_rows([r.folder]))
    assert any(b.title == block.title for b in comparison["blocks"])
    assert {b.text for b in run_page(r)["blocks"] if b.title == "Who holds what"} == {
        "Training rows of each client, by class."
    }
    r.partition.pop("histogram")  # as at a server
    assert {b.text for b in run_page(r)["blocks"] if b.title == "Who holds what"} == {"Training rows of each client."}
    assert environment()


def test_a_title_says_what_differs(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    fedlora("run", recipe, "--set", "federation.rounds=1", "--set", "sweep.train.lr=[0.1, 0.01, 0.001]",
            "--set", "sweep.method.rank=[2, 4]", "-o", tmp_path / "runs", "--quiet", cwd=tmp_path)  # fmt: skip
    runs = [records(p.parent) for p in sorted((tmp_path / "runs").glob("*/recipe.json"))]
    assert comparison_page(runs, compare_rows([r.folder for r in runs]))["title"] == "6 settings: rank and lr"
