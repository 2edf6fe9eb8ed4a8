"""The pictures of a report, as plotly figures. Every function returns None where there is nothing to show."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..federation.records import AsymmetryLine, CrossLine, EffectiveRanksLine, TrainLine
from .read import Records

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Okabe and Ito's palette, told apart with any colour vision.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6914")
VIEWS = {"personal": PALETTE[0], "global": PALETTE[1], "unseen": PALETTE[2]}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
BARS = 60  # up to so many clients get a bar each; for more, a heat map is drawn
HEAT = 400  # up to so many clients are in a heat map; of more, evenly spaced ones are shown


def words(metric: str) -> str:
    """A metric's name for people."""
    return {
        "macro_f1": "macro F1",
        "bits_per_character": "bits per character",
        "bleu": "BLEU",
        "chrf": "chrF",
        "rouge1": "ROUGE-1",
        "rouge2": "ROUGE-2",
        "rougeL": "ROUGE-L",
        "exact_match": "exact match",
        "number_match": "number match",
    }.get(metric, metric)


def folded(title: str) -> str:
    """An axis' title in lines that fit a telephone."""
    return "<br>".join(textwrap.wrap(title, 32))


def figure(x: str, y: str, height: int = 380, **layout: Any) -> go.Figure:
    """An empty figure with named axes in the house's style. height: pixels."""
    import plotly.graph_objects as go

    axis = {
        "gridcolor": "#e8eaed",
        "zeroline": False,
        "linecolor": "#9aa0a6",
        "ticks": "outside",
        "tickcolor": "#9aa0a6",
        "automargin": True,
    }
    return go.Figure(
        layout={
            "height": height,
            "margin": {"l": 56, "r": 16, "t": 16, "b": 48},
            "font": {"family": FONT, "size": 13, "color": "#202124"},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "hoverlabel": {"font": {"family": FONT}},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#bdc1c6", "activecolor": "#5f6368"},
            "xaxis": {**axis, "title": {"text": folded(x)}},
            "yaxis": {**axis, "title": {"text": folded(y)}},
            **layout,
        }
    )


def whole(fig: go.Figure, most: int) -> None:
    """Ticks at whole rounds only."""
    if most <= 12:
        fig.update_xaxes(dtick=1)


def _light(colour: str, alpha: float) -> str:
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"


def _quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between the order statistics."""
    v = sorted(values)
    at = q * (len(v) - 1)
    low = int(at)
    high = min(low + 1, len(v) - 1)
    return v[low] + (at - low) * (v[high] - v[low])


def band(
    fig: go.Figure, x: Sequence[float], low: Sequence[float], high: Sequence[float], colour: str, name: str
) -> None:
    """Fill between two curves, without an entry in the legend."""
    import plotly.graph_objects as go

    fig.add_trace(
        go.Scatter(
            x=[*x, *reversed(x)], y=[*high, *reversed(low)], fill="toself", fillcolor=_light(colour, 0.13), line={"width": 0},
            hoverinfo="skip", showlegend=False, legendgroup=name, mode="lines",
        )
    )  # fmt: skip


def progress(run: Records, against: str = "rounds") -> go.Figure | None:
    """Metric on test against rounds or megabytes: a line per view, the middle 80 % of clients as a band."""
    import plotly.graph_objects as go

    fig = figure(
        "round" if against == "rounds" else "megabytes sent so far, all clients, both ways",
        f"{words(run.metric)} on test",
    )
    sent = run.bytes_by_round()
    for view, colour in VIEWS.items():
        lines = [x for x in run.evals(view, "test") if run.metric in x.mean]
        if not lines:
            continue
        x = [e.round if against == "rounds" else sent[e.round] / 1e6 for e in lines]
        spread = [[c[run.metric] for c in e.clients.values() if run.metric in c] for e in lines]
        if max(map(len, spread)) > 2:
            band(fig, x, [_quantile(s, 0.1) for s in spread], [_quantile(s, 0.9) for s in spread], colour, view)
        fig.add_trace(
            go.Scatter(x=x, y=[e.mean[run.metric] for e in lines], name=f"{view} model", mode="lines+markers",
                       legendgroup=view, line={"color": colour, "width": 2.5}, marker={"size": 6})
        )  # fmt: skip
    if not fig.data:
        return None
    if against == "rounds":
        whole(fig, max(x.round for x in run.evals()))
    if run.summary and run.chosen is not None and against == "rounds":
        note = {
            "text": f"round {run.chosen}, chosen on {run.summary['chosen_on']}",
            "font": {"size": 11, "color": "#5f6368"},
        }
        side = "right" if run.chosen < 0.7 * run.summary["rounds"] else "left"
        line = {"dash": "dot", "color": "#5f6368"}
        fig.add_vline(run.chosen, line=line, annotation=note, annotation_position=f"bottom {side}")
    return fig


def losses(run: Records) -> go.Figure | None:
    """Training loss: mean over the round's clients, and the middle 80 % of them."""
    import plotly.graph_objects as go

    lines = [x for x in run.trains if x.loss == x.loss]
    if not lines:
        return None
    fig = figure("round", "training loss")
    x = [t.round for t in lines]
    each = [[v for v in t.losses.values() if v == v] for t in lines]
    band(fig, x, [_quantile(v, 0.1) for v in each], [_quantile(v, 0.9) for v in each], PALETTE[0], "loss")
    whole(fig, x[-1])
    fig.add_trace(
        go.Scatter(
            x=x,
            y=[t.loss for t in lines],
            mode="lines+markers",
            line={"color": PALETTE[0], "width": 2.5},
            name="mean",
            showlegend=False,
        )
    )
    return fig


