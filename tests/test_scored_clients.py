"""`evaluation.clients`: a sample of the clients is scored, the same one in every round, and what that costs does not grow."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from fedlora.data.federated import FederatedData
from fedlora.errors import ConfigError, DataError
from fedlora.federation import views
from fedlora.federation.callbacks import Callback
from fedlora.federation.records import EvalLine, read_lines
from fedlora.federation.run import Federation
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods import METHODS
from fedlora.report.page import run_page
from fedlora.report.read import records
from fedlora.report.statistics import differences
from fedlora.training.optimizers import AdamW


def run(folder: Path, clients: float | None, method: str = "fedsa", seed: int = 7) -> list[EvalLine]:
    data = registered(12)
    f = tiny.federation(
        METHODS[method](rank=4, optimizer=AdamW(1e-2)), folder, data=data, seed=seed,
        evaluation=Evaluation(clients=clients),
    )  # fmt: skip
    f.run()
    return [x for x in read_lines(folder) if isinstance(x, EvalLine)]


def test_the_sample_has_the_scores_that_all_have(tmp_path: Path) -> None:
    """Four of twelve clients: the same four in all rounds and methods, with the numbers of a run that scores everybody."""
    whole, part = run(tmp_path / "a", None), run(tmp_path / "b", 4)
    assert len(whole) == len(part)
    chosen = set(part[0].clients)
    for a, b in zip(whole, part, strict=True):
        assert (a.round, a.view, a.split) == (b.round, b.view, b.split)
        assert set(b.clients) == chosen and len(chosen) == 4 and len(a.clients) == 12
        assert b.clients == {c: a.clients[c] for c in chosen}
        assert b.mean["loss"] == pytest.approx(np.mean([a.clients[c]["loss"] for c in chosen]))
        assert (a.of, b.of) == (0, 12)
        assert "of" not in a.to_json() and b.to_json()["of"] == 12
    assert set(run(tmp_path / "c", 4, "homlora")[0].clients) == chosen
    assert set(run(tmp_path / "d", 4, seed=8)[0].clients) != chosen
    assert len(run(tmp_path / "e", 0.25)[0].clients) == 3


def test_the_page_says_how_many_are_scored(tmp_path: Path) -> None:
    run(tmp_path / "a", 4)
    run(tmp_path / "b", None)
    assert "Scored are 4 of the 12 clients that train" in run_page(records(tmp_path / "a"))["lead"]
    assert "Scored are" not in run_page(records(tmp_path / "b"))["lead"]


def test_more_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation.clients: got 13, expected 1 to 12"):
        run(tmp_path / "a", 13)


def registered(clients: int) -> FederatedData:
    """Every client has one row to train on and one to be scored on, out of the same few."""
    examples = tiny.tokens()
    ids = [f"c{i}" for i in range(clients)]
    rows = tiny.rows(list(np.arange(clients)[:, None] % len(examples)))
    return FederatedData(
        examples, ids, {"train": rows, "test": rows}, tuple(f"class{i}" for i in range(tiny.CLASSES)), None, 0
    )


def test_what_is_not_scored_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A personal method with 1,000 and with 100,000 registered clients, 100 of them scored: as many models are built, and the
    memory of an evaluation is the same but for a few bytes a client."""
    built: list[int] = []
    served = views.served

    def counted(f: Any, engine: Any, server: Any, clients: Any, view: Any) -> Any:
        built.append(len(clients))
        return served(f, engine, server, clients, view)

    monkeypatch.setattr(views, "served", counted)

    def evaluate(clients: int) -> tuple[int, int]:
        """(models built, most bytes of Python's objects and arrays)."""
        f: Federation = tiny.federation(
            METHODS["fedsa"](rank=4), tmp_path / str(clients), data=registered(clients),
            sampling=Sampling(rounds=1, clients_per_round=10), evaluation=Evaluation(views=("personal",), clients=100),
        )  # fmt: skip
        built.clear()
        engine, server = f.engine(Callback()), f.method.init(f.context)
        tracemalloc.start()
        lines = views.evaluate(f, engine, server)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(lines) == 1 and len(lines[0].clients) == 100  # type: ignore[attr-defined]
        return sum(built), most

    (few, little), (many, much) = evaluate(1_000), evaluate(100_000)
    assert few == many == 100
    assert much - little < 64 * 99_000, (little, much)


def test_a_client_without_training_rows_is_named(tmp_path: Path) -> None:
    """Its minibatches would never be full: the run would wait for ever."""
    with pytest.raises(DataError, match=r"data: 1 of 12 clients hold no training rows \(c0\)"):
        tiny.federation(METHODS["fedsa"](rank=4), tmp_path, data=tiny.data(12))


def test_a_comparison_says_which_clients_are_left_out() -> None:
    one = {(s, "p"): {"a": 0.5, "b": 0.6 + s / 100} for s in range(3)}
    two = {(s, "p"): {"b": 0.5, "c": 0.9, "d": 0.1} for s in range(3)}
    [pair] = differences({"x": one, "y": two})
    assert pair.apart == 9  # a, c and d, in three seeds
    assert pair.difference == pytest.approx(0.11)
    assert differences({"x": one, "y": one})[0].apart == 0
