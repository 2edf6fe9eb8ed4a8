"""TensorBoard events beside the run's own records, for those who watch many runs there."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Problem
from .callbacks import Callback
from .records import EvalLine, Line, TrainLine


def check() -> None:
    """Raises ConfigError where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise ConfigError(
            [Problem("run.tensorboard", True, "the package tensorboard", "pip install 'fedlora[trackers]'")]
        )


class TensorBoard(Callback):
    """Writes losses, scores and bytes to event files in `folder`. done: rounds that are committed already."""

    def __init__(self, folder: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        # Steps after `done` belong to rounds that were dropped and come again.
        self.writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)
        self.sent = 0

    def _say(self, tag: str, value: float, round: int) -> None:
        self.writer.add_scalar(tag, value, round)

    def record(self, line: Line) -> None:
        if isinstance(line, TrainLine):
            self.sent += line.sent("up") + line.sent("down")
            self._say("train/loss", line.loss, line.round)
            self._say("sent/bytes_since_start", self.sent, line.round)
        if isinstance(line, EvalLine):
            for summary in ("mean", "worst_decile"):
                for metric, value in getattr(line, summary).items():
                    self._say(f"{line.view}_{line.split}/{metric}_{summary}", value, line.round)

    def round_done(self, round: int, facts: dict[str, Any]) -> None:
        self._say("seconds/train", facts["train_seconds"], round)
        self.writer.flush()

    def end(self, summary: dict[str, Any]) -> None:
        self.writer.close()
