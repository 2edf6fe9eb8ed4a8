"""A sweep's folder: which runs belong to it, so that it can be gone on with, reported and looked at as a whole."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StateError
from ..files import sealed
from ..recipe.sweep import FILE
from ..units import seconds
from . import listing

if TYPE_CHECKING:
    from ..recipe import Recipe


def is_sweep(folder: Path) -> bool:
    """Whether a sweep has written into this folder."""
    return (folder / FILE).is_file()


def searched(folder: Path) -> dict[str, Any] | None:
    """What makes the plan of a sweep's search anew; None for a sweep without one."""
    found = sealed.read(folder / FILE)
    return None if found is None else found.get("search")


def runs(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The folder of every run of a sweep, and its recipe as it was written. Raises StateError for a damaged list."""
    found = sealed.read(folder / FILE)
    try:
        assert found is not None
        return [(folder / r["folder"], r["recipe"]) for r in found["runs"]]
    except (AssertionError, KeyError, TypeError) as e:
        raise StateError(f"{folder / FILE}: is no list of runs any more; resume each run's folder instead") from e


def recipes(folder: Path) -> tuple[list[Recipe], list[Path]]:
    """The recipes of a sweep and their folders; those of runs that have begun are read from there."""
    from ..recipe import Recipe, places

    found = runs(folder)
    every = [places.located(places.recipe_in(f), f) if listing.is_run(f) else Recipe.from_dict(raw) for f, raw in found]
    return every, [f for f, _ in found]


def finished(folder: Path) -> bool:
    """Whether a run is at its end."""
    return listing.is_run(folder) and listing.facts(folder)["state"] == "done"


def headings(names: Sequence[str]) -> Iterator[str]:
    """A line before each run: which of how many, and how long the others take if they are like those before."""
    start = time.monotonic()
    for i, name in enumerate(names):
        left = (time.monotonic() - start) / i * (len(names) - i) if i else None
        yield f"{i + 1}/{len(names)} {name}" + (f", about {seconds(left)} left for the sweep" if left else "")


def facts(folder: Path) -> list[dict[str, Any]]:
    """`listing.facts` of every run of a sweep; those that have not begun are "waiting"."""
    out = []
    for f, raw in runs(folder):
        method = raw.get("method")
        name = method.get("name") if isinstance(method, dict) else method
        waiting = {"folder": str(f), "state": "waiting", "age_seconds": None, "method": str(name)}
        out.append(listing.facts(f) if listing.is_run(f) else waiting)
    return out
