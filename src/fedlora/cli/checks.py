"""What `fedlora check` prints, at any width: one recipe, or a table of a sweep's runs."""

from __future__ import annotations

import json as json_
import statistics
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..errors import printable
from ..units import count, seconds, size

if TYPE_CHECKING:
    from ..federation.probe import Cost
    from ..recipe import Recipe
    from ..recipe.checked import Check

MOST_CLIENTS = 16  # rows of the table of clients and classes; more clients are drawn as a histogram
MOST_CLASSES = 12  # its columns
BARS = 8  # of a histogram
SHOWN = 6  # items of a list before it is cut
PIECE = 600  # characters of a row's piece


def check(recipes: Sequence[Recipe], json: bool, measure: bool, out: Console, err: Console) -> None:
    """Check every recipe, and print what was found."""
    from ..recipe.checked import alike

    found: list[Check] = []
    costs: dict[str, Cost] = {}  # of runs that differ in their seed alone, one is tried
    for i, r in enumerate(recipes):
        what = f"{i + 1}/{len(recipes)} {r.name}" if len(recipes) > 1 else f"loading {r.model.name} and {r.data.source}"
        with Console(stderr=True, quiet=json).status(escape(what)):
            found.append(_checked(r, measure, costs.get(alike(r)), err))
            costs[alike(r)] = found[-1].cost
        if json:
            sys.stdout.write(json_.dumps(found[-1].to_json()) + "\n")
    if json:
        return
    if len(found) == 1:
        one(out, found[0])
    else:
        many(out, found)


def _checked(r: Recipe, measure: bool, known: Cost | None, err: Console) -> Check:
    from ..recipe.checked import checked

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = checked(r, measure, known)
    for w in said:  # our own warnings are for the user; deprecations in libraries are not
        if w.category is UserWarning and "fedlora" in w.filename:
            err.print(f"[yellow]{escape(str(w.message))}[/]", soft_wrap=True, highlight=False)
    return found


# one recipe -----------------------------------------------------------------------------------------------------------


def one(out: Console, c: Check) -> None:
    """All that is known of one recipe."""
    r, run = c.recipe, c.run
    out.print(Text(f"{r.name} ({r.hash}) is valid", style="bold"), "")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in _facts(c):
        grid.add_row(Text(name, style="cyan"), Text(value))
    out.print(grid, "")
    if run.caution:
        out.print(Text(run.caution, style="yellow"), "")
    if run.histogram and len(run.sizes) <= MOST_CLIENTS and _fits(out, run.label_names, run.ids):
        _matrix(out, c)
    else:
        _clients(out, c)
        if run.label_names:
            _classes(out, c)
    _example(out, c)
    _findings(out, c)


def _example(out: Console, c: Check) -> None:
    """A row as a language model reads it. What is scored is coloured, or stands between >> and << where there are no colours."""
    if not c.data.example:
        return
    colours = out.is_terminal and not out.no_color
    how = "what is scored is green" if colours else "what is scored stands between >> and <<"
    out.print(Text(f"the first training row; {how}", style="bold"))
    shown = Text()
    for text, scored in c.data.example:
        said = "\n".join(printable(line, PIECE) for line in _middle(text, PIECE).splitlines() or [""])
        said += "\n" * text.endswith("\n")
        shown.append(said if colours or not scored else f">>{said}<<", style="green" if scored else "dim")
    out.print(Padding(shown, (0, 0, 1, 2)), soft_wrap=False)


