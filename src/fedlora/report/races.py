"""Figures of several runs or methods against each other. A function returns None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .figures import PALETTE, band, boxes, figure, whole, words
from .read import Records

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ..bench.examples import Course


def race(groups: Mapping[str, Sequence[Records]], against: str = "rounds", view: str = "personal") -> go.Figure | None:
    """Metric on test of every setting against rounds or megabytes: mean over seeds, the range of seeds as a band."""
    import plotly.graph_objects as go

    metric = next(iter(groups.values()))[0].metric
    fig = figure(
        "round" if against == "rounds" else "megabytes sent so far, all clients, both ways", f"{words(metric)} on test"
    )
    for i, (name, runs) in enumerate(groups.items()):
        colour = PALETTE[i % len(PALETTE)]
        curves = []
        for r in runs:
            sent = r.bytes_by_round()
            lines = [x for x in r.evals(view, "test") if metric in x.mean]
            curves.append({e.round: (sent[e.round] / 1e6, e.mean[metric]) for e in lines})
        rounds = sorted(set.intersection(*(set(c) for c in curves)))
        if not rounds:
            continue
        x = [t if against == "rounds" else sum(c[t][0] for c in curves) / len(curves) for t in rounds]
        ys = [[c[t][1] for c in curves] for t in rounds]
        if len(curves) > 1:
            band(fig, x, [min(v) for v in ys], [max(v) for v in ys], colour, name)
        line = {"color": colour, "width": 2.5, "dash": ("solid", "dash", "dot")[i // len(PALETTE) % 3]}
        fig.add_trace(
            go.Scatter(x=x, y=[sum(v) / len(v) for v in ys], name=name, legendgroup=name, mode="lines+markers", line=line, marker={"size": 6})
        )  # fmt: skip
    if against == "rounds" and fig.data:
        whole(fig, max(max(t.x) for t in fig.data))
    return fig if fig.data else None


def client_boxes(groups: Mapping[str, Sequence[Records]]) -> go.Figure | None:
    """Every client's score at the chosen round, a box per setting, seeds together."""
    metric = next(iter(groups.values()))[0].metric
    values: dict[str, list[float]] = {}
    for name, runs in groups.items():
        for r in runs:
            e = r.at(r.main, "test", r.chosen) if r.chosen is not None else None
            values.setdefault(name, []).extend(s[metric] for s in e.clients.values() if metric in s) if e else None
    values = {k: v for k, v in values.items() if v}
    return boxes(values, metric, [PALETTE[i % len(PALETTE)] for i in range(len(values))]) if values else None


def courses(found: Sequence[Course], client: str) -> go.Figure:
    """Relative error of one client's update against rounds, a line a method."""
    import plotly.graph_objects as go

    fig = figure("round", "relative error")
    for c, colour in zip(found, PALETTE, strict=False):
        fig.add_trace(
            go.Scatter(x=c.rounds, y=c.errors[client], name=c.label, mode="lines", line={"color": colour, "width": 2.5})
        )
    fig.update_yaxes(type="log", dtick=1, exponentformat="power")
    fig.update_layout(margin={"t": 84})
    return fig
