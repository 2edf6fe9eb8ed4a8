"""Predictions of clients, what scores of them have in common, and the summary of scores over clients."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.examples import Words

Scores = dict[str, float]

RANGE = {  # the range of a metric's scores; a metric that is not listed may have any finite score
    "accuracy": (0.0, 1.0), "macro_f1": (0.0, 1.0), "matthews": (-1.0, 1.0), "pearson": (-1.0, 1.0), "spearman": (-1.0, 1.0),
    "micro_f1": (0.0, 1.0), "exact_match": (0.0, 1.0), "f1": (0.0, 1.0), "precision": (0.0, 1.0), "recall": (0.0, 1.0),
    "perplexity": (0.0, math.exp(700.0)), "bleu": (0.0, 100.0), "chrf": (0.0, 100.0), "rouge1": (0.0, 1.0), "rouge2": (0.0, 1.0),
    "rougeL": (0.0, 1.0), "number_match": (0.0, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Predictions:
    """What a model said of n rows."""

    losses: np.ndarray  # float64 [n] summed loss of each row
    counts: np.ndarray  # float64 [n] terms in each row's loss: 1, or scored tokens
    values: np.ndarray | None  # [n ...] what the task's `answers` said, e.g. class ids; None where it says nothing
    labels: np.ndarray | None  # [n ...]
    chars: np.ndarray | None = None  # int [n] characters of the scored text
    words: Words | None = None  # the labels of all words of the n rows, where words are labelled


def beats(a: float, b: float, lower: bool) -> bool:
    """Whether score a beats score b; nothing beats by being NaN. lower: less is better."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(b) and not math.isnan(a)
    return a < b if lower else a > b


def mean_loss(p: Predictions) -> float:
    """Loss per term over all rows; NaN without terms."""
    terms = float(p.counts.sum())
    return float(p.losses.sum()) / terms if terms else math.nan


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b != 0)


def owners(sizes: Sequence[int]) -> np.ndarray:
    """The client of each entry, int64 [total], where client k has sizes[k] of them."""
    return np.repeat(np.arange(len(sizes)), sizes)


def summary(clients: Mapping[str, Scores], lower: Collection[str] = ("loss",)) -> dict[str, Scores]:
    """Plain mean, mean weighted by rows, and the mean of the worst tenth of clients (at least one), per metric.

    lower: the metrics of which less is better, as the task says.
    """
    filled: Sequence[Scores] = [s for s in clients.values() if s["n"] > 0]
    names = [m for m in (filled[0] if filled else {}) if m != "n"]
    out: dict[str, Any] = {"mean": {}, "weighted": {}, "worst_decile": {}}
    weight = np.array([s["n"] for s in filled], float)
    for m in names:
        v = np.array([s.get(m, math.nan) for s in filled], float)
        ordered = np.sort(v)[::-1] if m in lower else np.sort(v)
        worst = max(1, math.ceil(len(v) / 10))
        out["mean"][m] = float(v.mean())
        out["weighted"][m] = float((v * weight).sum() / weight.sum())
        out["worst_decile"][m] = float(ordered[:worst].mean())
    return out
