"""Numbers of runs side by side; seeds of one setting become one row with a spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.metrics import beats
from ..units import NOTHING, number
from .budgets import QUANTITIES, used
from .read import Records, records
from .statistics import Pair, Seed, differences, interval

Row = dict[str, Any]
BANDWIDTH = (50.0, 10.0)  # megabits a second, for runs without a recipe


def compare_rows(runs: Sequence[str | Path | Records]) -> list[Row]:
    """One row per setting, of run folders or what was read of them: scores on test at the round chosen on validation, mean over seeds, and costs.

    test_std: sample standard deviation over seeds; test_interval: 95 % by a two-level bootstrap over seeds and their
    clients. Both are None for one seed.
    """
    groups = grouped([r if isinstance(r, Records) else records(r) for r in runs])
    target = common_target(groups)
    return [_row(label, runs) | cost_to(runs, target) for label, runs in groups.items()]


def constant(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What always giving a client's most frequent class scores: one number, or its range over the rows."""
    known = sorted({f"{r['constant']:.3f}" for r in rows if r["constant"] is not None})
    return " to ".join(dict.fromkeys((known[0], known[-1]))) if known else None


def heading(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the column of test scores is called: the view that all rows are of, or "test" where they differ."""
    views = {r["view"] for r in rows if r["test"] is not None}
    return views.pop() if len(views) == 1 else "test"


def has_global(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the global model's scores need a column of their own."""
    return heading(rows) != "global" and any(r["global"] is not None for r in rows)


def choice(rows: Sequence[Mapping[str, Any]]) -> str:
    """On which rows the round was chosen: of validation, or of test where a run has no others."""
    found = sorted({on for r in rows for on in r["chosen_on"]}, reverse=True) or ["validation"]
    return " or ".join(found) + (", the very rows that are scored" if "test" in found else "")


def score(row: Mapping[str, Any], heading: str) -> str:
    """A row's test score with its spread over seeds, and its view where the heading does not say it."""
    if (shown := number(row["test"])) == NOTHING:
        return NOTHING
    spread = f" ± {number(row['test_std'])}" if row["test_std"] is not None else ""
    return shown + spread + (f" {row['view']}" if heading == "test" else "")


def spread(row: Mapping[str, Any]) -> str:
    """A row's 95 % interval over seeds and clients."""
    found = row["test_interval"]
    return NOTHING if found is None else f"{number(found[0])} to {number(found[1])}"


def unequal(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sentence where settings have trained on other amounts of text, as PF2LoRA's four minibatches a step make them."""
    seen = {r["method"]: r["tokens"] for r in rows if r["tokens"]}
    if not seen or max(seen.values()) < 1.1 * min(seen.values()):
        return ""
    least = min(seen, key=seen.__getitem__)
    more = [f"{m} {n / seen[least]:.1f}" for m, n in seen.items() if n >= 1.1 * seen[least]]
    return f"Not equal: tokens trained on, in multiples of {least}'s: {', '.join(more)}."


def settings(groups: Mapping[str, Sequence[Records]]) -> list[tuple[str, ...]]:
    """A table of the fields in which methods differ, the defaults included, under a head; empty where nothing differs."""
    plain = {label: flat(runs[0].recipe) for label, runs in groups.items()}
    names = dict.fromkeys(k for p in plain.values() for k in p if k.split(".")[0] in ("method", "train"))
    odd = [
        k
        for k in names
        if k not in ("method.name", "method.title")
        and len(values := [json.dumps(p[k]) for p in plain.values() if k in p]) > 1
        and len(set(values)) > 1
    ]
    if not odd:
        return []
    shown = lambda v: NOTHING if v is None else f"{v:g}" if isinstance(v, float) else str(v)  # noqa: E731
    body = [(label, *(shown(p[k]) if k in p else "" for k in odd)) for label, p in plain.items()]
    return [("method", *(k.removeprefix("method.") for k in odd)), *body]


@dataclass(frozen=True)
class Reached:
    """What it took until a score was reached on validation (on test where there is no validation)."""

    round: int
    bytes: int
    seconds: float  # simulated: clients work at the same time, at this machine's speed, over evaluation.bandwidth


def reach(run: Records, target: float) -> Reached | None:
    """When the mean score of the main view first reached `target`, None if it never did."""
    evals = run.evals(run.main, "validation") or run.evals(run.main, "test")
    good = [
        x
        for x in evals
        if x.round and run.metric in x.mean and not beats(target, x.mean[run.metric], run.lower_is_better)
    ]
    if not good:
        return None
    last = good[0].round
    down, up = (mbit * 1e6 / 8 for mbit in run.recipe.get("evaluation", {}).get("bandwidth", BANDWIDTH))
    compute = {t.round: t.train_seconds for t in run.timings}
    seconds = 0.0
    for x in run.trains:
        if x.round <= last:
            sent = {d: x.sent(d) for d in ("up", "down")}
            seconds += (compute.get(x.round, 0.0) + sent["down"] / down + sent["up"] / up) / max(len(x.clients), 1)
    return Reached(last, run.bytes_by_round().get(last, 0), seconds)


def common_target(groups: Mapping[str, Sequence[Records]]) -> float | None:
    """The recipes' target, or the best score that every run reached."""
    runs = [r for g in groups.values() for r in g]
    given = runs[0].recipe.get("evaluation", {}).get("target")
    if given is not None:
        return float(given)
    best = []
    for r in runs:
        scores = [
            x.mean[r.metric] for x in r.evals(r.main, "validation") or r.evals(r.main, "test") if r.metric in x.mean
        ]
        if not scores:
            return None
        best.append(min(scores) if r.lower_is_better else max(scores))
    return max(best) if runs[0].lower_is_better else min(best)


def cost_to(runs: Sequence[Records], target: float | None) -> Row:
    """Rounds, bytes and simulated seconds to the target, mean over seeds; None where a seed never reached it."""
    found = [reach(r, target) for r in runs] if target is not None else []
    got = [f for f in found if f is not None]
    whole = got if found and len(got) == len(found) else []
    return {
        "target": target,
        "target_round": _mean([f.round for f in whole]),
        "target_bytes": _mean([f.bytes for f in whole]),
        "target_seconds": _mean([f.seconds for f in whole]),
    }


def paired(groups: Mapping[str, Sequence[Records]]) -> list[Pair]:
    """Every two settings, seed by seed; only where partitions are the same."""
    return differences({label: scores(runs) for label, runs in groups.items()})


def scores(runs: Sequence[Records]) -> dict[Seed, dict[str, float]]:
    """(seed, partition) -> client -> test score at the chosen round."""
    out: dict[Seed, dict[str, float]] = {}
    for r in runs:
        line = r.at(r.main, "test", r.chosen) if r.chosen is not None else None
        found = {client: s[r.metric] for client, s in (line.clients if line else {}).items() if r.metric in s}
        if found:
            out[(r.recipe.get("run", {}).get("seed", 0), partition_of(r))] = found
    return out


@dataclass(frozen=True)
class Against:
    """Clients of a setting beside the same clients of another, over the seeds that both have."""

    name: str
    won: int
    tied: int
    lost: int
    seeds: int


def against(groups: Mapping[str, Sequence[Records]], baseline: str | None = None) -> list[Against]:
    """Every other setting against `baseline`, the first one by default; those without a seed and partition in common are left out."""
    first = baseline or next(iter(groups), "")
    known = {label: scores(runs) for label, runs in groups.items()}
    out = []
    for label, own in known.items():
        both = sorted(own.keys() & known[first].keys()) if label != first else []
        gaps = [
            (own[s][c] - known[first][s][c]) * (-1 if groups[label][0].lower_is_better else 1)
            for s in both
            for c in own[s].keys() & known[first][s].keys()
        ]
        if gaps:
            out.append(
                Against(label, sum(g > 0 for g in gaps), sum(g == 0 for g in gaps), sum(g < 0 for g in gaps), len(both))
            )
    return out


def _test_rows(r: Records) -> float | None:
    """Rows behind the test scores at the chosen round."""
    line = r.at(r.main, "test", r.chosen) if r.chosen is not None else None
    return sum(s["n"] for s in line.clients.values()) if line else None


def partition_of(r: Records) -> str:
    """The same for two runs where the same client has the same rows; of a deployment, whose rows nobody knows, the same counts."""
    return str([r.partition.get(k) for k in ("ids", "rows" if "rows" in r.partition else "histogram", "sizes")])


def grouped(runs: Sequence[Records]) -> dict[str, list[Records]]:
    """Runs by setting, seeds together; the label says in what a setting differs from the others."""
    settings: dict[str, list[Records]] = {}
    for r in runs:
        settings.setdefault(_setting(r), []).append(r)
    groups = list(settings.values())
    plain = [flat(g[0].recipe) for g in groups]
    titles = [g[0].title for g in groups]
    labels = list(titles)
    for i, own in enumerate(plain):
        twins = [p for p, title in zip(plain, titles, strict=True) if title == titles[i]]
        if len(twins) > 1:  # one method with several settings
            odd = [
                k for k in own if k != "name" and not k.startswith("run.") and any(t.get(k) != own[k] for t in twins)
            ]
            labels[i] = f"{groups[i][0].title} " + (
                ", ".join(f"{k.split('.')[-1]}={own[k]}" for k in odd[:3]) or groups[i][0].name
            )
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({g[0].folder.name})" for label, g in zip(labels, groups, strict=True)]
    return dict(zip(labels, groups, strict=True))


def _setting(r: Records) -> str:
    """What two seeds of one setting have in common."""
    if not r.recipe:
        return f"{r.hash} {r.folder}"
    return json.dumps({k: v for k, v in r.recipe.items() if k not in ("name", "run")}, sort_keys=True)


def differing(plain: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paths at which recipes differ, in their order; what only some of them have counts as null elsewhere."""
    return [k for k in dict.fromkeys(k for p in plain for k in p) if len({json.dumps(p.get(k)) for p in plain}) > 1]


def flat(x: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as dotted paths."""
    out: dict[str, Any] = {}
    for k, v in x.items():
        key = f"{path}.{k}" if path else str(k)
        out |= flat(v, key) if isinstance(v, Mapping) else {key: v}
    return out


def _row(label: str, runs: Sequence[Records]) -> Row:
    done = [r.summary for r in runs if r.summary]
    tests = _known([s["test"] for s in done])
    view = runs[0].main
    return {
        "method": label,
        "metric": runs[0].metric,
        "view": view,  # whose score "test", "weighted" and "worst_decile" are
        "test": _mean(tests),
        "test_rows": _mean(_known([_test_rows(r) for r in runs])),
        "test_std": statistics.stdev(tests) if len(tests) > 1 else None,
        "test_interval": interval(scores(runs)),
        "global": _mean(_known([_view(s, "global", "mean") for s in done])),
        "unseen": _mean(_known([_view(s, "unseen", "mean") for s in done])),
        "weighted": _mean(_known([_view(s, view, "weighted") for s in done])),
        "worst_decile": _mean(_known([_view(s, view, "worst_decile") for s in done])),
        "test_last10": _mean(_known([s["test_last10"] for s in done])),
        "constant": _mean(_known([s.get("constant") for s in done])),
        "last_rounds": max((s.get("last_rounds", 10) for s in done), default=0),
        "chosen_on": sorted({s["chosen_on"] for s in done}),
        "chosen_round": _mean(_known([s["chosen_round"] for s in done])),
        "trainable": done[0]["parameters"]["trainable"] if done else None,
        "shared": done[0]["parameters"]["shared"] if done else None,
        "bytes_total": _mean([s["bytes"]["total"] for s in done]),
        "seconds": _mean([s["seconds"] for s in done]),
        "tokens": _mean([float(sum(t.tokens for t in r.timings)) for r in runs if r.summary]),
        **{
            f"{q}_each": _mean(_known([_most(used(r, q)) for r in runs if r.summary])) for q in QUANTITIES
        },  # a client's
        "peak_memory_bytes": max((s["peak_memory_bytes"] for s in done), default=None),
        "epsilon": _epsilon([s["privacy"]["epsilon"] for s in done if "privacy" in s]),
        "seeds": len(runs),
        "unfinished": len(runs) - len(done),
    }


def _epsilon(spent: Sequence[float | None]) -> str | None:
    """The largest of what runs spent, as text; None where no run is private, and "inf" where one has only clipped."""
    if not spent:
        return None
    return "inf" if None in spent else f"{max(e for e in spent if e is not None):.3g}"


def has_epsilon(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether what runs spent of a privacy budget needs a column."""
    return any(r["epsilon"] is not None for r in rows)


def _view(s: Mapping[str, Any], view: str, summary: str) -> float | None:
    found: float | None = s["views"].get(view, {}).get(summary, {}).get(s["metric"])
    return found


def _most(found: Mapping[int, float] | None) -> float | None:
    return max(found.values()) if found else None


def _known(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
