"""Scores and their summaries, against hand-worked numbers and numpy."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from fedlora.training.metrics import Predictions, Scores, summary
from fedlora.training.tasks import TASKS

better = TASKS["classification"].better


def score(p: Predictions, kind: str) -> Scores:
    return TASKS[kind].of(["a", "b"], {}).scores([p])[0]


def of(values: list[float], labels: list[float], losses: list[float] | None = None) -> Predictions:
    n = len(values)
    return Predictions(np.array(losses or [1.0] * n), np.ones(n), np.array(values), np.array(labels))


def test_classification_by_hand() -> None:
    """Two classes: tp 2, fp 1, fn 1, tn 2."""
    s = score(of([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]), "classification")
    assert s["accuracy"] == pytest.approx(4 / 6)
    assert s["macro_f1"] == pytest.approx(2 / 3)
    assert s["matthews"] == pytest.approx((2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3))


ORACLES = {
    "accuracy": lambda true, said: sk.accuracy_score(true, said),
    "macro_f1": lambda true, said: sk.f1_score(true, said, average="macro", zero_division=0.0),
    "matthews": lambda true, said: sk.matthews_corrcoef(true, said),
}


def test_classification_is_as_scikit_learn_has_it() -> None:
    """Of clients of every size at once, classes missing on either side included."""
    g = np.random.default_rng(0)
    clients = []
    for n in (1, 2, 7, 40):
        true, said = g.integers(0, 4, (2, n))
        clients.append(Predictions(np.ones(n), np.ones(n), said, np.where(g.random(n) < 0.5, said, true)))
    for p, found in zip(clients, TASKS["classification"].of("abcd", {}).scores(clients), strict=True):
        assert found.keys() == ORACLES.keys() | {"n", "loss"}
        for name, oracle in ORACLES.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert found[name] == pytest.approx(oracle(p.labels, p.values)), name


def test_one_class_is_no_division_by_zero() -> None:
    s = score(of([0, 0], [0, 0]), "classification")
    assert (s["accuracy"], s["matthews"]) == (1.0, 0.0)
    assert score(of([1.0, 1.0], [1.0, 2.0]), "regression")["pearson"] == 0.0


def test_regression_against_numpy() -> None:
    r = np.random.default_rng(0)
    x, y = r.normal(size=30), r.normal(size=30)
    s = score(of(list(x), list(y)), "regression")
    assert s["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
    assert s["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_language_modelling() -> None:
    """Loss is per token over all rows, not a mean of means; bits per character is over characters."""
    p = Predictions(np.array([2.0, 9.0]), np.array([2.0, 3.0]), None, None, np.array([4, 6]))
    s = score(p, "causal-lm")
    assert s["loss"] == pytest.approx(11 / 5)
    assert s["perplexity"] == pytest.approx(math.exp(11 / 5))
    assert s["bits_per_character"] == pytest.approx(11 / math.log(2) / 10)


def test_summary_over_clients() -> None:
    clients = {f"c{i}": {"n": i + 1, "loss": float(i), "accuracy": i / 20} for i in range(20)} | {
        "empty": {"n": 0, "loss": math.nan}
    }
    s = summary(clients)
    assert s["mean"]["accuracy"] == pytest.approx(np.mean([i / 20 for i in range(20)]))
    assert s["weighted"]["accuracy"] == pytest.approx(sum((i + 1) * i / 20 for i in range(20)) / 210)
    assert s["worst_decile"] == {"loss": pytest.approx(18.5), "accuracy": pytest.approx(0.025)}


def test_better() -> None:
    assert better("accuracy", 0.6, 0.5)
    assert not better("loss", 0.6, 0.5)
    assert better("loss", 0.5, math.nan)
    assert not better("loss", math.nan, 0.5)
