"""Ctrl-C and SIGTERM: the work in progress is dropped, and what is finished is kept."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from ..errors import FedloraError
from ..federation.callbacks import Callback
from .jobs import orphaned


class Pressed(Callback):
    """Raises KeyboardInterrupt on either signal, and remembers the signal in `stop`.

    A library may swallow the exception in a callback of its own. The run then still ends at the next round.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()

    def __enter__(self) -> Pressed:
        self.before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # Python lets only the main thread set handlers
            self.before = {s: signal.signal(s, self._press) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def _press(self, *_: object) -> None:
        self.stop.set()
        raise KeyboardInterrupt

    def round_start(self, round: int, clients: int) -> None:
        if self.stop.is_set() or orphaned():
            raise KeyboardInterrupt


class Interrupted(FedloraError):
    """The run was interrupted. The round in progress was dropped, and everything before it is on disk."""

    exit_code = 130

    def __init__(self, folder: Path, then: str = ""):
        super().__init__(
            "interrupted: the round at hand was dropped, earlier rounds are kept; go on with\n"
            f"  {then or f'fedlora resume {folder}'}"
        )
