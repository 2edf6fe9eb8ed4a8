"""Metrics of one client's predictions, by scikit-learn, and their summary over clients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Scores = dict[str, float]
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_character"})

RANGE = {  # that a score can have; of other metrics a score is any finite number
    "accuracy": (0.0, 1.0), "macro_f1": (0.0, 1.0), "matthews": (-1.0, 1.0), "pearson": (-1.0, 1.0), "spearman": (-1.0, 1.0),
    "perplexity": (0.0, math.exp(700.0)),
}  # fmt: skip


@dataclass(frozen=True)
class Predictions:
    """What a model said of n rows."""

    losses: np.ndarray  # float64 [n] summed loss of each row
    counts: np.ndarray  # float64 [n] terms in each row's loss: 1, or scored tokens
    values: np.ndarray | None  # class ids int64 [n], or regression values float64 [n]; None for language modelling
    labels: np.ndarray | None
    chars: np.ndarray | None = None  # int [n] characters of the scored text


def primary(task: str) -> str:
    """The metric by which rounds are chosen."""
    return {"classification": "accuracy", "regression": "pearson"}.get(
        task, "loss"
    )  # a task of the user's own: its loss


def better(metric: str, a: float, b: float) -> bool:
    """Whether score a beats score b; nothing beats by being NaN."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(b) and not math.isnan(a)
    return a < b if metric in LOWER_IS_BETTER else a > b


def score(p: Predictions, task: str) -> Scores:
    """Scores of one client; a correlation that is undefined (one class, constant predictions) is 0 as in scikit-learn's
    Matthews coefficient."""
    from scipy import stats
    from sklearn import metrics as sk

    n = len(p.losses)
    total = float(p.counts.sum())
    out: Scores = {"n": n, "loss": float(p.losses.sum()) / total if total else math.nan}
    if n == 0:
        return out
    if task == "classification":
        out["accuracy"] = float(sk.accuracy_score(p.labels, p.values))
        out["macro_f1"] = float(sk.f1_score(p.labels, p.values, average="macro", zero_division=0.0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a single class in both: the coefficient is 0
            out["matthews"] = float(sk.matthews_corrcoef(p.labels, p.values))
    elif task == "regression":
        assert p.labels is not None and p.values is not None
        constant = n < 2 or np.ptp(p.labels) == 0 or np.ptp(p.values) == 0
        out["pearson"] = 0.0 if constant else float(stats.pearsonr(p.labels, p.values).statistic)
        out["spearman"] = 0.0 if constant else float(stats.spearmanr(p.labels, p.values).statistic)
    elif total:
        out["perplexity"] = math.exp(min(out["loss"], 700.0))
        if p.chars is not None and p.chars.sum() > 0:
            out["bits_per_character"] = float(p.losses.sum()) / math.log(2) / float(p.chars.sum())
    return out


def summary(clients: Mapping[str, Scores]) -> dict[str, Scores]:
    """Plain mean, mean weighted by rows, and the mean of the worst tenth of clients (at least one), per metric."""
    filled: Sequence[Scores] = [s for s in clients.values() if s["n"] > 0]
    names = [m for m in (filled[0] if filled else {}) if m != "n"]
    out: dict[str, Any] = {"mean": {}, "weighted": {}, "worst_decile": {}}
    weight = np.array([s["n"] for s in filled], float)
    for m in names:
        v = np.array([s.get(m, math.nan) for s in filled], float)
        ordered = np.sort(v)[::-1] if m in LOWER_IS_BETTER else np.sort(v)
        worst = max(1, math.ceil(len(v) / 10))
        out["mean"][m] = float(v.mean())
        out["weighted"][m] = float((v * weight).sum() / weight.sum())
        out["worst_decile"][m] = float(ordered[:worst].mean())
    return out