def spread(run: Records) -> go.Figure | None:
    """Every client's score at the chosen round: its personal model, and the global one, sorted."""
    import plotly.graph_objects as go

    found = {v: e for v in ("personal", "global") if run.chosen is not None and (e := run.at(v, "test", run.chosen))}
    scores = {v: {c: s[run.metric] for c, s in e.clients.items() if run.metric in s} for v, e in found.items()}
    scores = {v: s for v, s in scores.items() if s}
    if not scores:
        return None
    first = next(iter(scores))
    if len(scores[first]) > BARS:
        return boxes(
            {f"{v} model": list(s.values()) for v, s in scores.items()}, run.metric, [VIEWS[v] for v in scores]
        )
    order = sorted(scores[first], key=lambda c: scores[first][c])
    fig = figure(f"{words(run.metric)} on the client's own test data", "", height=max(300, 90 + 22 * len(order)))
    if len(scores) == 2:
        for c in order:
            fig.add_trace(
                go.Scatter(
                    x=[scores[v][c] for v in scores],
                    y=[c, c],
                    mode="lines",
                    line={"color": "#bdc1c6", "width": 2},
                    hoverinfo="skip",
                    showlegend=False,
                )
            )
    for v, s in scores.items():
        fig.add_trace(go.Scatter(x=[s[c] for c in order], y=order, mode="markers", name=f"{v} model",
                                 marker={"color": VIEWS[v], "size": 10, "symbol": "circle" if v == "personal" else "diamond"}))  # fmt: skip
    fig.update_yaxes(type="category", categoryorder="array", categoryarray=order)
    return fig


def boxes(values: Mapping[str, Sequence[float]], metric: str, colours: Sequence[str]) -> go.Figure:
    """A box for each name, with all its points."""
    import plotly.graph_objects as go

    fig = figure("", f"{words(metric)} on test")
    for (name, v), colour in zip(values.items(), colours, strict=False):
        fig.add_trace(go.Box(y=v, name=name, boxpoints="all" if len(v) <= 400 else "outliers", jitter=0.4, pointpos=0,
                             marker={"color": colour, "size": 5, "opacity": 0.6}, fillcolor=_light(colour, 0.15), showlegend=False))  # fmt: skip
    return fig


def holding(run: Records, whose: str = "") -> str:
    """What the picture of `partition` shows; at a server, which is told no classes, it has none."""
    by = ", by class" if run.partition.get("histogram") else ""
    return f"Training rows of each client{by}{whose}."


