"""The lines of metrics.jsonl and timings.jsonl: what each kind holds, written and read here alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from ..errors import StateError
from ..files import sealed

Scores = dict[str, float]  # metric -> value, and "n", the rows that were scored


@dataclass(frozen=True)
class Line:
    """One line of metrics.jsonl. round: rounds done when it was written; stage: of a hand-over, None for a round's own."""

    kind: ClassVar[str]
    round: int

    def to_json(self) -> dict[str, Any]:
        """The line as it stands in the file; `extra` stands beside the fields."""
        out: dict[str, Any] = {"kind": self.kind} | {f.name: getattr(self, f.name) for f in fields(self)}
        extra = out.pop("extra", {})
        stage = out.pop("stage", None)
        return out | extra | ({} if stage is None else {"stage": stage})


@dataclass(frozen=True)
class TrainLine(Line):
    """A round of training.

    loss: mean over accepted clients, not a number where nobody was drawn or losses are withheld; losses, refused: by client;
    examples: rows behind the accepted uploads; bytes:
    direction -> adapter, head, framing; exactness: error of the mean's product, None where it was not measured; extra: what
    the method records (ranks by client).
    """

    kind: ClassVar[str] = "train"
    loss: float
    clients: list[str]
    losses: dict[str, float]
    examples: int
    refused: dict[str, str]
    bytes: dict[str, dict[str, int]]
    exactness: dict[str, float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def sent(self, direction: str) -> int:
        """All bytes "up" or "down"."""
        return sum(self.bytes[direction].values())


@dataclass(frozen=True)
class EvalLine(Line):
    """Scores of a view on a split: of each client, their mean, their mean by rows, and the mean of the worst tenth.

    missing: clients with rows in the split whose scores did not arrive; of: the clients of which these are a sample. Both
    are 0 and not written where nobody is missing, and where all clients are scored.
    """

    kind: ClassVar[str] = "eval"
    view: str
    split: str
    clients: dict[str, Scores]
    mean: Scores
    weighted: Scores
    worst_decile: Scores
    missing: int = 0
    of: int = 0
    stage: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The line as it stands in the file."""
        return {k: v for k, v in super().to_json().items() if k not in ("missing", "of") or v}


@dataclass(frozen=True)
class HandoverLine(Line):
    """A method has changed its stage after `round`. extra: what it records of that."""

    kind: ClassVar[str] = "handover"
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CrossLine(Line):
    """matrix[i][j]: client ids[i]'s model on client ids[j]'s rows of a split."""

    kind: ClassVar[str] = "cross"
    split: str
    metric: str
    ids: list[str]
    matrix: list[list[float]]
    stage: str | None = None


@dataclass(frozen=True)
class EffectiveRanksLine(Line):
    """clients: id -> layer -> singular values of the delta above `threshold` times the largest."""

    kind: ClassVar[str] = "effective-ranks"
    threshold: float
    clients: dict[str, dict[str, int]]
    stage: str | None = None


@dataclass(frozen=True)
class AsymmetryLine(Line):
    """sites: layer -> likeness of the clients' factors (analysis.asymmetry)."""

    kind: ClassVar[str] = "asymmetry"
    sites: dict[str, dict[str, float]]
    stage: str | None = None


@dataclass(frozen=True)
class SamplesLine(Line):
    """Generated texts. questions: each with its client, prompt and references; answers: client whose model it is -> one a question."""

    kind: ClassVar[str] = "samples"
    split: str
    questions: list[dict[str, Any]]
    answers: dict[str, list[str]]
    stage: str | None = None


KINDS: dict[str, type[Line]] = {
    c.kind: c for c in (TrainLine, EvalLine, HandoverLine, CrossLine, EffectiveRanksLine, AsymmetryLine, SamplesLine)
}


def parse(found: Mapping[str, Any]) -> Line:
    """Inverse of `to_json`. Raises StateError for a line that is none of ours."""
    try:
        cls = KINDS[found["kind"]]
        known = {f.name for f in fields(cls)}
        given = {k: v for k, v in found.items() if k in known}
        rest = {k: v for k, v in found.items() if k not in known and k != "kind"}
        return cls(**given | ({"extra": rest} if "extra" in known else {}))
    except (KeyError, TypeError) as e:
        raise StateError(f"line {json.dumps(found)[:80]} is no record of a run ({e})") from e


@dataclass(frozen=True)
class Timing:
    """A line of timings.jsonl: what a round took on the machine that ran it. It is no part of the result."""

    round: int
    train_seconds: float
    eval_seconds: float
    server_seconds: float
    tokens: int
    peak_memory_bytes: int
    steps: int = 0  # local ones of all clients; 0 where it is not known
    rows: int = 0  # in their minibatches

    def to_json(self) -> dict[str, Any]:
        """The line as it stands in the file."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def read_lines(folder: Path) -> list[Line]:
    """All whole lines of a run's metrics.jsonl; [] where there is none. One that is being written while we read is left out.

    Raises StateError for a line that is none of ours, and where the lines of committed rounds are not those that the newest
    server's state counts as its own.
    """
    sealed.verify_metrics(folder / "metrics.jsonl")
    return lines_in(folder)


def lines_in(folder: Path) -> list[Line]:
    """The same for a run that has just looked at its digests itself. Raises StateError for a line that is none of ours."""
    path = folder / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
        return [parse(json.loads(x)) for x in text[: text.rfind("\n") + 1].splitlines() if x]
    except FileNotFoundError:
        return []
    except ValueError as e:
        raise StateError(f"{path}: cannot be read ({e}); restore it") from e


def read_timings(folder: Path) -> list[Timing]:
    """The lines of a run's timings.jsonl; [] where there is none. A damaged line, and one that is being written, is left out:
    nothing but sums of seconds follows from them. Raises StateError for a whole line that is none of ours."""
    path = folder / "timings.jsonl"
    try:
        return [Timing(**x) for x in sealed.lines(path)[0]]
    except TypeError as e:
        raise StateError(f"{path}: holds a line that is none of ours ({e}); restore it") from e
