"""The page of several runs: their scores side by side, what they cost, and what their differences tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import StateError
from ..units import NOTHING, count, fields, number, seconds, size
from . import budgets, datasets, figures, races
from .budgets import QUANTITIES, Quantity
from .page import Block, about, short, source
from .read import Records
from .statistics import LEAST
from .tables import (
    against,
    choice,
    compare_rows,
    constant,
    differing,
    flat,
    grouped,
    has_epsilon,
    has_global,
    heading,
    paired,
    score,
    settings,
    spread,
    unequal,
)


def comparison_page(
    runs: Sequence[Records],
    rows: Sequence[Mapping[str, Any]],
    search: Mapping[str, Any] | None = None,
    budget: tuple[Quantity, float] | None = None,
    more: Block | None = None,
) -> dict[str, Any]:
    """Title and blocks of a comparison. search: what the search of hyperparameters has tried, where there was one. budget: what
    the runs were cut at, for a client. more: a block after the first table, as of at_equal_rows."""
    groups = grouped(runs)
    metric = runs[0].metric
    m = figures.words(metric)
    odd = sorted(differing([flat(r.recipe) for r in runs]))
    odd = [k for k in odd if k != "name" and not k.startswith("method.") and k not in ("run.output",)]
    note = f"Test scores at the round chosen on {choice(rows)}. The runs differ in the method{''.join(f', {k}' for k in odd)}."
    if (bar := constant(rows)) is not None:
        note += f" Always giving a client's most frequent class, without a model, scores {bar}."
    if has_global(rows):
        note += f" The column global is of the round that was chosen for {heading(rows)}."
    if budget is not None:
        note += f" Equal {budget[0]}: every run is read up to its last round within {amount(*budget)} a client, the least that one of them has used."
    if different := unequal(rows):
        note += f" {different}"
    first = runs[0]
    alike = len({str(r.partition.get("histogram")) for r in runs}) == 1
    whose = "" if alike else f"; of {first.name}"
    blocks = [
        Block("Side by side", reading(rows), table=side_by_side(rows), wide=True),
        more or Block(""),
        Block(f"{m}, personal models".capitalize(), "Mean over clients, each on its own test data; the band is the range of seeds.", races.race(groups)),
        Block(f"{m} against bytes".capitalize(), "The same, against what was sent.", races.race(groups, "bytes")),
        Block(f"{m}, global model".capitalize(), "The shared part alone, for a client that keeps nothing.", races.race(groups, view="global")),
        Block("Spread over clients", "One point per client at the chosen round.", races.client_boxes(groups)),
        Block("Who holds what", figures.holding(first, whose), figures.partition(first)),
    ]  # fmt: skip
    told = "Fields of the recipes in which the settings differ, defaults included."
    blocks += [
        *_several(runs),
        _effort(rows),
        Block("Settings that differ", told, table=settings(groups)),
        _to_target(rows, m),
        _clients(groups),
        _pairs(groups),
    ]
    blocks += [] if search is None else [_search(search)]
    blocks = [b for b in blocks if b.figure is not None or b.table or b is more]
    blocks += about(first)
    count = f"{len(groups)} settings, {len(runs)} runs"
    lead = (
        f"{count} on {source(first.recipe['data'])} with {short(first.recipe['model']['name'])}."
        if first.recipe
        else f"{count}."
    )
    return {
        "title": " against ".join(groups) if len(groups) <= 4 else f"{len(groups)} settings: {_differing(groups)}",
        "lead": lead,
        "note": note,
        "tiles": [],
        "blocks": blocks,
    }


def _differing(groups: Mapping[str, Sequence[Records]]) -> str:
    """In what settings differ, for a title: "method, lr and rounds"; of more than three fields the first three and how many more."""
    plain = [flat(g[0].recipe) for g in groups.values()]
    methods = len({g[0].title for g in groups.values()}) > 1
    skip = ("name", "method.name", "method.title")
    # A field that only some methods have follows from the method.
    odd = [k for k in differing(plain) if k not in skip and not k.startswith("run.") and all(k in p for p in plain)]
    names = ["method"] * methods + [k.rpartition(".")[2] for k in odd]
    shown = names[:3] + ([f"{len(names) - 3} more"] if len(names) > 3 else [])
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown) or "runs of their own"


def side_by_side(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The table of all settings as it is read, under its head."""
    unseen = any(r["unseen"] is not None for r in rows)
    view, globe, private = heading(rows), has_global(rows), has_epsilon(rows)
    head = (
        "method",
        view,
        "95 %",
        *(["global"] if globe else []),
        *(["unseen"] if unseen else []),
        *(["epsilon"] if private else []),
        "worst tenth",
        f"last {max(r['last_rounds'] for r in rows)}",
        "trained",
        "shared",
        "sent",
        "tokens",
        "time",
        "memory",
        "seeds",
    )
    exact = lambda n: NOTHING if n is None else f"{n:,}"  # noqa: E731
    out: list[tuple[str, ...]] = [head]
    for r in rows:
        unfinished = f" ({r['unfinished']} unfinished)" if r["unfinished"] else ""
        row = [r["method"], score(r, view), spread(r)]
        row += [number(r[k]) for k, there in (("global", globe), ("unseen", unseen)) if there]
        row += [r["epsilon"] or NOTHING] if private else []
        row += [number(r["worst_decile"]), number(r["test_last10"]), exact(r["trainable"]), exact(r["shared"])]
        row += [size(r["bytes_total"]), count(r["tokens"]), seconds(r["seconds"]), size(r["peak_memory_bytes"])]
        out.append((*row, f"{r['seeds']}{unfinished}"))
    return out


