"""Where the clients of a federation are trained: in this process, or wherever a Runtime of another kind reaches them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ..methods.contract import Client, ServerState, Upload
from . import views
from .engine import Engine, RoundLog
from .records import Line
from .setting import Setting


class Runtime(Protocol):
    """What a federation asks of the place where its clients are. block: clients that are trained at once."""

    block: int

    def cohort(self, round: int) -> Sequence[Client]:
        """The clients of a round (0-based)."""

    def round(
        self, server: ServerState, rounds: int, cohort: Sequence[Client], see: Callable[[Upload], None]
    ) -> tuple[ServerState, RoundLog]:
        """Train `cohort` and aggregate; `see` looks at every accepted upload. Raises TrainingError if too few are."""

    def evaluate(self, server: ServerState) -> list[Line]:
        """Lines of metrics for every view and split that has rows."""


class InProcess:
    """Clients trained here, a block at a time over one frozen base."""

    def __init__(self, setting: Setting, engine: Engine):
        self.setting, self.engine = setting, engine
        self.block = engine.block

    def cohort(self, round: int) -> Sequence[Client]:
        """The clients that the setting samples for a round."""
        return self.setting.cohort(round)

    def round(
        self, server: ServerState, rounds: int, cohort: Sequence[Client], see: Callable[[Upload], None]
    ) -> tuple[ServerState, RoundLog]:
        """The engine's round."""
        return self.engine.round(server, rounds, cohort, see)

    def evaluate(self, server: ServerState) -> list[Line]:
        """All views, of models that are built here."""
        return views.evaluate(self.setting, self.engine, server)
