"""Numbers of runs side by side; seeds of one setting become one row with a spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .read import Records, records

Row = dict[str, Any]


def compare_rows(folders: Sequence[str | Path]) -> list[Row]:
    """One row per setting: scores on test at the round chosen on validation, mean over seeds, and costs.

    test_std: sample standard deviation over seeds, None for one seed.
    """
    return [_row(label, runs) for label, runs in grouped([records(f) for f in folders]).items()]


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
        if len(twins) > 1:  # the same method with other settings
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
    return {
        "method": label,
        "metric": runs[0].metric,
        "test": _mean(tests),
        "test_std": statistics.stdev(tests) if len(tests) > 1 else None,
        "global": _mean(_known([_view(s, "global", "mean") for s in done])),
        "unseen": _mean(_known([_view(s, "unseen", "mean") for s in done])),
        "weighted": _mean(_known([_view(s, "personal", "weighted") for s in done])),
        "worst_decile": _mean(_known([_view(s, "personal", "worst_decile") for s in done])),
        "test_last10": _mean(_known([s["test_last10"] for s in done])),
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