def at_equal_rows(runs: Sequence[Records]) -> Block | None:
    """A second table, of whole runs read at equal rows; None where every setting has seen the same, or a run does not know.

    A method that draws several minibatches a step is ahead at equal steps for having seen more. Where it is behind in this table
    and ahead in the first one, the rows and not the method made the difference.
    """
    seen = [r["rows_each"] for r in compare_rows(runs)]
    if None in seen or max(seen) < 1.1 * min(seen):
        return None
    try:
        cut, least = budgets.equal(runs, "rows")
    except StateError as e:
        return Block("At equal rows", f"Cannot be shown: {e}.")
    told = (
        f"Every run up to its last round within {amount('rows', least)} a client, the least that one of them has seen."
    )
    return Block("At equal rows", told, table=side_by_side(compare_rows(cut)), wide=True)


def reading(rows: Sequence[Mapping[str, Any]]) -> str:
    """How to read the table: what is scored, on how many rows, and what stands behind the signs."""
    n = [r["test_rows"] for r in rows if r["test_rows"]]
    many = f" on {min(n):,.0f}" + (f" to {max(n):,.0f}" if max(n) - min(n) >= 1 else "") + " test rows" if n else ""
    text = f"{figures.words(rows[0]['metric']).capitalize()}{many}, mean over clients, at the round chosen on {choice(rows)}"
    if any(r["test_std"] is not None for r in rows):
        text += "; ± is the standard deviation over seeds, 95 % a bootstrap interval over seeds and their clients"
    return text + "."


def _search(facts: Mapping[str, Any]) -> Block:
    """What was tried for each setting, on how many short runs, and what was taken."""
    head = ("setting", "tried", "validation", "", "tokens", "time")
    body = []
    for s in facts["settings"]:
        for i, t in enumerate(s["trials"]):
            note = "failed" if "failed" in t else ""
            if i == s["chosen"]:
                note = "taken" + (", at the edge" if s["edges"] else "")
            body.append(
                (
                    s["setting"] if i == 0 else "",
                    fields(t["fields"]),
                    number(t["validation"]),
                    note,
                    count(t["tokens"]),
                    seconds(t["seconds"]),
                )
            )
    told = (
        f"Before the runs, {facts['trials']} trials of {facts['rounds']} rounds for each setting with seed {facts['seed']}, which no run has. "
        "The best mean on validation is taken, the first of equals. At the edge: the smallest or largest value tried, so a better "
        "one may lie beyond."
    )
    return Block("Search", told, table=[head, *body], wide=True, folded=len(body) > 20)


