"""Reports: self-contained, true to the records, safe with any name, readable while a run goes on."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import pytest
import tiny
from cli import fedlora, write_recipe

import fedlora as fl
from fedlora import report
from fedlora.cli.actions import run_folders
from fedlora.data.examples import Rows
from fedlora.errors import StateError
from fedlora.federation.records import EvalLine, TrainLine
from fedlora.federation.summary import partition_facts
from fedlora.files import sealed
from fedlora.report import figures, races
from fedlora.report.read import records

pytest.importorskip("plotly")
EVIL = "</script><script>alert(1)</script>&\"'"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clients, two of them with odd names, three views and a cross matrix."""
    folder = tmp_path_factory.mktemp("report")
    write_recipe(folder)
    text = (
        (folder / "rows.csv")
        .read_text()
        .replace("site-1", EVIL.replace('"', '""').join('""'))
        .replace("site-2", "ü<b>")
    )
    (folder / "rows.csv").write_text(text)
    recipe = write_recipe(
        folder,
        data={"client": "who"},
        partition={"kind": "column", "unseen": 1},
        evaluation={"views": ["personal", "global", "cross"]},
    )
    fl.run(recipe, output=folder / "run")
    return folder / "run"


def test_a_page_is_self_contained(run: Path) -> None:
    page = report.write_run(run).read_text(encoding="utf-8")
    own = re.sub(r"<script>/\*\*.*?</script>", "", page, flags=re.DOTALL)  # without the plotting library
    assert len(own) < 400_000 < len(page)
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", own)
    assert "@import" not in own
    assert own.count("Plotly.newPlot(") >= 6


def test_a_page_finds_the_library_beside_it(run: Path, tmp_path: Path) -> None:
    """Whatever the folders' names, and before it draws."""
    beside = tmp_path / "my sweep #1 100%"
    page = report.write_run(run, beside / "a run" / "page.html", beside).read_text(encoding="utf-8")
    [link] = re.findall(r'<script src="([^"]+)"></script>', page)
    [library] = beside.glob("plotly-*.min.js")
    opened = urljoin((beside / "a run/page.html").as_uri(), link)
    assert opened == library.as_uri()
    assert page.index(link) < page.index("Plotly.newPlot(") and len(page) < 400_000
    with_it = re.sub(
        r"<script>/\*\*.*?</script>", "", report.write_run(run).read_text(encoding="utf-8"), flags=re.DOTALL
    )
    assert page.count("Plotly.newPlot(") == with_it.count("Plotly.newPlot(")


def test_names_cannot_break_out(run: Path) -> None:
    page = report.write_run(run).read_text(encoding="utf-8")
    own = page[page.index("<body>") :]
    assert "<script>alert" not in own
    assert (
        "<b>"
        not in re.sub(r"<div class=\"tile\"><span>[^<]*</span><b>", "", own)
        .replace("ü<b>", "", 0)
        .split("Recipe")[0]
        .split("<script>")[0]
    )
    scripts = re.findall(r"<script>(.*?)</script>", own, flags=re.DOTALL)
    assert any("alert(1)" in s for s in scripts)  # there, as data
    assert scripts.pop() == "if (dark.matches) paint(true);"
    for s in scripts:
        data = s[s.index("{const f=") + 9 : s.rindex(";drawn(")]
        json.loads(data.replace("<\\/", "</").replace("\\u0021", "!"))


def test_numbers_on_the_page_are_those_of_the_summary(run: Path) -> None:
    page = report.write_run(run).read_text(encoding="utf-8")
    s = json.loads((run / "summary.json").read_text())
    for view, scores in s["views"].items():
        tile = re.search(rf"accuracy, {view}</span><b>([0-9.]+)</b>", page)
        assert tile, view
        assert float(tile[1]) == pytest.approx(scores["mean"]["accuracy"], abs=5e-4)
    assert f"{s['parameters']['trainable']:,}" in page
    assert json.loads((run / "recipe.json").read_text())["hash"] in page


def test_curves_are_those_of_the_metrics(run: Path) -> None:
    r = records(run)
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    want = [
        (x["round"], x["mean"]["accuracy"])
        for x in lines
        if x["kind"] == "eval" and (x["view"], x["split"]) == ("personal", "test")
    ]
    fig = figures.progress(r)
    assert fig is not None
    curve = next(t for t in fig.data if t.name == "personal model")
    assert list(zip(curve.x, curve.y, strict=True)) == want
    sent, total = {0: 0}, 0
    for x in lines:
        if x["kind"] == "train":
            total += sum(sum(d.values()) for d in x["bytes"].values())
            sent[x["round"]] = total
    fig = figures.progress(r, "bytes")
    assert fig is not None
    curve = next(t for t in fig.data if t.name == "personal model")
    assert list(curve.x) == [sent[round] / 1e6 for round, _ in want]


