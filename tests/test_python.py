"""The Python face as a newcomer meets it: wrong arguments, tables, what a notebook shows."""

from __future__ import annotations

import html.parser
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cli import write_recipe
from torch import nn

import fedlora as fl
from fedlora.data.partitions import PARTITIONS
from fedlora.errors import ConfigError, DataError, FedloraError, ModelError, StateError

X = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64) + (X[:, 1] > 0.5)


def net(outputs: int = 3) -> fl.Adapted:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))
    return fl.adapt(module, ["0"], ["2"], lambda m, batch: m(batch["x"]))


def data(labels: Any = Y, **more: Any) -> fl.FederatedData:
    columns = {"x": X} if labels is None else {"x": X, "labels": labels}
    return fl.from_arrays(columns, clients=4, **more)


def fed(folder: Path, **changed: Any) -> fl.Federation:
    given = {"model": net(), "task": fl.Classification(3), "data": data(), "method": fl.FedSALoRA(rank=2)} | changed
    options = {"sampling": fl.Sampling(rounds=2), "plan": fl.LocalWork(steps=2)}
    return fl.Federation(**given, output=folder, **options)


def again(folder: Path, **options: Any) -> fl.Federation:
    return fl.Federation(net(), fl.Classification(3), data(), fl.FedSALoRA(rank=2), folder, **options)


