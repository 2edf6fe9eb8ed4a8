"""A sweep with a search: short trials first, then its runs with the values that were best on validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StateError
from ..files import sealed
from ..report import SEARCH as FILE
from ..units import count, fields, number, seconds

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..recipe.search import Plan, Setting
    from ..recipe.sweep import Pairs

ROOM = "search"  # the folder of the trials, within the sweep's
Todo = Sequence[tuple["Recipe", Path]]


def search(
    plan: Plan, sweep: Path, runs: Callable[[Todo], Mapping[Path, str]], say: Callable[[str], None]
) -> list[Pairs]:
    """The chosen pairs of every setting. runs: brings trials to their end, and returns why some have failed, by folder.

    What was tried, what it gave and what it cost is written to FILE in the sweep's folder. Raises StateError for a setting of which
    no trial has a score.
    """
    from ..recipe.search import best, edges
    from ..training.tasks import lower_is_better

    where = {
        t.recipe.hash: (t.recipe, sweep / ROOM / f"{t.recipe.name}-{t.recipe.hash}")
        for s in plan.settings
        for t in s.trials
    }
    say(
        f"search: {len(where)} trials of {plan.rounds} rounds with seed {plan.seed}, {plan.trials} for each of {len(plan.settings)} settings"
    )
    failed = runs(list(where.values()))
    told: list[dict[str, Any]] = []
    chosen: list[Pairs] = []
    for s in plan.settings:
        tried = [_tried(t.choice, where[t.recipe.hash][1], sweep, failed) for t in s.trials]
        metric = next((t["metric"] for t in tried if t["validation"] is not None), "loss")
        at = best([t["validation"] for t in tried], lower_is_better(metric))
        if at is None:
            raise StateError(f"search: no trial of {s.name} has a score on validation; {_why(s, tried)}")
        told.append(
            {"setting": s.name, "method": s.method, "trials": tried, "chosen": at, "edges": edges(s.trials, at)}
        )
        chosen.append(s.trials[at].choice)
    facts = {"rounds": plan.rounds, "seed": plan.seed, "trials": plan.trials, "settings": told}
    sealed.write(sweep / FILE, facts)
    for text in lines(facts):
        say(text)
    return chosen


def _tried(choice: Pairs, folder: Path, sweep: Path, failed: Mapping[Path, str]) -> dict[str, Any]:
    """One trial as FILE has it: what was tried, its score on validation, and its cost."""
    from ..report.read import records

    out: dict[str, Any] = {"fields": dict(choice), "folder": folder.relative_to(sweep).as_posix(), "validation": None}
    if folder in failed:
        return out | {"failed": failed[folder], "tokens": 0, "bytes": 0, "seconds": 0.0}
    r = records(folder)
    s = r.summary or {}
    return out | {
        "metric": r.metric,
        "validation": s.get("validation"),
        "tokens": sum(t.tokens for t in r.timings),
        "bytes": s.get("bytes", {}).get("total", 0),
        "seconds": s.get("seconds", 0.0),
    }


def _why(s: Setting, tried: Sequence[Mapping[str, Any]]) -> str:
    reasons = [t["failed"] for t in tried if "failed" in t]
    return reasons[0] if reasons else f"its {len(s.trials)} trials ended without one"


def lines(facts: Mapping[str, Any]) -> list[str]:
    """What was chosen, a line for each setting, and the cost of the search."""
    out = []
    for s in facts["settings"]:
        t = s["trials"][s["chosen"]]
        edge = (
            f"; {', '.join(k.rpartition('.')[2] for k in s['edges'])} at the edge of what was tried"
            if s["edges"]
            else ""
        )
        lost = sum("failed" in x for x in s["trials"])
        out.append(
            f"{s['setting']}: {fields(t['fields'])}, {t['metric']} {number(t['validation'])} on validation, best of {len(s['trials'])}"
            + (f", {lost} of which failed" if lost else "")
            + edge
        )
    every = {t["folder"]: t for s in facts["settings"] for t in s["trials"]}.values()
    out.append(
        f"the search took {count(sum(t['tokens'] for t in every))} tokens and {seconds(sum(t['seconds'] for t in every))}"
    )
    return out
