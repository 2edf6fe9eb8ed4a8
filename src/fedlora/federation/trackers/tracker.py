"""The contract of a tracker: a callback that writes a run's losses, scores and bytes where other software shows them.

What is written is said once, here; a tracker says how one number is written.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from ...errors import ConfigError, Problem
from ..callbacks import Callback
from ..records import EvalLine, Line, TrainLine


class Tracker(Callback):
    """Made with (folder of the tracker in the run folder, rounds that are committed already, the run's name, its resolved recipe)."""

    name: ClassVar[str]  # in recipes: run.trackers
    packages: ClassVar[tuple[str, ...]]  # modules that it needs

    def __init__(self, folder: Path, done: int, title: str, recipe: Mapping[str, Any]):
        self.sent = 0

    @abstractmethod
    def say(self, tag: str, value: float, round: int) -> None:
        """Write one number. tag: such as "personal_test/accuracy_mean"; round: rounds done."""

    def flush(self) -> None:
        """A round is over: what was said should be on the disk."""

    @classmethod
    def check(cls, field: str) -> None:
        """Raise ConfigError where a package that it needs is not installed. field: of the recipe."""
        lacking = [p for p in cls.packages if find_spec(p) is None]
        if lacking:
            what = f"the package {' and '.join(lacking)}"
            raise ConfigError([Problem(field, cls.name, what, "pip install 'fedlora[trackers]'")])

    def record(self, line: Line) -> None:
        if isinstance(line, TrainLine):
            self.sent += line.sent("up") + line.sent("down")
            self.say("train/loss", line.loss, line.round)
            self.say("sent/bytes_since_start", self.sent, line.round)
        if isinstance(line, EvalLine):
            for summary in ("mean", "worst_decile"):
                for metric, value in getattr(line, summary).items():
                    self.say(f"{line.view}_{line.split}/{metric}_{summary}", value, line.round)

    def round_done(self, round: int, facts: dict[str, Any]) -> None:
        self.say("seconds/train", facts["train_seconds"], round)
        self.flush()


def flat(recipe: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A recipe's fields by their dotted names."""
    out: dict[str, Any] = {}
    for key, value in recipe.items():
        out |= flat(value, f"{before}{key}.") if isinstance(value, Mapping) and value else {f"{before}{key}": value}
    return out