def _several(runs: Sequence[Records]) -> list[Block]:
    """Methods over several data sets, where there are enough of them."""
    scores = datasets.by_dataset(runs)
    if not scores:
        return []
    middle, found = datasets.middles(scores), datasets.ranks(scores, runs[0].lower_is_better)
    order = sorted(scores, key=found.average.__getitem__)
    body = [
        (
            s,
            f"{found.average[s]:.2f}",
            number(middle[s].mean),
            NOTHING if (low := middle[s].low) is None else f"{number(low)} to {number(middle[s].high)}",
            str(min(map(len, scores[s].values()))),
        )
        for s in order
    ]
    told = (
        f"Over {found.datasets} data sets: average rank, and the mean of the middle half of all scores, with a bootstrap interval over the "
        f"seeds of each data set. {datasets.verdict(found)} A data set is one observation, however many seeds it has. "
        "Grey bars join settings whose ranks are closer than the critical difference (Nemenyi, 0.05)."
    )
    head = ("method", "average rank", "interquartile mean", "95 %", "seeds, at least")
    return [Block("Over data sets", told, datasets.picture(found), table=[head, *body])]


def amount(what: Quantity, n: float | None) -> str:
    """So much of a quantity, as it is read: "1.2 MB", "3 min", "1,200 steps"."""
    if n is None:
        return NOTHING
    return size(n) if what == "bytes" else seconds(n) if what == "seconds" else f"{n:,.0f} {what}"


def _effort(rows: Sequence[Mapping[str, Any]]) -> Block:
    """What a client of each setting has done and sent, on average."""
    known = [q for q in QUANTITIES if any(r[f"{q}_each"] is not None for r in rows)]
    body = [(r["method"], *(amount(q, r[f"{q}_each"]).removesuffix(f" {q}") for q in known)) for r in rows]
    told = (
        "A client's local steps, the rows and tokens in its minibatches, what it sent and received, and its training on this machine; "
        "mean over the clients that train. fedlora compare --equal rows (or steps, bytes, seconds) reads all at the least of them."
    )
    return Block("What a client does", told, table=[("method", *known), *body], folded=len(body) > 12)


def _to_target(rows: Sequence[Mapping[str, Any]], metric: str) -> Block:
    """What it took to reach a score that is the same for all."""
    target = rows[0]["target"]
    if target is None:
        return Block("")
    head = ("method", "round", "sent", "simulated")
    body = [
        (r["method"], "never", NOTHING, NOTHING)
        if r["target_round"] is None
        else (
            r["method"],
            f"{r['target_round']:.1f}".removesuffix(".0"),
            size(r["target_bytes"]),
            seconds(r["target_seconds"]),
        )
        for r in rows
    ]
    return Block(
        f"To reach {metric} {number(target)}",
        "On validation. Simulated: clients work at the same time at this machine's speed, over the recipe's bandwidth.",
        table=[head, *body],
    )


def _clients(groups: Mapping[str, Sequence[Records]]) -> Block:
    """Every client of every setting against the same client of the first one."""
    found = against(groups)
    if not found:
        return Block("")
    first = next(iter(groups))
    body = [(x.name, f"{x.won:,}", f"{x.tied:,}", f"{x.lost:,}", f"{x.seeds}") for x in found]
    return Block(
        f"Client by client, against {first}",
        "Test scores at the chosen round: for how many clients, over all seeds, a setting is better, equal or worse. The clients of "
        "one run are not independent, so no test rests on these counts.",
        table=[("setting", "better", "equal", "worse", "seeds"), *body],
    )


def _pairs(groups: Mapping[str, Sequence[Records]]) -> Block:
    """Differences between settings on the same clients and seeds."""
    found = [] if len(groups) > 12 else paired(groups)
    head = ("comparison", "difference", "95 % interval", "seeds", "p", "what it tells")
    body = [
        (
            f"{x.a} – {x.b}",
            f"{x.difference:+.3f}",
            NOTHING if x.low is None else f"{x.low:+.3f} to {x.high:+.3f}",
            str(x.seeds),
            NOTHING if x.p is None else f"{x.p:.2g}",
            x.verdict,
        )
        for x in found
    ]
    told = (
        "Difference on test, seed by seed on one partition; interval and p are Student's over seeds, since the clients of one "
        f"run are not independent. p is given from {LEAST} seeds on and corrected over all pairs (Holm)."
    )
    if odd := [x for x in found if x.apart]:
        told += (
            " Clients that only one of the two has scored are left out: "
            + "; ".join(f"{x.apart} of {x.a} – {x.b}" for x in odd[:6])
            + ("" if len(odd) <= 6 else f"; and in {len(odd) - 6} further pairs")
            + "."
        )
    return Block("Pair by pair", told, table=[head, *body] if body else (), wide=True, folded=len(body) > 20)