def _middle(text: str, most: int) -> str:
    """A long text without its middle."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def _findings(out: Console, c: Check) -> None:
    """What is odd in the data, a paragraph for each."""
    if not c.data.findings:
        out.print("Nothing odd in the data.")
        return
    out.print(Text("odd in the data", style="bold yellow"))
    grid = Table.grid(padding=(0, 1))
    for f in c.data.findings:
        grid.add_row("-", Text(str(f)))
    out.print(grid)


def _facts(c: Check) -> list[tuple[str, str]]:
    r, run = c.recipe, c.run
    p, each, total = run.parameters, run.bytes_per_round, run.bytes
    frozen = f", of which {p['frozen']:,} are not trained" if p["frozen"] else ""
    cut = f"; {run.truncated:,} rows are cut to {r.data.max_length} tokens" if run.truncated else ""
    layers = [
        f"{name} ({n} of {shape})" if n > 1 else f"{name} ({shape})"
        for group in run.layers.values()
        for name, n, shape in group
    ]
    return [
        ("method", run.method),
        ("model", f"{r.model.name}, {p['base']:,} parameters"),
        ("computes", f"base in {run.numbers}, adapters in fp32, on {run.device}; attention {run.attention or 'its own'}; operators: {run.kernels}"),
        ("layers", _list(layers)),
        ("rows", ", ".join(f"{n:,} {s}" for s, n in run.rows.items()) + cut),
        *([("tokens", tokens(c))] if c.data.tokens else []),
        ("clients", f"{run.clients:,} train, {run.unseen:,} unseen, {run.cohort:,} a round, {run.block} in a block"),
        ("rounds", f"{run.rounds}, {run.steps} local steps of batch {r.train.batch_size}"),
        ("trained", f"{p['trainable']:,} numbers a client, of which head {p['head']:,}"),
        ("shared", f"{p['shared']:,}{frozen}; personal {p['personal']:,}"),
        *([("guards", ", ".join(run.guards))] if run.guards else []),
        ("bytes a round", f"{size(each['down'])} down, {size(each['up'])} up; in {run.rounds} rounds {size(total['down'] + total['up'])}"),
        ("memory", memory(c.cost)),
        ("time", time(c.cost, run.rounds)),
    ]  # fmt: skip


def tokens(c: Check) -> str:
    """How long rows are."""
    t = c.data.tokens
    assert t is not None
    cut = f"; {t.cut:.1%} of the rows are cut to {c.recipe.data.max_length}" if t.cut else "; none is cut"
    return f"median {t.median:,}, 95 % up to {t.most:,}, longest {t.longest:,}{cut}"


def memory(cost: Cost) -> str:
    """What the process takes, and for what."""
    parts = (
        f"{size(cost.program)} Python and libraries, {size(cost.loaded)} base and data, {size(cost.training)} training"
    )
    card = f"; {size(cost.device)} on the accelerator" if cost.device else ""
    how = "" if cost.tried else f" (estimated: {cost.why})" if cost.why else " (estimated)"
    return f"{size(cost.memory)} at its peak{how}: {parts}{card}"


def time(cost: Cost, rounds: int) -> str:
    """How long it takes, and for what."""
    if not cost.tried:
        return "not measured"
    each = f"{seconds(cost.round)} a round, {seconds(cost.evaluation)} an evaluation"
    return (
        f"about {seconds(cost.seconds)} on this machine: {each}; a step of {cost.block} clients takes {cost.step:.2g} s"
    )


def _list(items: Sequence[str], most: int = SHOWN) -> str:
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _fits(out: Console, names: Sequence[str], ids: Sequence[str]) -> bool:
    wide = max(map(len, ids)) + 4 + sum(max(len(n), 4) + 2 for n in names) + 6
    return len(names) <= MOST_CLASSES and wide <= out.width


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, c in enumerate(columns):
        table.add_column(c, justify="left" if i == 0 else "right")
    return table


def _matrix(out: Console, c: Check) -> None:
    out.print(Text("training rows of each client and class", style="bold"))
    table = _table("", "client", *c.run.label_names, "all")
    for id, counts in zip(c.run.ids, c.run.histogram, strict=True):
        table.add_row(Text(id), *(str(n) if n else "." for n in counts), str(sum(counts)))
    out.print(table)


def _clients(out: Console, c: Check) -> None:
    """How many training rows clients have: a line for each of a few, else a histogram."""
    sizes = list(c.run.sizes)
    if len(sizes) <= MOST_CLIENTS:
        out.print(Text("training rows of each client", style="bold"))
        table = _table("", "client", *(["classes"] if c.run.histogram else []), "rows", "")
        for i, (id, n) in enumerate(zip(c.run.ids, sizes, strict=True)):
            held = [str(c.run.classes_held[i])] if c.run.histogram else []
            table.add_row(Text(id), *held, f"{n:,}", _bar(n, max(sizes)))
        table.columns[-1].justify = "left"
        out.print(table)
        return
    spread = f"{min(sizes):,} to {max(sizes):,}, median {statistics.median(sizes):,.0f}"
    out.print(Text(f"training rows of {len(sizes):,} clients: {spread}", style="bold"))
    table = _table("", "rows", "clients", "")
    for a, b, n in bins(sizes):
        table.add_row(f"{a:,}" if a == b else f"{a:,} to {b:,}", f"{n:,}", _bar(n, len(sizes)))
    table.columns[-1].justify = "left"
    out.print(table)
    if c.run.histogram:
        kinds = c.run.classes_held
        out.print(f"classes that a client holds: {min(kinds)} to {max(kinds)}, median {statistics.median(kinds):.0f}\n")


def bins(sizes: Sequence[int], most: int = BARS) -> list[tuple[int, int, int]]:
    """Whole numbers in up to `most` bins of equal width: (least, largest, how many)."""
    low, high = min(sizes), max(sizes)
    width = -(-(high - low + 1) // most)
    counts = [0] * (-(-(high - low + 1) // width))
    for n in sizes:
        counts[(n - low) // width] += 1
    return [(low + i * width, min(low + (i + 1) * width - 1, high), n) for i, n in enumerate(counts)]


def _bar(n: int, of: int, width: int = 24) -> str:
    return "█" * max(round(width * n / max(of, 1)), 1 if n else 0)


def _classes(out: Console, c: Check) -> None:
    """Training rows of each class: all of a few, the largest and the smallest of many."""
    counts = c.run.class_rows
    order = sorted(range(len(counts)), key=lambda i: -counts[i])
    shown = order if len(order) <= MOST_CLASSES else order[:SHOWN] + order[-SHOWN:]
    title = f"training rows of {len(counts)} classes: {min(counts):,} to {max(counts):,}, median {statistics.median(counts):,.0f}"
    out.print(Text(title, style="bold"))
    table = _table("", "class", "rows", "clients", "")
    for place, i in enumerate(shown):
        if place == SHOWN and len(shown) < len(order):
            table.add_row(f"... {len(order) - len(shown)} more", "", "", "")
        have = c.run.class_clients[i]
        table.add_row(
            Text(c.run.label_names[i], overflow="ellipsis", no_wrap=True),
            f"{counts[i]:,}",
            f"{have:,}",
            _bar(counts[i], max(counts)),
        )
    table.columns[0].max_width = max(20, out.width - 52)
    table.columns[-1].justify = "left"
    out.print(table)


# a sweep --------------------------------------------------------------------------------------------------------------


def many(out: Console, found: Sequence[Check]) -> None:
    """A line for each run of a sweep, and totals."""
    names = [c.recipe.name for c in found]
    out.print(Text(f"{len(found)} runs are valid", style="bold"))
    table = _table("", "run", "clients", "trained", "sent", "memory", "time")
    for name, c in zip(names, found, strict=True):
        sent = c.run.bytes["down"] + c.run.bytes["up"]
        table.add_row(
            Text(name), f"{c.run.clients:,}", count(c.run.parameters["trainable"]), size(sent), size(c.cost.memory),
            seconds(c.cost.seconds if c.cost.tried else None),
        )  # fmt: skip
    tried = [c.cost.seconds for c in found if c.cost.tried]
    table.add_section()
    table.add_row(
        "all", "", "", size(sum(c.run.bytes["down"] + c.run.bytes["up"] for c in found)), size(max(c.cost.memory for c in found)),
        seconds(sum(tried) if len(tried) == len(found) else None),
    )  # fmt: skip
    for column in table.columns[1:]:
        column.no_wrap = True
    table.columns[0].overflow = "fold"
    out.print(table)
    odd = dict.fromkeys(str(f) for c in found for f in c.data.findings)
    if odd:
        out.print(Text("odd in the data", style="bold yellow"))
    for text in odd:
        out.print(Text(f"- {text}"))
