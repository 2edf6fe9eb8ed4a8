"""How a run looks in a terminal: progress bars, JSON lines, or nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..deploy.notes import Note
from ..federation.callbacks import Callback
from ..federation.records import EvalLine, Line, TrainLine
from ..units import size


class JsonLines(Callback):
    """Every record as one JSON object a line on standard output."""

    def __init__(self) -> None:
        self.out = sys.stdout

    def _say(self, line: dict[str, Any]) -> None:
        self.out.write(json.dumps(line) + "\n")
        self.out.flush()

    def start(self, name: str, done: int, rounds: int) -> None:
        self._say({"kind": "start", "name": name, "done": done, "rounds": rounds})

    def lowered(self, block: int, clients: int) -> None:
        self._say({"kind": "lowered", "block": block, "clients": clients})

    def record(self, line: Line) -> None:
        self._say(line.to_json())

    def end(self, summary: dict[str, Any]) -> None:
        self._say({"kind": "summary", **summary})


def now() -> str:
    """The time at the head of a log's line."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


class Log(Callback):
    """A line for each thing that happens in a run, for a log: rounds, scores and bytes, with their facts for machines."""

    def __init__(self, say: Callable[[str], None], metric: str):
        self.say, self.metric = say, metric
        self.total, self.loss, self.trained, self.refused = 0, float("nan"), 0, 0
        self.sent = {"up": 0, "down": 0}

    def start(self, name: str, done: int, rounds: int) -> None:
        self.total = rounds
        text = f"{name}: {rounds} rounds" + (f", going on after round {done}" if done else "")
        self.say(Note(text, "start", name=name, done=done, rounds=rounds))

    def round_start(self, round: int, clients: int) -> None:
        text = f"round {round} of {self.total}: waiting for {clients} client(s) to train"
        self.say(Note(text, "round start", round=round, clients=clients))

    def lowered(self, block: int, clients: int) -> None:
        text = f"a block of {clients} clients does not fit into memory; it goes on with {block}: set run.block={block}"
        self.say(Note(text, "lowered", block=block, clients=clients))

    def evaluating(self, round: int) -> None:
        self.say(Note(f"round {round} of {self.total}: evaluating", "evaluating", round=round))

    def record(self, line: Line) -> None:
        if isinstance(line, TrainLine):
            self.loss, self.refused = line.loss, len(line.refused)
            self.trained = len(line.clients) - self.refused
            self.sent = {d: line.sent(d) for d in ("up", "down")}
        if isinstance(line, EvalLine) and line.split in ("validation", "test"):
            value = line.mean.get(self.metric, float("nan"))
            text = f"round {line.round} of {self.total}: {line.view} {line.split} {self.metric} {value:.4f}"
            scores = {"view": line.view, "split": line.split, "scores": dict(line.mean)}
            self.say(Note(text, "score", round=line.round, metric=self.metric, value=value, **scores))

    def round_done(self, round: int, facts: dict[str, Any]) -> None:
        refused = f", {self.refused} refused or late" if self.refused else ""
        seconds = facts["train_seconds"] + facts["eval_seconds"]
        text = (
            f"round {round} of {self.total} done: {self.trained} client(s){refused}, loss {self.loss:.4f}, "
            f"{size(facts['bytes'])}, {seconds:.0f} s"
        )
        counts = {"accepted": self.trained, "refused": self.refused, "loss": self.loss, "seconds": seconds}
        sent = {f"bytes_{d}": n for d, n in self.sent.items()}
        self.say(Note(text, "round", round=round, rounds=self.total, **counts, **sent))

    def end(self, summary: dict[str, Any]) -> None:
        self.say(Note("all rounds are done", "done", metric=summary.get("metric"), test=summary.get("test")))


class Bars(Callback):
    """Two bars, rounds and clients, with loss, metric, bytes and time left."""

    def __init__(self, console: Console, metric: str):
        self.console, self.metric = console, metric
        self.facts = {"loss": float("nan"), "metric": float("nan"), "bytes": 0.0}
        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
            console=console, transient=not console.is_terminal,
        )  # fmt: skip
        self.round = 0  # that is being trained
        self.rounds: TaskID | None = None
        self.clients: TaskID | None = None

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def _note(self) -> str:
        f = self.facts
        parts = [f"loss {f['loss']:.3f}"] if f["loss"] == f["loss"] else []
        parts += [f"{self.metric} {f['metric']:.3f}"] if f["metric"] == f["metric"] else []
        return "  ".join([*parts, size(f["bytes"])])

    def start(self, name: str, done: int, rounds: int) -> None:
        self.rounds = self.progress.add_task("rounds ", total=rounds, completed=done, note=self._note())
        self.clients = self.progress.add_task("clients", total=None, note="")

    def resumed(self, sent: int) -> None:
        self.facts["bytes"] = sent
        if self.rounds is not None:
            self.progress.update(self.rounds, note=self._note())

    def steps_done(self, done: int, steps: int) -> None:
        if self.clients is not None:
            self.progress.update(self.clients, note=f"training, round {self.round}, step {done} of {steps}")

    def round_start(self, round: int, clients: int) -> None:
        self.round = round
        if self.clients is not None:
            self.progress.reset(self.clients, total=clients, note=f"training, round {round}")

    def clients_done(self, n: int) -> None:
        if self.clients is not None:
            self.progress.advance(self.clients, n)

    def lowered(self, block: int, clients: int) -> None:
        self.progress.console.print(
            f"[yellow]a block of {clients} clients does not fit into memory; it goes on with {block}: set run.block={block}"
        )

    def evaluating(self, round: int) -> None:
        if self.clients is not None:
            self.progress.update(self.clients, note=f"evaluating, round {round}")

    def record(self, line: Line) -> None:
        if isinstance(line, TrainLine):
            self.facts["loss"] = line.loss
            self.facts["bytes"] += line.sent("up") + line.sent("down")
            for client, why in line.refused.items():
                said = escape(f"round {line.round}: refused the upload of {client}: {why}")  # a site's own words
                self.progress.console.print(f"[yellow]{said}[/]")
        if isinstance(line, EvalLine) and line.view == "personal" and line.split in ("validation", "test"):
            value = line.mean.get(self.metric, float("nan"))
            if line.split == "validation" or self.facts["metric"] != self.facts["metric"]:
                self.facts["metric"] = value

    def round_done(self, round: int, facts: dict[str, Any]) -> None:
        if self.rounds is not None:
            self.progress.update(self.rounds, completed=round, note=self._note())
