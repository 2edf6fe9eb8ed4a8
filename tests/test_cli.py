"""The commands, as a user runs them: in processes of their own, on files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli import command, environment, fedlora, write_recipe


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in run/."""
    folder = tmp_path_factory.mktemp("done")
    fedlora("run", write_recipe(folder, evaluation={"views": ["personal", "global", "cross"]}), "--quiet")
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    """All that resuming must reproduce: metrics and every state."""
    names = [folder / "metrics.jsonl", *folder.glob("server/*"), *folder.glob("clients/*/*/*")]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in names}


# run, check, methods ----------------------------------------------------------------------------------------------------


def test_run_leaves_a_whole_folder(done: Path) -> None:
    run = done / "run"
    have = {p.name for p in run.iterdir()}
    assert have >= {"recipe.yaml", "recipe.json", "environment.json", "partition.json", "metrics.jsonl", "timings.jsonl",
                    "summary.json", "report.html", "server", "clients"}  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())
    metrics = lines(run / "metrics.jsonl")
    assert [x["round"] for x in metrics if x["kind"] == "train"] == [1, 2, 3]
    evals = [x for x in metrics if x["kind"] == "eval" and (x["view"], x["split"]) == ("personal", "validation")]
    best = max(evals, key=lambda x: (x["mean"]["accuracy"], -x["round"]))
    assert summary["chosen_round"] == best["round"]
    test = next(
        x
        for x in metrics
        if x["kind"] == "eval" and (x["view"], x["split"], x["round"]) == ("personal", "test", best["round"])
    )
    assert summary["test"] == test["mean"]["accuracy"]
    held = json.loads((run / "partition.json").read_text())["histogram"]
    right = [
        b[max(range(len(a)), key=a.__getitem__)] / sum(b) for a, b in zip(held["train"], held["test"], strict=True)
    ]
    assert summary["constant"] == pytest.approx(sum(right) / len(right))
    sent = sum(sum(sum(d.values()) for d in x["bytes"].values()) for x in metrics if x["kind"] == "train")
    assert summary["bytes"]["total"] == sent > 0
    [cross] = [x for x in metrics if x["kind"] == "cross"]
    assert len(cross["matrix"]) == 4


def test_check_shows_what_would_run_and_trains_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    said = fedlora("check", recipe).stdout
    for text in ("is valid", "4 train", "sport", "trained", "bytes a round", "at its peak", "local steps", "c3"):
        assert text in said
    assert not (tmp_path / "run").exists()
    facts = json.loads(fedlora("check", recipe, "--json").stdout)
    fedlora("run", recipe, "--quiet")
    train = lines(tmp_path / "run/metrics.jsonl")
    first = next(x for x in train if x["kind"] == "train")
    assert {d: sum(v.values()) for d, v in first["bytes"].items()} == facts["bytes_per_round"]  # as announced
    assert json.loads((tmp_path / "run/summary.json").read_text())["parameters"] == facts["parameters"]
    assert facts["histogram"] == json.loads((tmp_path / "run/partition.json").read_text())["histogram"]["train"]


