"""TensorBoard events: `tensorboard --logdir RUN/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .tracker import Tracker


class TensorBoard(Tracker):
    """Event files in `folder`."""

    name: ClassVar[str] = "tensorboard"
    packages: ClassVar[tuple[str, ...]] = ("tensorboard",)

    def __init__(self, folder: Path, done: int, title: str, recipe: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        super().__init__(folder, done, title, recipe)
        # Steps after `done` belong to rounds that were dropped and come again.
        self.writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def say(self, tag: str, value: float, round: int) -> None:
        self.writer.add_scalar(tag, value, round)

    def flush(self) -> None:
        self.writer.flush()

    def end(self, summary: dict[str, Any]) -> None:
        self.writer.close()
