"""A sweep as one thing: gone on with, reported, looked at; runs without a score are left out, and that is said."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from cli import command, environment, fedlora, write_recipe


def test_a_sweep_is_interrupted_looked_at_and_gone_on_with(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    recipe = write_recipe(tmp_path, federation={"rounds": 60}, sweep={"method.name": ["local", "homlora"]})
    process = subprocess.Popen(
        command("run", recipe, "--json", "-o", sweep), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    assert process.stdout
    for line in process.stdout:
        if json.loads(line).get("round") == 2:
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said
    assert f"fedlora resume {sweep}\n" in said + "\n"
    states = [json.loads(x)["state"] for x in fedlora("status", sweep, "--json").stdout.splitlines()]
    assert states == ["unfinished", "waiting"]
    assert "waiting" in fedlora("status", sweep).stdout

    done = fedlora("resume", sweep)
    assert "HomLoRA" in done.stdout and "2/2" in done.stderr and "left for the sweep" in done.stderr
    states = [json.loads(x)["state"] for x in fedlora("status", sweep, "--json").stdout.splitlines()]
    assert states == ["done", "done"]
    before = {p: p.read_bytes() for p in sweep.rglob("metrics.jsonl")}
    assert "2 of 2 runs are done already" in fedlora("resume", sweep).stderr
    assert before == {p: p.read_bytes() for p in sweep.rglob("metrics.jsonl")}

    [page] = sweep.glob("comparison.html")
    page.unlink()
    fedlora("report", sweep)
    assert page.exists()

    one = sorted(sweep.glob("*/summary.json"))[0].parent
    shutil.copytree(one, sweep / "young")
    (sweep / "young/summary.json").unlink()
    (sweep / "young/metrics.jsonl").unlink()
    for state in (sweep / "young/server").glob("*"):
        state.unlink()
    compared = fedlora("compare", sweep)
    assert "left out, no score yet: 1 of 3 runs (young)" in compared.stderr
    shutil.copytree(sweep / "young", tmp_path / "alone/young")
    assert "none of 1 runs has a score yet" in fedlora("compare", tmp_path / "alone", code=1).stderr


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_fails_does_not_end_its_sweep(jobs: int, tmp_path: Path) -> None:
    """Neither one whose training diverges, nor one whose model cannot be had; the others are compared, and the exit code says it."""
    sweep = tmp_path / "sweep"
    settings = {"model.name": ["./nowhere", str(tmp_path / "model")], "train.lr": [1e30, 0.01]}
    recipe = write_recipe(tmp_path, federation={"rounds": 2}, train={"steps": 2, "optimizer": "sgd"}, sweep=settings)
    done = fedlora("sweep", recipe, "-o", sweep, "--jobs", jobs, code=1)
    said = " ".join((done.stdout + done.stderr).split())
    assert "nowhere" in said and "3 of 4 runs have failed" in said
    [works] = sweep.glob("*/summary.json")
    assert json.loads((works.parent / "recipe.json").read_text())["recipe"]["train"]["lr"] == 0.01