@pytest.mark.parametrize("view", ["personal", "global"])
def test_a_race_is_of_its_view(view: str, run: Path) -> None:
    """Mean scores of that view on test, against rounds and against megabytes sent by then. Every evaluation has a score of its own."""
    found = records(run)
    lines = [
        dataclasses.replace(x, mean={"accuracy": i / 100}) if isinstance(x, EvalLine) else x
        for i, x in enumerate(found.lines)
    ]
    scores = {
        x.round: x.mean["accuracy"] for x in lines if isinstance(x, EvalLine) and (x.view, x.split) == (view, "test")
    }
    sent = {0: 0.0}
    for x in lines:
        if isinstance(x, TrainLine):
            sent[x.round] = max(sent.values()) + sum(sum(d.values()) for d in x.bytes.values()) / 1e6
    for against, at in (("rounds", {t: t for t in scores}), ("bytes", sent)):
        fig = races.race({"m": [dataclasses.replace(found, lines=lines)]}, against, view)
        assert fig is not None
        [curve] = [t for t in fig.data if t.name == "m"]
        assert list(zip(curve.x, curve.y, strict=True)) == [(pytest.approx(at[t]), v) for t, v in scores.items()]


def test_partition_picture_holds_every_row(run: Path) -> None:
    fig = figures.partition(records(run))
    assert fig is not None
    facts = json.loads((run / "partition.json").read_text())
    assert sum(sum(t.x) for t in fig.data) == sum(facts["sizes"]["train"])


def test_a_running_run_can_be_looked_at(run: Path, tmp_path: Path) -> None:
    """No summary yet, a line half written."""
    for name in ("recipe.json", "partition.json", "environment.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    whole = (run / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole[:-40])
    page = report.write_run(tmp_path).read_text(encoding="utf-8")
    assert "This run is not finished" in page
    (tmp_path / "metrics.jsonl").unlink()
    report.write_run(tmp_path)


def test_comparison_of_seeds(run: Path, tmp_path: Path) -> None:
    folders = []
    for method in ("local", "homlora"):
        for seed in (0, 1):
            out = tmp_path / f"{method}{seed}"
            fl.run(
                run.parent / "recipe.yaml", [f"method.name={method}", f"run.seed={seed}", "federation.rounds=1"], out
            )
            folders.append(out)
    page = report.write_comparison(folders, tmp_path / "c.html").read_text(encoding="utf-8")
    assert "Local-only" in page
    rows = report.compare_rows(folders)
    assert [(r["method"], r["seeds"]) for r in rows] == [("Local-only", 2), ("HomLoRA", 2)]
    for r in rows:
        assert f"{r['test']:.3f} ± {r['test_std']:.3f}" in page


def test_the_answer_without_a_model_is_one_number_or_a_range() -> None:
    rows = lambda *xs: [{"constant": x} for x in xs]  # noqa: E731
    assert report.tables.constant(rows(None, None)) is None
    assert report.tables.constant(rows(0.8, None, 0.8)) == "0.800"
    assert report.tables.constant(rows(0.8, 0.25, 0.5)) == "0.250 to 0.800"


def test_a_score_is_said_to_be_of_its_view(run: Path, tmp_path: Path) -> None:
    """A run without personal views is not shown under "personal"; where runs differ, each says its own."""
    for name, views in (("own", "[personal, global]"), ("shared", "[global]")):
        sets = [f"evaluation.views={views}", "federation.rounds=1"]
        fl.run(run.parent / "recipe.yaml", sets, tmp_path / name)
    own, shared = (report.compare_rows([tmp_path / n])[0] for n in ("own", "shared"))
    assert (own["view"], shared["view"]) == ("personal", "global")
    assert shared["test"] == shared["global"] == own["global"] and shared["worst_decile"] is not None
    assert [report.tables.heading(r) for r in ([own], [shared], [own, shared])] == ["personal", "global", "test"]
    assert report.tables.score(shared, "global") == f"{shared['test']:.3f}"
    assert report.tables.score(shared, "test") == f"{shared['test']:.3f} global"
    assert report.tables.score(own | {"test_std": 0.1}, "test") == f"{own['test']:.3f} ± 0.100 personal"
    assert report.tables.score(own | {"test": None}, "test") == "–"
    assert report.tables.score(own | {"test": float("nan"), "test_std": 0.1}, "test") == "–"

    def heads(*names: str) -> list[str]:
        page = report.write_comparison([tmp_path / n for n in names], tmp_path / "c.html").read_text(encoding="utf-8")
        return re.findall(r"<th[^>]*>([^<]*)</th>", page)

    assert "personal" in heads("own") and "global" in heads("own")
    assert "personal" not in heads("shared") and heads("shared").count("global") == 1
    assert {"test", "global"} <= set(heads("own", "shared")) and "personal" not in heads("own", "shared")


def test_settings_of_one_method_are_told_apart(run: Path, tmp_path: Path) -> None:
    for rank in (1, 2):
        fl.run(
            run.parent / "recipe.yaml",
            ["method.name=homlora", f"method.rank={rank}", "federation.rounds=1"],
            tmp_path / str(rank),
        )
    assert [r["method"] for r in report.compare_rows([tmp_path / "1", tmp_path / "2"])] == [
        "HomLoRA rank=1",
        "HomLoRA rank=2",
    ]


@pytest.mark.parametrize("clients", [3, 61, 2000])
def test_any_number_of_clients(clients: int, run: Path, tmp_path: Path) -> None:
    """Bars for few, a heat map for many; the page stays small."""
    for path in run.iterdir():
        if path.suffix in (".json", ".jsonl"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    ids = [f"c{i}" for i in range(clients)]
    facts: dict[str, Any] = json.loads((run / "partition.json").read_text())
    facts |= {"ids": ids, "sizes": {"train": [6] * clients}, "histogram": {"train": [[1, 2, 3]] * clients}}
    sealed.write(tmp_path / "partition.json", {k: v for k, v in facts.items() if k != "checksum"})
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    for x in lines:
        if x["kind"] == "eval":
            x["clients"] = {i: {"n": 6, "accuracy": 0.5, "loss": 1.0} for i in ids}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    page = report.write_run(tmp_path).read_text(encoding="utf-8")
    assert len(page) < 7_500_000
    assert ('"type":"heatmap"' in page[page.index("<body>") :]) or clients == 3


def test_run_folders_may_be_globbed(run: Path, tmp_path: Path) -> None:
    """A sweep writes its comparison beside its runs; other files are still refused."""
    (tmp_path / "a").symlink_to(run)
    (tmp_path / "comparison.html").write_text("a page")
    assert run_folders(sorted(tmp_path.iterdir())) == run_folders([tmp_path]) == [tmp_path / "a"]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StateError, match=r"comparison.html: a page, no run folder"):
        run_folders([tmp_path / "comparison.html"])
    with pytest.raises(StateError, match=r"notes.txt: no run folder here or below"):
        run_folders(sorted(tmp_path.iterdir()))


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"no recipe.json, so this is no run folder"):
        report.write_run(tmp_path)


