"""A run folder as a reader sees it: plain JSON, no torch. A run that is still going can be read as well."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import sealed
from ..errors import StateError
from ..metrics import LOWER_IS_BETTER

Line = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """Everything a run has written down."""

    folder: Path
    recipe: dict[str, Any]  # resolved; empty for a run made by hand
    hash: str
    environment: dict[str, Any]
    partition: dict[str, Any]
    summary: dict[str, Any] | None  # None while the run is unfinished
    lines: list[Line]  # metrics.jsonl
    timings: list[Line]

    @cached_property
    def metric(self) -> str:
        """The metric by which rounds are chosen."""
        if self.summary:
            return str(self.summary["metric"])
        for x in self.evals():
            return next((m for m in ("accuracy", "pearson") if m in x["mean"]), "loss")
        return "loss"

    @property
    def lower_is_better(self) -> bool:
        return self.metric in LOWER_IS_BETTER

    @property
    def title(self) -> str:
        return (
            str(self.summary["method"]["title"])
            if self.summary
            else str(self.recipe.get("method", {}).get("name", "run"))
        )

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or (self.summary or {}).get("name") or self.folder.name)

    @property
    def main(self) -> str:
        """The view that is reported first: personal models where there are any."""
        return "personal" if any(x["view"] == "personal" for x in self.evals()) else "global"

    @property
    def trains(self) -> list[Line]:
        return [x for x in self.lines if x["kind"] == "train"]

    def evals(self, view: str | None = None, split: str | None = None) -> list[Line]:
        """Evaluations in the order of rounds; that of a round's hand-over is left out."""
        return [
            x
            for x in self.lines
            if x["kind"] == "eval" and "stage" not in x and view in (None, x["view"]) and split in (None, x["split"])
        ]

    def at(self, view: str, split: str, round: int) -> Line | None:
        return next((x for x in self.evals(view, split) if x["round"] == round), None)

    @property
    def chosen(self) -> int | None:
        """The round chosen on validation; the last one of an unfinished run."""
        if self.summary:
            found: int | None = self.summary["chosen_round"]
            return found
        evals = self.evals()
        return evals[-1]["round"] if evals else None

    def bytes_by_round(self) -> dict[int, int]:
        """Bytes sent both ways up to each round, 0 at round 0."""
        out, total = {0: 0}, 0
        for x in self.trains:
            total += sum(sum(d.values()) for d in x["bytes"].values())
            out[x["round"]] = total
        return out


def records(folder: str | Path) -> Records:
    """Read a run folder. Raises StateError for a folder that holds no run."""
    folder = Path(folder)
    about = sealed.read(folder / "recipe.json")
    if about is None:
        raise StateError(f"{folder}: no recipe.json, so this is no run folder; give one that `fedlora run` wrote")
    return Records(
        folder=folder,
        recipe=about.get("recipe", {}),
        hash=about.get("hash", ""),
        environment=sealed.read(folder / "environment.json") or {},
        partition=sealed.read(folder / "partition.json") or {},
        summary=sealed.read(folder / "summary.json"),
        lines=metrics(folder),
        timings=sealed.lines(folder / "timings.jsonl")[0],
    )


def metrics(folder: Path) -> list[Line]:
    """The lines of metrics.jsonl that are whole: one that is being written while we read is left out.

    Raises StateError where the lines of committed rounds are not those that the newest server's state counts as its own.
    """
    path = folder / "metrics.jsonl"
    states = sorted((folder / "server").glob("*.safetensors"), reverse=True)
    headers = (sealed.header_of(p) for p in states)
    newest = next((h for h in headers if h is not None), None)
    if newest is not None and "metrics_bytes" in newest:
        sealed.check_metrics(path, newest)
    try:
        text = path.read_text(encoding="utf-8")
        return [json.loads(x) for x in text[: text.rfind("\n") + 1].splitlines()]
    except FileNotFoundError:
        return []
    except ValueError as e:
        raise StateError(f"{path}: cannot be read ({e}); restore it") from e
