"""The page of bench/gpu.py: what its figures say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.report import need_plotly, write_page
from fedlora.report.figures import PALETTE, figure
from fedlora.report.page import Block, Tile
from fedlora.units import size

Rounds = Sequence[dict[str, Any]]


def speed(rounds: Rounds) -> float:
    """Real tokens a second, median of the rounds."""
    return statistics.median(r["tokens"] / r["seconds"] for r in rounds)


def memory(rounds: Rounds) -> int:
    return max(int(r["memory"]) for r in rounds)


def further(m: dict[str, Any]) -> float | None:
    """Bytes of tensors for each further client: the slope from the smallest block of several clients to the largest."""
    counts = [k for k in map(int, m["k"]) if k > 1]
    if len(counts) < 2 or not memory(m["k"][str(counts[-1])]):
        return None
    first, last = counts[0], counts[-1]
    return (memory(m["k"][str(last)]) - memory(m["k"][str(first)])) / (last - first)


def share(m: dict[str, Any], peak: dict[str, float], k: int) -> float:
    """Share of the peak of products of its dtype that real tokens take in the frozen layers."""
    return speed(m["k"][str(k)]) * m["flops_per_token"] / 1e9 / peak[m["dtype"]]


def curves(measured: Sequence[dict[str, Any]]) -> Any:
    """Tokens a second against the clients of a block, a line for each base and dtype."""
    fig = figure("clients in a block", "tokens per second", 420)
    for m, colour in zip(measured, PALETTE, strict=False):
        x = [int(k) for k in m["k"]]
        fig.add_scatter(
            x=x, y=[speed(m["k"][str(k)]) for k in x], name=f"{m['shape']}, {m['dtype']}", line={"color": colour}
        )
        fig.add_scatter(
            x=[x[0], x[-1]],
            y=[speed(m["loop"])] * 2,
            name=f"{m['shape']}, {m['dtype']}: PEFT loop",
            mode="lines",
            line={"color": colour, "dash": "dot"},
        )
    fig.update_xaxes(type="log", tickvals=x if measured else [])
    fig.update_yaxes(type="log")
    return fig


def write(found: dict[str, Any], out: Path) -> Path:
    """Write the page of these figures. Raises MissingPlotly."""
    need_plotly()
    measured, env, peak = found["measured"], found["environment"], found["peak"]
    table = [
        (
            "base",
            "dtype",
            "clients",
            "tokens/s",
            "over one by one",
            "over the PEFT loop",
            "share of the peak",
            "memory",
            "device busy",
        )
    ]
    for m in measured:
        for k in map(int, m["k"]):
            busy = (m["busy"] or {}).get(str(k))
            table.append((
                m["shape"], m["dtype"], str(k), f"{speed(m['k'][str(k)]):,.0f}",
                f"{speed(m['k'][str(k)]) / speed(m['one']):.2f}", f"{speed(m['k'][str(k)]) / speed(m['loop']):.2f}",
                f"{share(m, peak, k):.0%}", size(memory(m["k"][str(k)])) if memory(m["k"][str(k)]) else "-",
                "-" if busy is None else f"{busy:.0%}",
            ))  # fmt: skip
    checks = [
        (
            "base",
            "dtype",
            "blocks against one by one",
            "against the PEFT loop",
            "bytes a further client",
            "waits of the host in a round",
        )
    ]
    for m in measured:
        slope = further(m)
        checks.append((
            m["shape"], m["dtype"], f"{m['block_difference']:.1e}", f"{m['loop_difference']:.1e}", "-" if slope is None else size(slope),
            "-" if m["waits"] is None else ", ".join(f"{n} x {p}" for p, n in m["waits"].items()) or "none",
        ))  # fmt: skip
    best = max(measured, key=lambda m: speed(m["k"][max(m["k"], key=int)]), default=None)
    tiles = [Tile("device", env["device"], f"torch {env['versions']['torch']}")]
    tiles += [Tile("peak of bf16 products", f"{peak['bf16'] / 1e3:,.1f} TFLOP/s", f"fp32 {peak['fp32'] / 1e3:,.1f}")]
    if best:
        k = max(best["k"], key=int)
        tiles.append(
            Tile(f"{best['shape']}, {best['dtype']}", f"{speed(best['k'][k]):,.0f} tokens/s", f"{k} clients in a block")
        )
    tested = found["tests"]
    blocks = [
        Block(
            "Speed of blocks",
            "Dotted: a loop of PyTorch and PEFT over one client after another.",
            curves(measured),
            wide=True,
        ),
        Block(
            "Clients from one to many",
            "Medians of the measured rounds; only real tokens count.",
            table=table,
            wide=True,
        ),
        Block(
            "What is equal",
            "Differences of the trained leaves after a round, as a share of their change, and what costs time or memory.",
            table=checks,
            wide=True,
        ),
        Block("Device tests", tested.get("summary") or tested["why"], code="\n".join(tested.get("failures", []))),
    ]
    if found["not_measured"]:
        blocks.append(Block("Not measured", "The time was up: " + ", ".join(found["not_measured"])))
    rows = ", ".join(dict.fromkeys(f"{m['shape']} {m['rows']}" for m in measured))
    page = {
        "title": f"Federated clients on {env['device']}",
        "lead": "Bases with random weights, HomLoRA of rank 8 on query and value, AdamW, no dropout; rows of 43 +- 17 tokens.",
        "note": f"{found['command']}; commit {found['commit']}; {env['date']}. Rows of a minibatch: {rows}; "
        f"{measured[0]['steps'] if measured else 0} steps a round.",
        "tiles": tiles,
        "blocks": blocks,
    }
    return write_page(page, out)