WRONG: dict[str, tuple[Callable[[Path], Any], type[FedloraError], str]] = {
    "a rate for an optimizer": (
        lambda p: fl.FedSALoRA(optimizer=1e-2), ConfigError, r"method.optimizer: got 0.01, expected an Optimizer; write fl.AdamW"),
    "a text for a rank": (lambda p: fl.FedSALoRA(rank="8"), ConfigError, r"method.rank: got '8', expected an integer"),
    "True for a rank": (lambda p: fl.FedSALoRA(rank=True), ConfigError, r"method.rank: got True, expected an integer"),
    "an unknown field": (lambda p: fl.FedSALoRA(ranks=8), ConfigError, r"method.ranks: .* did you mean 'rank'"),
    "two problems": (lambda p: fl.FedSALoRA(rank="8", head="mine"), ConfigError, r"(?s)method.rank.*method.head"),
    "an unknown head": (lambda p: fl.FedSALoRA(head="shard"), ConfigError, r"did you mean 'shared'"),
    "a number for betas": (lambda p: fl.AdamW(betas=0.9), ConfigError, r"AdamW.betas: got 0.9, expected a pair"),
    "a negative rate": (lambda p: fl.AdamW(-1.0), ConfigError, r"AdamW.lr: got -1.0"),
    "no class": (lambda p: fl.Classification(0), ConfigError, r"Classification.classes: got 0"),
    "names for a number of classes": (lambda p: fl.Classification(["a", "b"]), ConfigError, r"got \['a', 'b'\], expected an integer"),
    "weights for other classes": (lambda p: fl.Classification(3, (1.0, 2.0)), ConfigError, r"a number >= 0 for each of 3 classes"),
    "half a round": (lambda p: fl.Sampling(rounds=1.5), ConfigError, r"Sampling.rounds: got 1.5, expected an integer"),
    "no round": (lambda p: fl.Sampling(rounds=0), ConfigError, r"Sampling.rounds: got 0, expected an integer >= 1"),
    "a text for steps": (lambda p: fl.LocalWork(steps="3"), ConfigError, r"LocalWork.steps: got '3'"),
    "an unknown view": (lambda p: fl.Evaluation(views=["mine"]), ConfigError, r"Evaluation.views: got \['mine'\]"),
    "evaluation every 0 rounds": (lambda p: fl.Evaluation(every=0), ConfigError, r"Evaluation.every: got 0"),
    "three classes for two": (
        lambda p: fed(p, task=fl.Classification(2), model=net(2)), DataError, r"numbers from 0 to 2, expected 0 to 1 .* Classification\(3\)"),
    "two outputs for three classes": (lambda p: fed(p, model=net(2)), ModelError, r"outputs of shape \[2, 2\] for 2 rows, expected \[2, 3\]"),
    "float labels": (lambda p: fed(p, data=data(Y.astype(np.float32))), DataError, r"labels: float32 .* expected whole numbers"),
    "missing labels": (lambda p: fed(p, data=data(None)), DataError, r'labels: there are none, expected a column "labels"'),
    "labels from 1": (lambda p: fed(p, data=data(Y + 1)), DataError, r"labels: numbers from 1 to 3, expected 0 to 2"),
    "one-hot labels": (lambda p: fed(p, data=data(np.eye(3)[Y])), DataError, r"labels.argmax\(1\) makes them of one-hot rows"),
    "rows in float64": (
        lambda p: fed(p, data=fl.from_arrays({"x": X.astype(float), "labels": Y}, clients=4)), ModelError, r"array.astype\(np.float32\)"),
    "negative labels": (lambda p: data(Y - 1), DataError, r"labels: numbers from -1 to 1, expected classes from 0"),
    "labels as texts": (lambda p: data([str(y) for y in Y]), DataError, r"column 'labels': holds texts .*expected numbers"),
    "rows of several lengths": (lambda p: fl.from_arrays({"x": [[1.0], [1.0, 2.0]]}), DataError, r"expected rows of one shape"),
    "no columns": (lambda p: fl.from_arrays({}), DataError, r"there are no rows"),
    "an array for columns": (lambda p: fl.from_arrays(X), ConfigError, r"from_arrays.columns: got a ndarray, expected a dict"),
    "an unknown partition": (lambda p: data(kind="dirichlett"), ConfigError, r"from_arrays.kind: .* did you mean 'dirichlet'"),
    "a share over 1": (lambda p: data(test=2.0), ConfigError, r"from_arrays.test: got 2.0, expected a share"),
    "shares over 1": (lambda p: data(test=0.6, validation=0.6), ConfigError, r"validation"),
    "a column too short": (lambda p: data(kind="column", by=["a"]), ConfigError, r"from_arrays.by: .*one for each of 200 rows"),
    "more clients than rows": (lambda p: fl.from_arrays({"x": X}, clients=900), FedloraError, r"900"),
    "a module that is not adapted": (lambda p: fed(p, model=nn.Linear(4, 3)), ConfigError, r"expected an Adapted; fl.adapt"),
    "a class for an object": (lambda p: fed(p, method=fl.FedSALoRA), ConfigError, r"the class itself: write FedSALoRA\(\.\.\.\)"),
    "arrays for data": (lambda p: fed(p, data={"x": X}), ConfigError, r"Federation.data: .* fl.from_arrays"),
    "nothing but a folder": (lambda p: fl.Federation(output=p), ConfigError, r"(?s)model: got nothing.*task.*data.*method"),
    "a forward that fails": (
        lambda p: fed(p, model=fl.adapt(nn.Sequential(nn.Linear(5, 3)), ["0"], (), lambda m, b: m(b["x"]))),
        ModelError, r"its forward cannot compute a batch of x float32 \[2, 4\]"),
    "a call of another input": (
        lambda p: fed(p, model=fl.adapt(nn.Sequential(nn.Linear(4, 3)), ["0"], (), lambda m, b: m(b["y"]))), ModelError, r"KeyError"),
    "a model id for adapt": (lambda p: fl.adapt("bert", ["query"]), ConfigError, r"adapt.base: got 'bert', expected a Module"),
    "a layer that is none": (lambda p: fl.adapt(nn.Sequential(nn.Linear(4, 3)), ["q"]), ModelError, r"'q' matches no layer"),
    "a head that is none": (lambda p: fl.adapt(nn.Sequential(nn.Linear(4, 3)), ["0"], ["9"]), ModelError, r"9"),
    "one text for sets": (lambda p: fl.run(write_recipe(p), "train.lr=1"), ConfigError, r"run.sets: got 'train.lr=1', expected a list"),
    "an unknown field in sets": (lambda p: fl.run(write_recipe(p), {"train.lrr": 1}), ConfigError, r"train.lrr: got 1, expected a field"),
    "an object in sets": (lambda p: fl.run(write_recipe(p), {"method": fl.FedSALoRA()}), ConfigError, r"a value that a recipe can hold"),
    "a number for a recipe": (lambda p: fl.run(3), ConfigError, r"run.recipe: got 3, expected a text, a path, a dict or a Recipe"),
    "an unknown argument": (lambda p: fl.run(write_recipe(p), outptu="x"), ConfigError, r"run.outptu: .* did you mean 'output'"),
    "a missing recipe": (lambda p: fl.run(p / "no.yaml"), FedloraError, r"no.yaml"),
    "a watch that is none": (lambda p: fl.run(write_recipe(p), watch=print), ConfigError, r"run.watch: .* inherit from fl.Callback"),
    "block 0": (lambda p: again(p, block=0), ConfigError, r"Federation.block: got 0, expected an integer >= 1"),
    "patience 0": (lambda p: again(p, patience=0), ConfigError, r"Federation.patience: got 0"),
    "accumulation 0": (lambda p: again(p, accumulation=0), ConfigError, r"Federation.accumulation: got 0"),
    "an unknown tracker": (lambda p: again(p, trackers=["tensorbord"]), ConfigError, r"did you mean 'tensorboard'"),
    "an unknown schedule": (lambda p: fl.Schedule("cosin"), ConfigError, r"Schedule.kind: .* did you mean 'cosine'"),
    "twice the run to warm up": (lambda p: fl.Schedule("cosine", 2.0), ConfigError, r"Schedule.warmup: got 2.0"),
    "a function to watch": (lambda p: fed(p).run(print), ConfigError, r"run.watch: .* inherit from fl.Callback"),
    "classes for a language model": (lambda p: fed(p, task=fl.CausalLM()), ModelError, r"CausalLM\(.*cannot score outputs of shape"),
    "no labels for tags": (lambda p: fed(p, task=fl.TokenClassification(), data=data(None)), DataError, r"labels: there are none"),
    "classes for tags": (lambda p: fed(p, task=fl.TokenClassification()), ModelError, r"cannot score outputs of shape"),
    "classes for several labels": (lambda p: fed(p, task=fl.MultiLabel(3)), DataError, r"expected 0 or 1 in \[rows, 3\]"),
    "no folder": (lambda p: fl.load(p / "none"), StateError, r"no such run folder"),
    "an empty folder": (lambda p: fl.results(p), StateError, r"no run folder here or below"),
    "a folder that is not there": (lambda p: fl.compare(p / "runz"), StateError, r"no such folder"),
    "a sweep of nothing": (lambda p: fl.sweep(write_recipe(p), {"sweep.run.seed": 3}, p / "s"), ConfigError, r"a list of values"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str, tmp_path: Path) -> None:
    """Each is an error of the house, says what came and what was expected, and leaves no run behind."""
    do, error, said = WRONG[name]
    with pytest.raises(error, match=said):
        do(tmp_path)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_what_fits() -> None:
    """Numbers of numpy, lists for tuples and whole numbers for real ones are as good as the others."""
    assert fl.Sampling(rounds=np.int64(3)).rounds == 3
    assert fl.AdamW(lr=np.float32(0.5)).lr == 0.5
    assert fl.AdamW(lr=1, betas=[0.9, 0.99]).betas == [0.9, 0.99]
    assert fl.FedSALoRA(clip=1).clip == 1
    short = fl.from_arrays({"x": X, "labels": Y.astype(np.int32)}, clients=4)
    assert short.examples.labels is not None and short.examples.labels.dtype == np.int64
    assert fl.from_arrays({"x": torch.zeros(40, 2), "labels": [0, 1] * 20}, clients=2).label_names == ("0", "1")


def test_a_method_of_ones_own_is_looked_at_too() -> None:
    @dataclass(frozen=True)
    class Mine(fl.HomLoRA):
        name: ClassVar[str] = "mine"
        pace: float = 1.0

    assert Mine(rank=2, pace=2).pace == 2
    with pytest.raises(ConfigError, match=r"method.pcae: .* did you mean 'pace'"):
        Mine(pcae=2)  # type: ignore[call-arg]


def test_from_arrays_has_every_option() -> None:
    """Of each kind of partition that comes with the package, by name and type; none is hidden."""
    own = inspect.signature(fl.from_arrays).parameters
    assert {f.name for cls in PARTITIONS.values() for f in fields(cls)} <= set(own)  # type: ignore[arg-type]
    assert fl.from_arrays({"x": X}, clients=3, options={"min_size": 20}).splits["train"].sizes.min() > 0


def test_help_shows_types() -> None:
    """No argument of what fl exposes as a function is without a type, or hidden in **options."""
    for name in ("run", "check", "sweep", "results", "compare", "load", "adapt", "from_arrays"):
        signature = inspect.signature(getattr(fl, name))
        for p in signature.parameters.values():
            assert p.annotation is not p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL), (name, p)
        assert signature.return_annotation is not signature.empty
    for cls in (fl.FedSALoRA, fl.AdamW, fl.Federation, fl.Sampling, fl.Classification):
        signature = inspect.signature(cls)
        assert all(p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in signature.parameters.values())


