"""Tables that the commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import printable
from ..files import sealed
from ..units import NOTHING, count, number, seconds, size

if TYPE_CHECKING:
    from ..bench.cost import Cost
    from ..bench.examples import Course
    from ..recipe.shipped import Shipped
    from ..report.statistics import Pair


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, c in enumerate(columns):
        table.add_column(c, justify="left" if i == 0 else "right")
    return table


COLOURS = {
    "done": "green",
    "late": "yellow",
    "refused": "red",
    "failed": "red",
    "training": "cyan",
    "evaluating": "cyan",
}


def status(s: Mapping[str, Any]) -> Table:
    """Where a server's run stands."""
    metric = "" if not s["metric"] else f", {s['metric'][0]} {number(s['metric'][1])}"
    moved = f"{size(s['bytes']['up'])} up, {size(s['bytes']['down'])} down"
    head = f"{s['run']}: {s['state']}, round {s['done']} of {s['rounds']} done{metric}, {moved}, {s['age']:.0f} s ago"
    table = _table(head + _spent(s.get("privacy")), "client", "site", "state")
    where = {c: n for n, held in s["sites"].items() for c in held}
    for c in sorted(where):
        state = s["clients"].get(c, "idle")
        table.add_row(Text(printable(c)), Text(printable(where[c])), Text(state, style=COLOURS.get(state, "")))
    for node, reason in s["failed"].items():
        table.add_row(Text(NOTHING), Text(printable(node)), Text(printable(reason), style="red"))
    if s["state"] == "waiting":
        table.caption = f"waiting for clients: {s['have']} of {s['need']} are here"
    return table


def result(out: Console, folder: Path) -> None:
    """The summary of one run."""
    s = sealed.read(folder / "summary.json") or {}
    table = _table(
        f"{s['name']}: {s['method']['title']}, {s['rounds']} rounds", "view", "mean", "by size", "worst tenth"
    )
    for view, scores in s["views"].items():
        table.add_row(view, *(number(scores[k].get(s["metric"])) for k in ("mean", "weighted", "worst_decile")))
    out.print(table)
    chosen = f"{s['metric']} on test at round {s['chosen_round']}, chosen on {s['chosen_on']}"
    if s["chosen_round"] is None:
        chosen = "no scores: nothing was evaluated, or sites keep them"
    rounds = s.get("last_rounds", 10)
    last = f"; mean of the last {rounds} {number(s['test_last10'])}" if s["test_last10"] is not None else ""
    if s["chosen_round"] == 0:
        chosen += ": no round is better than the start, so look at train.lr, or train longer"
    elif s["chosen_on"] == "test" and s["chosen_round"] is not None:
        chosen += ", the very rows that are scored: set partition.validation"
    known = s.get("constant")
    bar = "" if known is None else f"; always a client's most frequent class {number(known)}"
    out.print(
        f"{chosen}{last}{bar}.{_spent(s.get('privacy'))} {size(s['bytes']['total'])} sent, {s['seconds']:.0f} s. Folder: {folder}",
        soft_wrap=True,
        highlight=False,
    )


def _spent(p: Mapping[str, Any] | None) -> str:
    """What a run has spent of its privacy budget, as a sentence; "" for a run that promises nothing."""
    if not p:
        return ""
    if p["epsilon"] is None:
        return " No privacy: changes were clipped, and no noise was added."
    budget = f" of {p['budget']:g}" if p["budget"] is not None else ""
    return f" Epsilon {p['epsilon']:.3g}{budget} at delta {p['delta']:g}."


def methods(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """The list of `fedlora methods`, in groups: readable at any width."""
    from ..methods.contract import FAMILIES
    from ..methods.facts import WIDTH

    widest = max(len(r["name"]) for r in rows)
    for family, title in FAMILIES.items():
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True, min_width=widest)
        grid.add_column()
        for r in rows:
            if r["family"] != family:
                continue
            paper = Text(f"  {r['paper']}" if r["paper"] else "", style="dim")
            grid.add_row(r["name"], Text(r["title"], style="bold") + paper)
            grid.add_row("", Text(r["what"]))
            parts = [f"{what}: {', '.join(r[what])}" for what in ("trained", "shared", "personal", "frozen") if r[what]]
            grid.add_row("", Text("; ".join(parts), style="cyan"))
            average = {True: "; exact", False: "; not exact", None: ""}[r["exact"]]
            grid.add_row("", Text(f"{size(r['down'])} down, {size(r['up'])} up{average}", style="cyan"))
            grid.add_row("", "")
        out.print(Text(f"{title}\n", style="bold underline"))
        out.print(grid)
    out.print(
        f"Bytes: of a client's first messages in fp32, for one layer of {WIDTH} x {WIDTH} and default ranks, without the "
        "head. Exact: the product of what the uploads become is the mean of their products. "
        "fedlora methods --cost MODEL measures time and memory.",
        highlight=False,
    )


def recipes(out: Console, found: Sequence[Shipped]) -> None:
    """The list of `fedlora recipes`: readable at any width."""
    for paper, title in ((False, "Recipes"), (True, "Sweeps that repeat tables of papers")):
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column()
        for r in found:
            if r.paper == paper:
                grid.add_row(r.name, Text(r.shows))
                grid.add_row("", Text(r.size, style="dim"))
        out.print(Text(f"{title}\n", style="bold underline"))
        out.print(grid, "")
    out.print("fedlora recipes NAME copies one to the current folder.", highlight=False)


