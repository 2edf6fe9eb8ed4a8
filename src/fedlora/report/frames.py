"""Finished and unfinished runs as tables of pandas, for notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StateError, near
from ..federation.outcome import pandas_
from . import budgets
from .budgets import Quantity
from .read import Records, records, runs_in
from .tables import compare_rows, differing, flat

if TYPE_CHECKING:
    import pandas


def results(folders: Sequence[str | Path]) -> pandas.DataFrame:
    """One row for each run at or below the folders and each view of it; an unfinished run is one row without scores.

    folder, name, method, seed, state ("done" or "unfinished"), view, chosen_round; every metric: its mean over clients on test
    at the chosen round, and for the run's own metric weighted and worst_decile; rounds, trainable, bytes_up, bytes_down, seconds;
    and every field of the recipe in which the runs differ, by its path. Raises StateError where there is no run, and MissingPandas.
    """
    table = pandas_()
    runs = [records(f) for f in found(folders)]
    plain = [flat(r.recipe) for r in runs]
    differ = [k for k in differing(plain) if k not in ("name", "run.seed", "run.output", "method.name")]
    rows = [row | {k: p.get(k) for k in differ} for r, p in zip(runs, plain, strict=True) for row in _rows(r)]
    return table.DataFrame(rows)


def comparison(folders: Sequence[str | Path], equal: Quantity | None = None) -> pandas.DataFrame:
    """The table of `fedlora compare`: one row for each setting, its seeds together. Raises StateError and MissingPandas."""
    runs = [records(f) for f in found(folders)]
    return pandas_().DataFrame(compare_rows(runs if equal is None else budgets.equal(runs, equal)[0]))


def found(folders: Sequence[str | Path]) -> list[Path]:
    """The run folders at or below each of the folders. Raises StateError for a folder that is not there or holds none."""
    out: list[Path] = []
    for f in map(Path, folders):
        if not f.is_dir():
            around = [p.name for p in f.parent.iterdir()] if f.parent.is_dir() else []
            raise StateError(f"{f}: no such folder; {near(f.name, around)}")
        inside = runs_in(f)
        if not inside:
            raise StateError(f"{f}: no run folder here or below; give folders that fl.run or fedlora run wrote")
        out += [x for x in inside if x not in out]
    return out


def _rows(r: Records) -> list[dict[str, Any]]:
    s = r.summary
    method = r.recipe.get("method", {}).get("name") or (s or {}).get("method", {}).get("name")
    seed = s["seed"] if s else r.recipe.get("run", {}).get("seed")
    about = {"folder": str(r.folder), "name": r.name, "method": method, "seed": seed}
    if s is None:
        return [about | {"state": "unfinished", "rounds": max((x.round for x in r.lines), default=0)}]
    costs = {
        "rounds": s["rounds"], "trainable": s["parameters"]["trainable"], "bytes_up": s["bytes"]["up"],
        "bytes_down": s["bytes"]["down"], "seconds": s["seconds"],
    }  # fmt: skip
    own = s["metric"]
    return [
        about
        | {"state": "done", "view": view, "metric": own, "chosen_round": s["chosen_round"]}
        | dict(v["mean"])
        | {"weighted": v["weighted"].get(own), "worst_decile": v["worst_decile"].get(own)}
        | costs
        for view, v in (s["views"] or {"": {"mean": {}, "weighted": {}, "worst_decile": {}}}).items()
    ]