class Cells(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert tag in ("table", "caption", "tbody", "tr", "td"), tag
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over two methods, and an interrupted run beside it."""
    root = tmp_path_factory.mktemp("face")
    recipe = write_recipe(root)
    done = fl.sweep(recipe, {"sweep.method.name": ["homlora", "fedsa"], "federation.rounds": 2}, root / "runs")
    assert [s["method"]["name"] for s in done] == ["homlora", "fedsa"]

    class Stop(fl.Callback):
        def round_done(self, round: int, facts: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fl.run(recipe, {"federation.rounds": 2, "run.seed": 7}, root / "runs/half", Stop())
    return root


def test_results_are_those_of_the_files(runs: Path) -> None:
    """One row for each run and view, the numbers of summary.json, and the fields in which runs differ."""
    table = fl.results(runs / "runs")
    assert sorted(table["state"].unique()) == ["done", "unfinished"]
    assert len(table[table["state"] == "unfinished"]) == 1
    for _, row in table[table["state"] == "done"].iterrows():
        s = json.loads((Path(row["folder"]) / "summary.json").read_text())
        s = s.get("data", s)  # the file is sealed
        view = s["views"][row["view"]]
        assert row["accuracy"] == view["mean"]["accuracy"]
        assert row["worst_decile"] == view["worst_decile"]["accuracy"]
        assert (row["method"], row["bytes_up"], row["chosen_round"]) == (
            s["method"]["name"],
            s["bytes"]["up"],
            s["chosen_round"],
        )
        assert set(s["views"]) == set(table[table["folder"] == row["folder"]]["view"])
    assert len(fl.results([runs / "runs", runs / "runs/half"])) == len(table)


def test_compare_is_the_commands_table(runs: Path, tmp_path: Path) -> None:
    from fedlora.report.tables import compare_rows

    done = sorted(
        {
            f
            for f, s in zip(fl.results(runs / "runs")["folder"], fl.results(runs / "runs")["state"], strict=True)
            if s == "done"
        }
    )
    table = fl.compare(done, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 1000
    for row, own in zip(table.to_dict("records"), compare_rows(done), strict=True):
        assert (
            row["method"] == own["method"] and row["test"] == own["test"] and row["bytes_total"] == own["bytes_total"]
        )


def test_a_sweep_goes_on(runs: Path) -> None:
    """Called again it trains nothing again, and the command knows it as a sweep."""
    folder = runs / "runs"
    before = {p: p.read_bytes() for p in folder.glob("*/metrics.jsonl")}
    heard = []

    class Ear(fl.Callback):
        def round_done(self, round: int, facts: Any) -> None:
            heard.append(round)

    fl.sweep(runs / "recipe.yaml", {"sweep.method.name": ["homlora", "fedsa"], "federation.rounds": 2}, folder, Ear())
    assert heard == []
    assert all(p.read_bytes() == b for p, b in before.items())
    assert (folder / "sweep.json").exists()


def test_summary_in_a_notebook(tmp_path: Path) -> None:
    """A dict as before, whose history is that of the records, and whose table escapes names."""
    f = fed(tmp_path / "r", **{"method": fl.HomLoRA(rank=2)})
    f.name = "<b>mine</b>"
    s = f.run()
    stored = json.loads((tmp_path / "r/summary.json").read_text())
    assert dict(s) == json.loads(json.dumps(s)) and s["test"] == stored.get("data", stored)["test"]
    assert len(repr(s)) < 200 and "Summary(" in repr(s)
    cells = Cells(s._repr_html_()).cells
    assert "<b>mine</b>: HomLoRA" in cells[0] and f"{s['test']:.3f}" in cells
    history = s.history
    train = history[history["split"] == "train"]
    assert list(train["round"]) == [1, 2]
    assert train["bytes_up"].sum() == s["bytes"]["up"] and train["bytes_down"].sum() == s["bytes"]["down"]
    at = history[
        (history["split"] == "test") & (history["view"] == "personal") & (history["round"] == s["chosen_round"])
    ]
    assert at["accuracy"].item() == s["test"]


def test_load_of_a_run_made_of_objects(tmp_path: Path) -> None:
    """The objects are given again; scores and predictions are those of the run."""
    made = fed(tmp_path / "r")
    s = made.run()
    with pytest.raises(StateError, match=r"a run made of objects, .* fl\.load\("):
        fl.load(tmp_path / "r")
    with pytest.raises(StateError, match=r"belongs to a run"):
        fl.load(tmp_path / "r", fed(tmp_path / "q", method=fl.FedSALoRA(rank=1)))
    opened = fl.load(tmp_path / "r", fed(tmp_path / "r"))
    clients = list(made.data.ids)
    scores = opened.evaluate(clients=clients)
    assert np.isclose(np.mean([scores[c]["accuracy"] for c in clients]), s["test"])
    rows = made.data.splits["test"][0]
    said = opened.predict({"x": X[rows]}, client=clients[0])
    right = np.mean([int(p.answer) == y for p, y in zip(said, Y[rows], strict=True)])
    assert np.isclose(right, scores[clients[0]]["accuracy"])
    assert all(abs(sum(p.probabilities.values()) - 1) < 1e-6 for p in said if p.probabilities)
    with pytest.raises(DataError, match=r"no column 'x'"):
        opened.predict({"y": X})
    with pytest.raises(DataError, match=r"rows of shape \[3\], expected \[4\]"):
        opened.predict({"x": X[:, :3]})
    with pytest.raises(StateError, match=r"names no pretrained model"):
        opened.export(tmp_path / "out")
    assert len(repr(opened)) < 200


def test_without_pandas(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clear line, and no traceback of an import."""
    import sys

    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(FedloraError, match=r"no tables: pandas cannot be imported .*pip install pandas"):
        fl.results(runs / "runs")
