"""Ctrl-C and SIGTERM: what is being done ends, and what is finished stays."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

from ..errors import FedloraError
from ..watch import Watch


class Pressed(Watch):
    """Raises KeyboardInterrupt on either signal, and remembers it in `stop`: one that a library swallows (in a callback of its
    own) still ends a run at the next round."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    def __enter__(self) -> Pressed:
        self.before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self.before = {s: signal.signal(s, self._press) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def _press(self, *_: object) -> None:
        self.stop.set()
        raise KeyboardInterrupt

    def round_start(self, round: int, clients: int) -> None:
        if self.stop.is_set():
            raise KeyboardInterrupt


class Interrupted(FedloraError):
    """The round at hand was dropped, everything before it is on disk."""

    exit_code = 130

    def __init__(self, folder: Path, then: str = ""):
        super().__init__(
            "interrupted: the round at hand was dropped, earlier rounds are kept; go on with\n"
            f"  {then or f'fedlora resume {folder}'}"
        )