def test_rows_that_are_cut_are_said_wherever_a_run_is_looked_at(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    done = fedlora("check", recipe, "--set", "data.max_length=5")
    cut = re.search(r"data.max_length: (\d+) of 120 rows are longer than 5 tokens", done.stderr)
    assert cut and f"{cut[1]} rows are cut to 5 tokens" in " ".join(done.stdout.split())
    assert json.loads(fedlora("check", recipe, "--set", "data.max_length=5", "--json").stdout)["truncated"] == int(
        cut[1]
    )
    assert "are longer than" not in fedlora("check", recipe).stderr
    said = fedlora("run", recipe, "--quiet", "--set", "data.max_length=5", "--set", "federation.rounds=1").stderr
    assert f"{cut[1]} of 120 rows are longer" in said
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert f"{cut[1]} rows were longer than 5 tokens and were cut." in page


def test_json_and_quiet(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    out = fedlora("run", recipe, "--json").stdout.splitlines()
    said = [json.loads(x) for x in out]
    assert said[0] == {"kind": "start", "name": "small", "done": 0, "rounds": 3}
    assert said[-1]["kind"] == "summary"
    assert [x for x in said if x["kind"] in ("train", "eval")] == lines(tmp_path / "run/metrics.jsonl")
    quiet = fedlora("run", recipe, "--quiet", "-o", tmp_path / "other")
    assert quiet.stderr == ""
    assert "personal" in quiet.stdout


def test_overrides_reach_the_run(tmp_path: Path) -> None:
    fedlora("run", write_recipe(tmp_path), "--set", "method.name=local", "--set", "federation.rounds=1", "-q")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["method"]["name"], summary["rounds"], summary["bytes"]["total"] > 0) == ("local", 1, True)


def test_methods_lists_all(tmp_path: Path) -> None:
    from fedlora.methods import METHODS

    rows = json.loads(fedlora("methods", "--json").stdout)
    assert [r["name"] for r in rows] == list(METHODS)
    by_name = {r["name"]: r for r in rows}
    assert by_name["fedsa"]["shared"] == ["A", "head"]
    assert by_name["fedsa"]["personal"] == ["B"]
    assert by_name["local"]["shared"] == []
    assert by_name["ffa"]["shared"] == ["B", "head"]
    assert "FedSA-LoRA" in fedlora("methods").stdout


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fedlora("run", write_recipe(tmp_path), "--set", "run.tensorboard=true", "-q")
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    train = [x for x in lines(tmp_path / "run/metrics.jsonl") if x["kind"] == "train"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (x["round"], pytest.approx(x["loss"])) for x in train
    ]
    assert "personal_test/accuracy_mean" in events.Tags()["scalars"]


# interruption -----------------------------------------------------------------------------------------------------------


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("run", folder / "recipe.yaml", "--json", *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def until(process: subprocess.Popen[str], trained: int) -> None:
    """Read the process's lines until `trained` rounds are recorded."""
    assert process.stdout
    seen = 0
    while seen < trained:
        line = process.stdout.readline()
        assert line, process.stderr.read() if process.stderr else ""
        seen += json.loads(line)["kind"] == "train"


@pytest.mark.parametrize(
    "method", ["pf2lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("fedsa", "hetlora"))]
)
def test_kill_and_resume_is_bit_identical(method: str, tmp_path: Path) -> None:
    """kill -9 twice at arbitrary moments of a run of ten rounds with dropout; then resume."""
    sections = {"method": {"name": method, "rank": 4, "alpha": 4}, "federation": {"rounds": 10, "clients_per_round": 3}}
    write_recipe(tmp_path, **sections)
    fedlora("run", tmp_path / "recipe.yaml", "-q", "-o", tmp_path / "whole")
    for trained, extra in ((2, 0.003), (4, 0.02)):
        process = start(tmp_path, "-o", str(tmp_path / "broken"))
        until(process, trained)
        time.sleep(extra)
        process.kill()
        process.communicate()
    fedlora("resume", tmp_path / "broken", "-q")
    whole, broken = files(tmp_path / "whole"), files(tmp_path / "broken")
    assert whole.keys() <= broken.keys()
    for name in whole:
        assert whole[name] == broken[name], name


def test_ctrl_c_leaves_a_resumable_run(tmp_path: Path) -> None:
    write_recipe(tmp_path, federation={"rounds": 200})
    process = start(tmp_path)
    until(process, 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "earlier rounds are kept" in said
    assert f"fedlora resume {tmp_path / 'run'}" in " ".join(said.split())
    from fedlora.federation.store import Store

    loaded = Store(tmp_path / "run").load_server()
    assert loaded is not None
    assert 2 <= loaded[0] < 200


def test_resume_of_a_finished_run_changes_nothing(done: Path) -> None:
    before = files(done / "run")
    fedlora("resume", done / "run", "-q")
    assert files(done / "run") == before


# report, compare --------------------------------------------------------------------------------------------------------


def test_report_and_compare(done: Path, tmp_path: Path) -> None:
    fedlora("report", done / "run", "-o", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "FedSA-LoRA" in page
    for seed in (1, 2):
        sets = ["--set", f"run.seed={seed}", "--set", "method.name=homlora", "--set", "federation.rounds=1"]
        fedlora("run", done / "recipe.yaml", *sets, "-q", "-o", tmp_path / f"runs/h{seed}")
    fedlora("run", done / "recipe.yaml", "-q", "-o", tmp_path / "runs/f", "--set", "run.seed=3")
    rows = json.loads(fedlora("compare", tmp_path / "runs", "--json").stdout)
    assert {(r["method"], r["seeds"]) for r in rows} == {("HomLoRA", 2), ("FedSA-LoRA", 1)}
    hom = next(r for r in rows if r["method"] == "HomLoRA")
    each = [json.loads((tmp_path / f"runs/h{s}/summary.json").read_text())["test"] for s in (1, 2)]
    assert hom["test"] == pytest.approx(sum(each) / 2)
    assert hom["test_std"] == pytest.approx(abs(each[0] - each[1]) / 2**0.5)
    table = fedlora("compare", tmp_path / "runs").stdout
    assert "HomLoRA" in table
    assert (tmp_path / "runs/comparison.html").exists()


def test_a_sweep_ends_in_a_comparison(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, federation={"rounds": 1}, sweep={"method.name": ["local", "homlora"]})
    said = fedlora("run", recipe, "-q", "-o", tmp_path / "sweep").stdout
    assert "Local-only" in said
    assert "HomLoRA" in said
    assert "always a client's most frequent class: 0." in said
    assert "most frequent class, without a model, scores 0." in (tmp_path / "sweep/comparison.html").read_text()
    assert len(list((tmp_path / "sweep").glob("*/summary.json"))) == 2
    # One copy of the plotting library for all pages, each of which names it from where it lies.
    [library] = (tmp_path / "sweep").rglob("plotly-*.min.js")
    pages = sorted((tmp_path / "sweep").rglob("*.html"))
    assert len(pages) == 3 and sum(p.stat().st_size for p in pages) < 3_000_000
    for page in pages:
        [link] = re.findall(r'<script src="([^"]+)">', page.read_text())
        assert (page.parent / link).resolve() == library.resolve()
    one = pages[-1].parent
    fedlora("report", one)
    assert "<script src" not in (one / "report.html").read_text() and (one / "report.html").stat().st_size > 4_000_000


def test_a_sweep_goes_where_its_recipe_says(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, federation={"rounds": 1}, sweep={"method.name": ["local", "homlora"]})
    fedlora("run", recipe, "-q", "--set", f"run.output={tmp_path}/there/{{method}}")
    assert (tmp_path / "there/comparison.html").exists()
    assert {p.parent.name for p in tmp_path.rglob("summary.json")} == {"local", "homlora"}


# predict, export --------------------------------------------------------------------------------------------------------


def test_predict(done: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("the wave ship\n\nbread soup\n", encoding="utf-8")
    said = [
        json.loads(x)
        for x in fedlora("predict", done / "run", "goal match", "--file", texts, "--json").stdout.splitlines()
    ]
    assert [x["text"] for x in said] == ["goal match", "the wave ship", "bread soup"]
    assert {x["answer"] for x in said} <= {"sport", "food", "sea"}
    assert all(1 / 3 <= x["confidence"] <= 1 for x in said)
    mine, all_ = (
        json.loads(fedlora("predict", done / "run", "goal match", *whose, "--round", "last", "--json").stdout)
        for whose in (("--client", "c1"), ())
    )
    assert mine["confidence"] != all_["confidence"]
    wrong = fedlora("predict", done / "run", "goal", "--client", "c11", code=1).stderr
    assert "client 'c11' is not in this run; did you mean 'c1'" in wrong
    assert "got no text" in fedlora("predict", done / "run", code=1).stderr


def test_export_gives_what_plain_peft_computes(done: Path, tmp_path: Path) -> None:
    """Every exported folder, loaded with PEFT alone, gives the confidence that predict gives."""
    import torch
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    fedlora("export", done / "run", "-o", tmp_path / "g")
    fedlora("export", done / "run", "-o", tmp_path / "all", "--all-clients")
    fedlora("export", done / "run", "-o", tmp_path / "merged", "--client", "c2", "--merged")
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == ["c0", "c1", "c2", "c3"]
    cases = {
        tmp_path / "g": ([], AutoPeftModelForSequenceClassification),
        tmp_path / "all/c1": (["--client", "c1"], AutoPeftModelForSequenceClassification),
        tmp_path / "merged/c2": (["--client", "c2"], AutoModelForSequenceClassification),
    }
    text = "the ship is salt"
    for folder, (flags, loader) in cases.items():
        ours = json.loads(fedlora("predict", done / "run", text, "--json", *flags).stdout)
        options = {} if "merged" in str(folder) else {"num_labels": 3}
        theirs = loader.from_pretrained(folder, **options).eval()
        batch = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
        with torch.inference_mode():
            p = theirs(**batch).logits.softmax(-1)[0]
        assert float(p.max()) == pytest.approx(ours["confidence"], abs=1e-5)
        if "merged" in str(folder):
            assert theirs.config.id2label[int(p.argmax())] == ours["answer"]


# start-up ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("-h",), ("federation",), ("run", "-h")])
def test_help_is_what_stands_there_for_who_asks_nothing(arguments: tuple[str, ...]) -> None:
    said = fedlora(*arguments, code=0)
    assert "Usage: fedlora" in said.stdout and not said.stderr


def test_version_and_help() -> None:
    assert fedlora("--version").stdout.startswith("fedlora 0.")
    said = fedlora("--help").stdout
    for name in ("run", "resume", "check", "methods", "report", "compare", "export", "predict", "demo"):
        assert name in said


def test_a_closed_pipe_is_no_error(done: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        command("methods"), stdout=write, stderr=subprocess.PIPE, text=True, env=environment(), check=False
    )
    os.close(write)
    assert "Traceback" not in process.stderr


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fedlora", "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip()