def test_a_changed_score_is_noticed_by_its_digest(run: Path, tmp_path: Path) -> None:
    """The newest server's state holds the digest of metrics.jsonl; no report is made of other lines."""
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run/metrics.jsonl"
    data = file.read_bytes()
    digit = re.search(rb'"loss": \d\.(\d)', data)
    assert digit is not None
    file.write_bytes(data[: digit.start(1)] + (b"7" if digit[1] == b"8" else b"8") + data[digit.end(1) :])
    with pytest.raises(StateError, match=r"metrics.jsonl: was changed after it was written"):
        records(tmp_path / "run")


def test_without_plotly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(report.MissingPlotly, match=r"pip install 'fedlora\[report\]'"):
        report.write_run(run)


def fake(folder: Path, seed: int, method: str, scores: list[list[float]]) -> Path:
    """A run written by hand: scores[round][client]; 1000 bytes down and 500 up a round, 2 s of training."""
    folder.mkdir(parents=True)
    recipe = {
        "method": {"name": method},
        "run": {"seed": seed},
        "evaluation": {"bandwidth": [0.008, 0.004], "target": None},
    }
    ids = [f"c{i}" for i in range(len(scores[0]))]
    metrics: list[dict[str, Any]] = []
    for t, each in enumerate(scores):
        if t:
            zero = {"adapter": 0, "head": 0}
            sent = {"down": zero | {"framing": 1000}, "up": zero | {"framing": 500}}
            metrics.append(
                {
                    "kind": "train",
                    "round": t,
                    "loss": 1.0,
                    "clients": ids,
                    "losses": {},
                    "examples": 1,
                    "bytes": sent,
                    "refused": {},
                }
            )
        by = {c: {"n": 1, "accuracy": s} for c, s in zip(ids, each, strict=True)}
        for split in ("validation", "test"):
            mean = {"accuracy": sum(each) / len(each)}
            metrics.append(
                {
                    "kind": "eval",
                    "round": t,
                    "view": "personal",
                    "split": split,
                    "clients": by,
                    "mean": mean,
                    "weighted": mean,
                    "worst_decile": mean,
                }
            )
    best = max(range(len(scores)), key=lambda t: sum(scores[t]))
    view = {k: {"accuracy": sum(scores[best]) / len(ids)} for k in ("mean", "weighted", "worst_decile")}
    summary = {"metric": "accuracy", "chosen_round": best, "chosen_on": "validation", "test": view["mean"]["accuracy"], "test_last10": 0.0, "last_rounds": 10,
               "views": {"personal": view}, "method": {"title": method}, "parameters": {"trainable": 1, "shared": 1, "base": 1, "personal": 0, "head": 0},
               "bytes": {"total": 1500 * (len(scores) - 1), "up": 0, "down": 0}, "seconds": 1.0, "peak_memory_bytes": 1, "rounds": len(scores) - 1}  # fmt: skip
    for name, value in {
        "recipe.json": {"hash": "x", "recipe": recipe},
        "summary.json": summary,
        "partition.json": {"ids": ids, "sizes": {"train": [1] * len(ids)}},
    }.items():
        sealed.write(folder / name, value)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
    (folder / "timings.jsonl").write_bytes(
        b"".join(
            sealed.line(
                {
                    "round": t,
                    "train_seconds": 2.0,
                    "eval_seconds": 0,
                    "server_seconds": 0,
                    "tokens": 0,
                    "peak_memory_bytes": 0,
                }
            )
            for t in range(1, len(scores))
        )
    )
    return folder


