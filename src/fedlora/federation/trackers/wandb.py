"""Weights & Biases, offline: files in the run folder, and nothing goes over the network until `wandb sync` sends them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .tracker import Tracker, flat


class WandB(Tracker):
    """One offline run in `folder`; a resumed run writes another one."""

    name: ClassVar[str] = "wandb"
    packages: ClassVar[tuple[str, ...]] = ("wandb",)

    def __init__(self, folder: Path, done: int, title: str, recipe: Mapping[str, Any]):
        import wandb

        super().__init__(folder, done, title, recipe)
        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True,
            x_disable_machine_info=True,
        )  # fmt: skip
        self.run = wandb.init(
            mode="offline", dir=str(folder), project="fedlora", name=title, config=flat(recipe), settings=settings
        )

    def say(self, tag: str, value: float, round: int) -> None:
        self.run.log({tag: value}, step=round, commit=False)  # numbers of one round are one step

    def end(self, summary: dict[str, Any]) -> None:
        self.run.finish()
