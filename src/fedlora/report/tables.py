"""Numbers of runs side by side; seeds of one setting become one row with a spread."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.metrics import beats
from ..units import NOTHING, number
from .read import Records, records

Row = dict[str, Any]
BANDWIDTH = (50.0, 10.0)  # megabits a second, for runs without a recipe


def compare_rows(folders: Sequence[str | Path]) -> list[Row]:
    """One row per setting: scores on test at the round chosen on validation, mean over seeds, and costs.

    test_std: sample standard deviation over seeds, None for one seed.
    """
    groups = grouped([records(f) for f in folders])
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
            seconds += (compute.get(x.round, 0.0) + sent["down"] / down + sent["up"] / up) / len(x.clients)
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


@dataclass(frozen=True)
class Pair:
    """Setting `a` against `b` on the same clients and seeds."""

    a: str
    b: str
    pairs: int
    difference: float  # mean of a - b
    p: float | None  # Wilcoxon's signed-rank test, two-sided; None below 6 pairs that differ


def paired(groups: Mapping[str, Sequence[Records]]) -> list[Pair]:
    """Every two settings, client by client and seed by seed; only where partitions are the same."""
    from scipy import stats

    scores = {label: _scores_of(runs) for label, runs in groups.items()}
    out = []
    for a, b in itertools.combinations(groups, 2):
        common = sorted(scores[a].keys() & scores[b].keys())
        if not common:
            continue
        differences = [scores[a][k] - scores[b][k] for k in common]
        enough = sum(d != 0 for d in differences) >= 6
        p = float(stats.wilcoxon(differences).pvalue) if enough else None
        out.append(Pair(a, b, len(common), sum(differences) / len(differences), p))
    return out


def _scores_of(runs: Sequence[Records]) -> dict[tuple[Any, ...], float]:
    """(seed, partition, client) -> test score at the chosen round."""
    out = {}
    for r in runs:
        line = r.at(r.main, "test", r.chosen) if r.chosen is not None else None
        for client, s in (line.clients if line else {}).items():
            if r.metric in s:
                out[(r.recipe.get("run", {}).get("seed", 0), str(r.partition.get("sizes")), client)] = s[r.metric]
    return out


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
        "test_std": statistics.stdev(tests) if len(tests) > 1 else None,
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
        "peak_memory_bytes": max((s["peak_memory_bytes"] for s in done), default=None),
        "seeds": len(runs),
        "unfinished": len(runs) - len(done),
    }


def _view(s: Mapping[str, Any], view: str, summary: str) -> float | None:
    found: float | None = s["views"].get(view, {}).get(summary, {}).get(s["metric"])
    return found


def _known(values: Sequence[float | None]) -> list[float]:
    return [v for v in values if v is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