def costs(out: Console, model: str, found: Sequence[Cost]) -> None:
    """What `fedlora methods --cost` shows: time and memory beside HomLoRA's, and the bytes of a message."""
    base = next(c for c in found if c.method == "homlora")
    table = _table(f"one local step of one client on {model}, beside HomLoRA", "method", "time", "memory", "down", "up")
    for c in found:
        if c.refused:
            continue
        times = [f"{c.seconds / base.seconds:.1f}x", f"{c.memory / base.memory:.2f}x"]
        table.add_row(c.title, *times, size(c.down), size(c.up))
    out.print(table)
    out.print(
        f"HomLoRA: {base.seconds * 1e3:.0f} ms, {size(base.memory)} of leaves and saved activations. Messages are encoded fp32."
    )
    for c in found:
        if c.refused:
            out.print(Text(f"{c.title} cannot be used here: ", style="yellow") + Text(c.refused), soft_wrap=True)


def example(out: Console, found: Sequence[Course]) -> None:
    """What `fedlora example` shows."""
    clients = list(found[0].errors)
    table = _table(
        "relative error and effective rank of each client's update", "method", *(f"client {c}" for c in clients)
    )
    for c in found:
        table.add_row(c.label, *(f"{c.errors[k][-1]:.1e}, rank {c.ranks[k]}" for k in clients))
    out.print(table)


def bench(out: Console, found: Mapping[str, Any]) -> None:
    """One regime of `fedlora bench`."""
    r = found["work"]["regime"]
    method = found["work"]["method_name"]
    title = f"{method}, {r['name']}: {r['clients']} clients, {r['steps']} steps of {r['batch']} rows; {found['work']['source']}"
    table = _table(title, "system", "tokens/s", "x the first", "peak", "memory", "differs")
    for m in found["systems"]:
        if m["failed"]:
            out.print(Text(f"{m['title']} failed: ", style="yellow") + Text(m["failed"]), soft_wrap=True)
            continue
        ratio, d = m.get("ratio"), m["difference"]
        between = f"{ratio['median']:.2f} ({ratio['least']:.1f}-{ratio['most']:.1f})" if ratio else NOTHING
        table.add_row(
            m["title"],
            f"{m['tokens_per_second']:,.0f}",
            between,
            f"{m['share_of_bf16_peak']:.0%}",
            f"{(m['device_memory'] or m['memory']) / 1e9:.1f} GB",
            NOTHING if d is None else f"{d:.0e}",
        )
    out.print(table)


def comparison(out: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Methods side by side; rows as report.tables.compare_rows gives them."""
    from ..report.tables import choice, constant, has_epsilon, has_global, heading, score, unequal

    if not rows:
        return
    seeds = {r["seeds"] for r in rows}
    alike = len(seeds) == 1 and not any(r["unfinished"] for r in rows)
    spread = f", {max(seeds)} seeds" if alike and max(seeds) > 1 else ""
    head, globe, private = heading(rows), has_global(rows), has_epsilon(rows)
    columns = [
        "method",
        head,
        *(["global"] if globe else []),
        *(["epsilon"] if private else []),
        "worst",
        "trained",
        "sent",
        "time",
    ]
    title = f"{rows[0]['metric']} on test, at the round chosen on {choice(rows)}{spread}"
    table = _table(title, *columns, *([] if alike else ["seeds"]))
    for r in rows:
        unfinished = f" ({r['unfinished']} unfinished)" if r["unfinished"] else ""
        table.add_row(
            r["method"],
            score(r, head),
            *([number(r["global"])] if globe else []),
            *([r["epsilon"] or NOTHING] if private else []),
            number(r["worst_decile"]),
            count(r["trainable"]),
            size(r["bytes_total"]),
            seconds(r["seconds"]),
            *([] if alike else [str(r["seeds"]) + unfinished]),
        )
    for column in table.columns:  # on a narrow terminal only the method's settings wrap, never a number
        column.no_wrap = column.header not in ("method", "seeds")
    if (bar := constant(rows)) is not None:
        table.caption, table.caption_justify = f"always a client's most frequent class: {bar}", "left"
    out.print(table)
    if different := unequal(rows):
        out.print(different, soft_wrap=True, highlight=False)


def pairs(out: Console, found: Sequence[Pair]) -> None:
    """Differences between settings on one partition, and what so many seeds can tell."""
    if not found or max(x.seeds for x in found) < 2:
        return
    table = _table("differences on test, seed by seed", "comparison", "difference", "95 %", "p", "tells")
    for x in found:
        between = NOTHING if x.low is None else f"{x.low:+.3f} to {x.high:+.3f}"
        table.add_row(
            f"{x.a} - {x.b}", f"{x.difference:+.3f}", between, NOTHING if x.p is None else f"{x.p:.2g}", x.verdict
        )
    for column in table.columns[1:4]:
        column.no_wrap = True
    out.print(table)


def scores(out: Console, found: Mapping[str, Mapping[str, float]]) -> None:
    """A row a model, at most five scores side by side; of several models their mean stands below."""
    every = list(dict.fromkeys(n for s in found.values() for n in s if n != "n"))
    for i in range(0, len(every), 5):
        names = every[i : i + 5]
        table = _table("", "model", "rows", *(n.replace("_", " ") for n in names))
        for model, own in found.items():
            table.add_row(model, f"{own['n']:,.0f}", *(number(own.get(n)) for n in names))
        if len(found) > 1:
            means = [[s[n] for s in found.values() if n in s] for n in names]
            table.add_section()
            total = sum(s["n"] for s in found.values())
            table.add_row("mean", f"{total:,.0f}", *(number(sum(v) / len(v)) for v in means))
        out.print(table)