def partition(run: Records, split: str = "train") -> go.Figure | None:
    """Rows of each class that every client holds: bars for few clients, a heat map for many."""
    import plotly.graph_objects as go

    p = run.partition
    ids, sizes = p.get("ids", []), p.get("sizes", {}).get(split, [])
    if not sizes:
        return None
    counts = p.get("histogram", {}).get(split)
    if counts is None:
        fig = (
            figure("rows", "", height=max(300, 90 + 22 * len(ids)))
            if len(ids) <= BARS
            else figure("rows of a client", "clients")
        )
        if len(ids) <= BARS:
            fig.add_trace(go.Bar(x=sizes, y=ids, orientation="h", marker={"color": PALETTE[0]}))
            fig.update_yaxes(type="category", autorange="reversed")
        else:
            fig.add_trace(go.Histogram(x=sizes, marker={"color": PALETTE[0]}))
        return fig
    names = p["label_names"]
    if len(ids) <= BARS and len(names) <= 12:
        fig = figure(
            "rows", "", height=max(300, 110 + 22 * len(ids) + 18 * (-(-len(names) // 3))), barmode="stack", bargap=0.25
        )
        fig.update_layout(legend={"traceorder": "normal"})
        for j, name in enumerate(names):
            fig.add_trace(
                go.Bar(
                    x=[c[j] for c in counts],
                    y=ids,
                    name=_short(name),
                    orientation="h",
                    marker={"color": _shade(j, len(names))},
                )
            )
        fig.update_yaxes(type="category", autorange="reversed", dtick=1)
        return fig
    chosen = range(len(ids)) if len(ids) <= HEAT else [round(i * (len(ids) - 1) / (HEAT - 1)) for i in range(HEAT)]
    share = [[x / max(1, sum(counts[k])) for x in counts[k]] for k in chosen]
    fig = figure("class", "client", height=min(900, max(320, 120 + 14 * len(share))))
    fig.add_trace(go.Heatmap(z=share, x=[_short(n) for n in names], y=[ids[k] for k in chosen], colorscale="Blues", zmin=0,
                             customdata=[counts[k] for k in chosen], hovertemplate="%{y}, %{x}: %{customdata} rows<extra></extra>",
                             colorbar={"title": {"text": "share of<br>the client"}, "tickformat": ".0%"}))  # fmt: skip
    fig.update_yaxes(type="category", autorange="reversed", showticklabels=len(share) <= 80)
    fig.update_xaxes(type="category", tickangle=-40)
    return fig


def _shade(j: int, n: int) -> str:
    if n <= len(PALETTE):
        return PALETTE[j]
    from plotly.colors import qualitative

    return str(qualitative.Vivid[j] if n <= len(qualitative.Vivid) else qualitative.Light24[j])


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def cross(run: Records) -> go.Figure | None:
    """Client i's model on client j's data."""
    import plotly.graph_objects as go

    line = next((x for x in reversed(run.lines) if isinstance(x, CrossLine)), None)
    if line is None:
        return None
    n = len(line.ids)
    fig = figure("data of client", "model of client", height=max(340, 140 + 36 * n))
    fig.add_trace(go.Heatmap(z=line.matrix, x=line.ids, y=line.ids, colorscale="Viridis", reversescale=run.lower_is_better,
                             texttemplate="%{z:.2f}" if n <= 16 else None, colorbar={"title": {"text": words(line.metric)}}))  # fmt: skip
    fig.update_yaxes(type="category", autorange="reversed")
    fig.update_xaxes(type="category")
    return fig


def exactness(run: Records) -> go.Figure | None:
    """How far the mean of the factors is from the mean of their products."""
    import plotly.graph_objects as go

    points = [(x.round, x.exactness["product_error"]) for x in run.trains if x.exactness]
    if not points or max(v for _, v in points) < 1e-6:
        return None
    fig = figure("round", "relative error of the averaged product", height=300)
    fig.add_trace(
        go.Scatter(
            x=[r for r, _ in points],
            y=[v for _, v in points],
            mode="lines+markers",
            line={"color": PALETTE[3], "width": 2.5},
        )
    )
    fig.update_yaxes(rangemode="tozero", tickformat=".1%")
    return fig


def spectrum(run: Records) -> go.Figure | None:
    """What the server has learned beyond its first components, over rounds."""
    import plotly.graph_objects as go

    points = [(x.round, x.extra["spectrum"]) for x in run.trains if "spectrum" in x.extra]
    if not points:
        return None
    fig = figure("round", "share of the energy of B A", height=300)
    cuts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < len(points[0][1])]
    for i, n in enumerate(cuts):
        fig.add_trace(
            go.Scatter(
                x=[r for r, _ in points],
                y=[sum(s[n:]) for _, s in points],
                name=f"beyond {n}",
                mode="lines+markers",
                line={"color": PALETTE[i % len(PALETTE)], "width": 2},
            )
        )
    fig.update_yaxes(rangemode="tozero", tickformat=".1%")
    return fig


def ranks(run: Records) -> go.Figure | None:
    """Effective ranks, or ranks that clients chose, over rounds: a line per client, the mean over layers."""
    import plotly.graph_objects as go

    curves: dict[str, list[tuple[int, float]]] = {}
    for x in run.lines:
        by_client = x.extra.get("ranks") if isinstance(x, TrainLine) else None
        if isinstance(x, EffectiveRanksLine):
            by_client = {c: sum(r.values()) / max(1, len(r)) for c, r in x.clients.items()}
        for c, r in (by_client or {}).items():
            curves.setdefault(c, []).append((x.round, r))
    if not curves:
        return None
    effective = any(isinstance(x, EffectiveRanksLine) for x in run.lines)
    fig = figure("round", "effective rank, mean over layers" if effective else "rank")
    for i, (c, points) in enumerate(list(curves.items())[:BARS]):
        line = {"color": PALETTE[i % len(PALETTE)], "width": 2}
        fig.add_trace(
            go.Scatter(x=[t for t, _ in points], y=[r for _, r in points], name=c, mode="lines+markers", line=line)
        )
    fig.update_yaxes(rangemode="tozero")
    return fig


def likeness(run: Records) -> go.Figure | None:
    """How alike the factors of clients are, layer by layer, at the last analysed round."""
    import plotly.graph_objects as go

    line = next((x for x in reversed(run.lines) if isinstance(x, AsymmetryLine)), None)
    if line is None:
        return None
    fig = figure("", "mean cosine between clients")
    names = {"A": "A", "B": "B", "dA": "change of A"}
    layers = list(line.sites)
    for i, (key, name) in enumerate(names.items()):
        values = [line.sites[s].get(key) for s in layers]
        fig.add_trace(
            go.Scatter(
                x=[_short(s, 40) for s in layers],
                y=values,
                name=name,
                mode="lines+markers",
                line={"color": PALETTE[i], "width": 2},
            )
        )
    fig.update_xaxes(type="category", tickangle=-45, showticklabels=len(layers) <= 40)
    return fig