def test_cost_to_a_common_target_by_hand(tmp_path: Path) -> None:
    """Two clients; the weaker run ends at 0.5, so that is the target: round 2 there, round 1 in the other.

    A round: (2 s + 1000 B at 1000 B/s + 500 B at 500 B/s) / 2 clients = 2 s.
    """
    a = fake(tmp_path / "a", 0, "slow", [[0, 0], [0.2, 0.4], [0.6, 0.4], [0.1, 0.1]])
    b = fake(tmp_path / "b", 0, "fast", [[0, 0], [0.6, 0.4], [0.8, 0.8], [0.9, 0.9]])
    rows = {r["method"]: r for r in report.compare_rows([a, b])}
    assert rows["slow"]["target"] == rows["fast"]["target"] == 0.5
    assert [rows[m]["target_round"] for m in ("slow", "fast")] == [2, 1]
    assert [rows[m]["target_bytes"] for m in ("slow", "fast")] == [3000, 1500]
    assert [rows[m]["target_seconds"] for m in ("slow", "fast")] == [pytest.approx(4.0), pytest.approx(2.0)]


def test_a_seed_that_never_reached_the_target_is_not_left_out(tmp_path: Path) -> None:
    """One of two seeds reached 0.7: the mean of those that did would flatter the method, so there is no cost to tell."""
    from fedlora.report.tables import cost_to, grouped

    seeds = [fake(tmp_path / f"s{i}", i, "m", [[0, 0], [high, high]]) for i, high in enumerate((0.8, 0.6))]
    [runs] = grouped([records(f) for f in seeds]).values()
    assert cost_to(runs, 0.7) == {
        "target": 0.7, "target_round": None, "target_bytes": None, "target_seconds": None,
    }  # fmt: skip
    assert cost_to(runs, 0.5)["target_round"] == 1


def test_pairs_by_hand(tmp_path: Path) -> None:
    """Three seeds of two clients each: gaps 0.02, 0.04 and 0.09, so Student's interval is 0.05 +- 4.303 * 0.0361 / sqrt(3)."""
    from fedlora.report.tables import grouped, paired

    gaps = (0.02, 0.04, 0.09)
    runs = []
    for seed, gap in enumerate(gaps):
        for method, more in (("x", gap), ("y", 0.0)):
            scores = [[0.1, 0.2], [0.4 + more, 0.6 + more]]
            runs.append(records(fake(tmp_path / f"{method}{seed}", seed, method, scores)))
    [pair] = paired(grouped(runs))
    assert (pair.a, pair.b, pair.seeds, pair.p) == ("x", "y", 3, None)
    assert pair.difference == pytest.approx(0.05)
    assert (pair.low, pair.high) == (pytest.approx(-0.03957, abs=1e-4), pytest.approx(0.13957, abs=1e-4))
    assert pair.verdict == "3 seeds cannot tell"
    other = records(fake(tmp_path / "z", 7, "z", [[0.1, 0.2], [0.3, 0.4]]))
    assert paired(grouped([runs[0], other])) == []  # another seed is another partition


