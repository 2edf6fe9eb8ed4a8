"""Where the clients of a federation are trained: in this process, or wherever a Runtime of another kind reaches them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from . import views
from .method import Client, Server, Upload

if TYPE_CHECKING:
    from .engine import RoundLog
    from .federation import Federation
    from .watch import Watch


class Runtime(Protocol):
    """What a federation asks of the place where its clients are. block: clients that are trained at once."""

    block: int

    def cohort(self, round: int) -> Sequence[Client]:
        """The clients of a round (0-based)."""

    def round(
        self, server: Server, rounds: int, cohort: Sequence[Client], see: Callable[[Upload], None]
    ) -> tuple[Server, RoundLog]:
        """Train `cohort` and aggregate; `see` looks at every accepted upload. Raises TrainingError if too few are."""

    def evaluate(self, server: Server) -> list[dict[str, Any]]:
        """Lines of metrics for every view and split that has rows."""


class InProcess:
    """Clients trained here, a block at a time over one frozen base."""

    def __init__(self, fed: Federation, watch: Watch):
        self.fed, self.engine = fed, fed.engine(watch)
        self.block = self.engine.block

    def cohort(self, round: int) -> Sequence[Client]:
        return self.fed.cohort(round)

    def round(
        self, server: Server, rounds: int, cohort: Sequence[Client], see: Callable[[Upload], None]
    ) -> tuple[Server, RoundLog]:
        return self.engine.round(server, rounds, cohort, see)

    def evaluate(self, server: Server) -> list[dict[str, Any]]:
        return views.evaluate(self.fed, self.engine, server)
