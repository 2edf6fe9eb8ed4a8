"""Settings over several data sets: interquartile means with intervals, average ranks, and the critical difference between them.

    interquartile mean   the mean of the middle half of all (data set, seed) scores, with a bootstrap whose seeds are drawn within
                         each data set (Agarwal et al., NeurIPS 2021, arXiv:2108.13264)
    ranks                of settings on each data set, by their mean over seeds; their average over data sets
    critical difference  what two average ranks must differ by, Nemenyi at 0.05 after Friedman's test (Demsar, JMLR 7, 2006)

A data set is one observation of the ranks, however many seeds were run on it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .figures import PALETTE, figure
from .read import Records
from .statistics import DRAWS, LEVEL

if TYPE_CHECKING:
    import plotly.graph_objects as go

LEAST = 3  # data sets from which this is shown
Scores = Mapping[str, Mapping[str, Sequence[float]]]  # setting -> data set -> the score of each seed


@dataclass(frozen=True)
class Middle:
    """A setting's interquartile mean over data sets and seeds; the interval is None where no data set has two seeds."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Ranks:
    """average: rank of each setting, 1 is best, over `datasets` data sets. p: of Friedman's test, that all settings rank alike.
    apart: the critical difference; groups: settings next to each other in rank that no difference tells apart."""

    average: Mapping[str, float]
    datasets: int
    p: float
    apart: float
    groups: tuple[tuple[str, ...], ...]


def by_dataset(runs: Sequence[Records]) -> dict[str, dict[str, list[float]]]:
    """Test scores at the chosen round: setting -> data set -> seeds, for the settings that were run on every data set. Empty below
    LEAST data sets, for fewer than two settings, where the scores are of different metrics, and where a method has several settings."""
    found: dict[str, dict[str, list[float]]] = {}
    seen: set[tuple[str, str, int]] = set()
    for r in runs:
        if r.summary is not None and r.summary["test"] is not None and "data" in r.recipe:
            one = (r.title, _dataset(r), int(r.recipe.get("run", {}).get("seed", 0)))
            if one in seen:
                return {}
            seen.add(one)
            found.setdefault(r.title, {}).setdefault(_dataset(r), []).append(float(r.summary["test"]))
    every = {d for each in found.values() for d in each}
    whole = {s: each for s, each in found.items() if each.keys() == every}
    alike = len({r.metric for r in runs}) == 1
    return whole if len(every) >= LEAST and len(whole) > 1 and alike else {}


def _dataset(r: Records) -> str:
    data = r.recipe["data"]
    source = data["source"] if isinstance(data["source"], str) else " ".join(data["source"])
    return " ".join(str(x) for x in (source, data.get("subset")) if x)


def middles(scores: Scores) -> dict[str, Middle]:
    """The interquartile mean of every setting."""
    return {s: _middle(list(each.values())) for s, each in scores.items()}


def _middle(each: Sequence[Sequence[float]]) -> Middle:
    from scipy import stats

    mean = float(stats.trim_mean(np.concatenate([np.asarray(e, float) for e in each]), 0.25))
    if all(len(e) < 2 for e in each):
        return Middle(mean, None, None)
    draw = np.random.default_rng(0)
    drawn = np.concatenate([np.asarray(e, float)[draw.integers(len(e), size=(DRAWS, len(e)))] for e in each], 1)
    low, high = np.quantile(stats.trim_mean(drawn, 0.25, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Middle(mean, float(low), float(high))


def ranks(scores: Scores, lower: bool) -> Ranks:
    """Average ranks and what tells them apart. lower: less is better."""
    from scipy import stats

    settings = list(scores)
    sets = list(next(iter(scores.values())))
    table = np.array([[np.mean(scores[s][d]) for s in settings] for d in sets])  # [data sets settings]
    place = stats.rankdata(table if lower else -table, axis=1)
    average = dict(zip(settings, place.mean(0).tolist(), strict=True))
    k, n = len(settings), len(sets)
    # Two settings have no Friedman test; the sign test of their data sets is what is left.
    p = float(stats.friedmanchisquare(*table.T).pvalue) if k > 2 else _signs(table)
    apart = float(stats.studentized_range.ppf(LEVEL, k, math.inf)) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))
    return Ranks(average, n, p, apart, _groups(average, apart))


def _signs(table: np.ndarray) -> float:
    from scipy import stats

    gaps = table[:, 0] - table[:, 1]
    won, lost = int((gaps > 0).sum()), int((gaps < 0).sum())
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _groups(average: Mapping[str, float], apart: float) -> tuple[tuple[str, ...], ...]:
    """The longest rows of settings, in order of rank, whose ends are closer than `apart`; single ones are none."""
    order = sorted(average, key=average.__getitem__)
    rows: list[tuple[str, ...]] = []
    for i, first in enumerate(order):
        last = max(j for j, s in enumerate(order) if average[s] - average[first] < apart)
        if last > i and not any(set(order[i : last + 1]) <= set(r) for r in rows):
            rows.append(tuple(order[i : last + 1]))
    return tuple(rows)


def verdict(found: Ranks) -> str:
    """What the ranks tell, in a sentence."""
    if found.p >= 1 - LEVEL:
        return f"On {found.datasets} data sets the settings' ranks are within chance (p = {found.p:.2g})."
    differ = [
        (a, b) for a, b in itertools.permutations(found.average, 2)
        if found.average[b] - found.average[a] >= found.apart
    ]  # fmt: skip
    if not differ:
        return f"The settings do not all rank alike (p = {found.p:.2g}), but no two are further apart than {found.apart:.2f} ranks."
    shown = "; ".join(f"{a} before {b}" for a, b in differ[:6]) + (
        f"; and {len(differ) - 6} more" if len(differ) > 6 else ""
    )
    return f"Further apart than {found.apart:.2f} ranks: {shown}."


def picture(found: Ranks) -> go.Figure:
    """Settings on a line of ranks; those that no difference tells apart are joined."""
    import plotly.graph_objects as go

    order = sorted(found.average, key=found.average.__getitem__)
    fig = figure("average rank over data sets, 1 is best", "", height=90 + 26 * (len(order) + len(found.groups)))
    for i, s in enumerate(order):
        y = -i
        fig.add_trace(go.Scatter(x=[found.average[s]], y=[y], mode="markers+text", text=[f"  {s}"], textposition="middle right",
                                 marker={"size": 10, "color": PALETTE[i % len(PALETTE)]}, showlegend=False))  # fmt: skip
    for j, row in enumerate(found.groups):
        ends = [found.average[row[0]], found.average[row[-1]]]
        y = -len(order) - j
        fig.add_trace(go.Scatter(x=ends, y=[y, y], mode="lines", line={"width": 6, "color": "#9aa0a6"}, showlegend=False,
                                 hovertext=", ".join(row), hoverinfo="text"))  # fmt: skip
    fig.update_yaxes(visible=False, range=[-len(order) - len(found.groups) + 0.4, 0.6])
    # Names stand to the right of their points, so the axis goes on beyond the last rank, without marks.
    fig.update_xaxes(range=[0.8, 0.2 + 1.35 * len(order)], tickvals=list(range(1, len(order) + 1)))
    return fig