def test_clients_against_the_first_setting_by_hand(tmp_path: Path) -> None:
    """Two seeds of three clients: y is better for one, equal for two and worse for three of six."""
    from fedlora.report.tables import against, grouped

    scores = {"x": ([0.5, 0.5, 0.5], [0.2, 0.4, 0.6]), "y": ([0.6, 0.5, 0.4], [0.1, 0.4, 0.5])}
    runs = [
        records(fake(tmp_path / f"{m}{i}", i, m, [[0.0] * 3, s]))
        for m, each in scores.items()
        for i, s in enumerate(each)
    ]
    groups = grouped(runs)
    [found] = against(groups)
    assert (found.name, found.won, found.tied, found.lost, found.seeds) == ("y", 1, 2, 3, 2)
    [other] = against(groups, "y")
    assert (other.name, other.won, other.tied, other.lost) == ("x", 3, 2, 1)


def test_a_comparison_as_csv_markdown_and_latex(tmp_path: Path) -> None:
    """CSV holds the exact numbers; the other two what the page shows, with signs that LaTeX knows."""
    import csv as csv_

    runs = [
        fake(tmp_path / f"{m}{i}", i, m, [[0, 0], [0.5, a + i / 10]])
        for i in (0, 1)
        for m, a in (("a_b", 0.2), ("50%", 0.4))
    ]
    rows = {r["method"]: r for r in report.compare_rows(runs)}
    for r in runs:
        (r / "recipe.yaml").write_text("name: by hand\n", encoding="utf-8")
    read = {r["method"]: r for r in csv_.DictReader(fedlora("compare", *runs, "--to", "csv").stdout.splitlines())}
    assert read.keys() == rows.keys() and all(float(read[m]["test"]) == rows[m]["test"] for m in rows)
    marked = fedlora("compare", *runs, "--to", "markdown").stdout.splitlines()
    cells = [[c.strip() for c in x.strip("|").split("|")] for x in marked if x.startswith("|")]
    assert [c[0] for c in cells[2:]] == list(rows) and len({len(c) for c in cells}) == 1
    assert f"{rows['a_b']['test']:.3f} ± {rows['a_b']['test_std']:.3f}" in cells[2 + list(rows).index("a_b")]
    assert "on 2 test rows" in marked[-1] and "standard deviation over seeds" in marked[-1]
    fedlora("compare", *runs, "--to", "latex", "-o", tmp_path / "t.tex")
    text = (tmp_path / "t.tex").read_text(encoding="utf-8")
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:]
    assert {x.split(" & ")[0] for x in body} == {r"a\_b", r"50\%"} and all(x.endswith(r" \\") for x in body)
    assert "±" not in text and r"$\pm$" in text and text.count(r"\begin") == text.count(r"\end")


@pytest.mark.parametrize(
    "field, value",
    [
        ("rows", "another"),
        ("ids", ["a", "z"]),
        ("histogram", {"train": [[5, 1], [1, 5]]}),
        ("sizes", {"train": [1, 2]}),
    ],
)
def test_runs_on_other_partitions_are_no_pair(field: str, value: Any, tmp_path: Path) -> None:
    """Equal sizes do not make an equal partition: the same client must have the same rows, and the same classes where that is
    all that is known."""
    from fedlora.report.tables import grouped, paired

    runs = [records(fake(tmp_path / m, 1, m, [[0.1, 0.2], [0.4, 0.6]])) for m in ("x", "y")]
    held = {"ids": ["a", "b"], "sizes": {"train": [6, 6]}} | (
        {"rows": "some"} if field == "rows" else {"histogram": {"train": [[3, 3], [3, 3]]}}
    )
    alike = [dataclasses.replace(r, partition=dict(held)) for r in runs]
    assert len(paired(grouped(alike))) == 1
    alike[1].partition[field] = value
    assert paired(grouped(alike)) == []


def test_a_run_tells_which_rows_each_client_has() -> None:
    """The digest of a partition changes where two clients exchange a row of one class."""
    d = tiny.data()
    train = d.splits["train"]
    first, second = train.rows[train.offsets[0]], train.rows[train.offsets[1]]
    moved = train.rows.copy()
    moved[[train.offsets[0], train.offsets[1]]] = second, first
    other = dataclasses.replace(d, splits=d.splits | {"train": Rows(train.offsets, moved)})
    assert partition_facts(d)["rows"] == partition_facts(tiny.data())["rows"] != partition_facts(other)["rows"]
