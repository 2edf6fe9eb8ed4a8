"""What `fedlora ls` does, and which folders are a run's or a sweep's."""

from __future__ import annotations

import json as json_
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..errors import FedloraError, StateError, printable
from ..files import sealed
from ..report.read import is_run as is_run
from ..report.read import runs_in as runs_in
from ..units import NOTHING, number, seconds
from .tables import _table


def facts(folder: Path) -> dict[str, Any]:
    """A run's state, score and age. `state` is "done", "unfinished" or "damaged"; a damaged run says why."""
    from ..report.read import records

    newest = max((p.stat().st_mtime for p in folder.iterdir() if p.is_file()), default=folder.stat().st_mtime)
    found: dict[str, Any] = {"folder": str(folder), "age_seconds": time.time() - newest}
    try:
        r = records(folder)
    except (FedloraError, ValueError, KeyError, TypeError) as e:
        return found | {"state": "damaged", "why": str(e)}
    s = r.summary or {}
    spent = sealed.read(folder / "privacy.json")
    rounds = s.get("rounds") or r.recipe.get("federation", {}).get("rounds")
    done = s["rounds"] if s else max((x.round for x in r.lines), default=0)
    return found | {
        "state": "done" if s else "unfinished",
        "name": r.name,
        "method": r.recipe.get("method", {}).get("name") or r.title,
        "round": done,
        "rounds": rounds,
        "metric": r.metric if s else None,
        "score": s.get("test"),
        "privacy": spent and {k: spent[k] for k in ("epsilon", "delta", "budget")},
    }


def ls(folder: Path, json: bool, out: Console) -> None:
    """Every run below a folder, the newest last. Raises StateError for a folder that is not there or holds none."""
    if not folder.is_dir():
        raise StateError(f"{folder}: no such folder; give one that holds runs, or start in the folder that holds runs/")
    found = sorted((facts(r) for r in runs_in(folder)), key=lambda f: -f["age_seconds"])
    if json:
        for f in found:
            sys.stdout.write(json_.dumps(f) + "\n")
        return
    if not found:
        raise StateError(f"{folder}: no run folder here or below; fedlora run writes one")
    show(out, found, folder)


def _epsilon(spent: dict[str, Any] | None) -> str:
    if not spent:
        return NOTHING
    budget = f" of {spent['budget']:g}" if spent["budget"] is not None else ""
    return "inf" if spent["epsilon"] is None else f"{spent['epsilon']:.3g}{budget}"


def show(out: Console, found: Sequence[dict[str, Any]], root: Path) -> None:
    """One row a run; a damaged one says why below."""
    private = any(f.get("privacy") for f in found)
    table = _table("", "run", "method", "state", "round", "score", *(["epsilon"] if private else []), "age")
    for f in found:
        path = Path(f["folder"])
        name = str(path.relative_to(root)) if path != root else path.name
        score = NOTHING if f.get("score") is None else f"{f['metric']} {number(f['score'])}"
        colour = {"done": "green", "unfinished": "yellow"}.get(f["state"], "red")
        table.add_row(
            Text(printable(name)),
            Text(printable(f.get("method", NOTHING))),
            Text(f["state"], style=colour),
            f"{f['round']}/{f['rounds']}" if f.get("rounds") else NOTHING,
            score,
            *([_epsilon(f.get("privacy"))] if private else []),
            NOTHING
            if f["age_seconds"] is None
            else seconds(f["age_seconds"])
            if f["age_seconds"] < 2 * 86400
            else f"{f['age_seconds'] / 86400:.0f} d",
        )
    for column in table.columns[2:]:
        column.no_wrap = True
    for column in table.columns[:2]:
        column.justify, column.overflow = "left", "fold"
    out.print(table)
    for f in found:
        if f["state"] == "damaged":
            out.print(Text(printable(f["why"])), soft_wrap=True)
