"""The picture of docs/performance.md: python bench/plot.py RESULT.json ... OUTPUT.html, to be opened in a browser.

Bars are speeds over the first system's, lines reach from the slowest to the fastest pair of rounds. Two systems are left out,
whose bars would stand beside others of the same height: the loop that keeps freed memory and fedlora one by one in fp32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from fedlora.report.figures import FONT, PALETTE

LEFT_OUT = ("peft-bf16-kept", "one")


def draw(results: list[dict[str, Any]]) -> go.Figure:
    """One panel for each source of texts; in it a group of bars for each regime."""
    titles = [Path(r["regimes"][0]["work"]["source"]).parent.name for r in results]
    fig = make_subplots(len(results), 1, subplot_titles=titles, vertical_spacing=0.17)
    found = [m for r in results for g in r["regimes"] for m in g["systems"] if m["seconds"]]
    names = list(dict.fromkeys(m["title"] for m in found if m["system"] not in LEFT_OUT))
    for row, r in enumerate(results, 1):
        for name, colour in zip(names, PALETTE, strict=False):
            mine = [(g["work"]["regime"], m["ratio"]) for g in r["regimes"] for m in g["systems"] if m["title"] == name]
            x = [f"{w['name']}<br>{w['clients']} x {w['steps']} x {w['batch']}" for w, _ in mine]
            y = [q["median"] for _, q in mine]
            bars = {
                "type": "data",
                "symmetric": False,
                "array": [q["most"] - q["median"] for _, q in mine],
                "arrayminus": [q["median"] - q["least"] for _, q in mine],
                "thickness": 1,
            }
            shown = [f"{v:.1f}" for v in y]
            fig.add_bar(x=x, y=y, name=name, marker_color=colour, error_y=bars, text=shown, textposition="inside",
                        insidetextanchor="start", textangle=0, legendgroup=name, showlegend=row == 1, row=row, col=1)  # fmt: skip
    fig.update_yaxes(gridcolor="#e8eaed", rangemode="tozero", title="times the fp32 PEFT loop")
    height = 100 + 300 * len(results)
    fig.update_layout(width=1000, height=height, barmode="group", bargap=0.2, plot_bgcolor="white", margin={"l": 60, "r": 10, "t": 90, "b": 50},
                      font={"family": FONT, "size": 13}, legend={"orientation": "h", "y": 1.06, "yanchor": "bottom", "x": 0})  # fmt: skip
    return fig


def main() -> None:
    *inputs, output = sys.argv[1:]
    draw([json.loads(Path(p).read_text(encoding="utf-8")) for p in inputs]).write_html(
        output, config={"displayModeBar": False}
    )


if __name__ == "__main__":
    main()
