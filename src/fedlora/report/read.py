"""A run folder as a reader sees it: plain JSON, no torch. A run that is still going can be read as well."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import StateError
from ..federation.records import EvalLine, Line, Timing, TrainLine, read_lines, read_timings
from ..files import sealed


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
    timings: list[Timing]
    inputs: dict[str, str] = field(default_factory=dict)  # digests of the data and of the base's weights

    @cached_property
    def metric(self) -> str:
        """The metric by which rounds are chosen."""
        if self.summary:
            return str(self.summary["metric"])
        for x in self.evals():
            return next((m for m in ("accuracy", "pearson") if m in x.mean), "loss")
        return "loss"

    @property
    def lower_is_better(self) -> bool:
        from ..training.tasks import lower_is_better

        return lower_is_better(self.metric)

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
        return "personal" if any(x.view == "personal" for x in self.evals()) else "global"

    @property
    def trains(self) -> list[TrainLine]:
        """Rounds of training, in their order."""
        return [x for x in self.lines if isinstance(x, TrainLine)]

    def evals(self, view: str | None = None, split: str | None = None) -> list[EvalLine]:
        """Evaluations in the order of rounds; that of a round's hand-over is left out."""
        found = [x for x in self.lines if isinstance(x, EvalLine) and x.stage is None]
        return [x for x in found if view in (None, x.view) and split in (None, x.split)]

    def at(self, view: str, split: str, round: int) -> EvalLine | None:
        """The evaluation of a view on a split after a round."""
        return next((x for x in self.evals(view, split) if x.round == round), None)

    @property
    def chosen(self) -> int | None:
        """The round chosen on validation; the last one of an unfinished run."""
        if self.summary:
            found: int | None = self.summary["chosen_round"]
            return found
        evals = self.evals()
        return evals[-1].round if evals else None

    def bytes_by_round(self) -> dict[int, int]:
        """Bytes sent both ways up to each round, 0 at round 0."""
        out, total = {0: 0}, 0
        for x in self.trains:
            total += x.sent("up") + x.sent("down")
            out[x.round] = total
        return out


def is_run(folder: Path) -> bool:
    """Whether a run has written into this folder."""
    return (folder / "recipe.json").is_file() or (folder / "recipe.yaml").is_file()


def runs_in(folder: Path, deep: int = 3) -> list[Path]:
    """The run folders here and below, `deep` levels down, in the order of their paths. Links are not followed."""
    if is_run(folder):
        return [folder]
    if deep == 0:
        return []
    below = (p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith("."))
    return [r for p in sorted(below) for r in runs_in(p, deep - 1)]


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
        lines=read_lines(folder),
        timings=read_timings(folder),
        inputs=about.get("inputs", {}),
    )
