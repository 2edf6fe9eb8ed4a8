"""Where a server's log goes: standard error and a file, as text or as JSON lines."""

from __future__ import annotations

import datetime as dt
import json
import math
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from ..deploy.notes import Note
from ..errors import ConfigError, Problem, printable
from .progress import now

Say = Callable[[str], None]


class LogFormat(StrEnum):
    """How a line of the log is written."""

    text = "text"
    json = "json"


def line(text: str, format: LogFormat) -> str:
    """A line of the log: the time and the text, or one JSON object with time (UTC), event, text and the event's facts.

    What others have sent may stand in it, so nothing in it is a control character.
    """
    if format is LogFormat.json:
        event, facts = (text.event, text.facts) if isinstance(text, Note) else ("note", {})
        time = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
        return json.dumps({"time": time, "event": event, "text": str(text)} | _finite(facts), allow_nan=False)
    first, *more = (printable(x, 10**6) for x in text.split("\n"))
    return "\n".join([f"{now()} {first}", *more])


def _finite(facts: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: such a number is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}


def into(file: Path, format: LogFormat, warn: Say) -> Say:
    """Adds lines to a file. It is opened for each line, so that it can be moved away while the server runs; a line that cannot be
    written is lost, which is said once. Raises ConfigError where the file cannot be written at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a", encoding="utf-8").close()
    except OSError as e:
        raise ConfigError([Problem("--log-file", str(file), f"a file that can be written ({e.strerror})")]) from e
    lost: list[str] = []

    def say(text: str) -> None:
        try:
            with file.open("a", encoding="utf-8") as f:
                f.write(line(text, format) + "\n")
        except OSError as e:
            if not lost:
                warn(f"{file}: cannot be written ({e.strerror}); lines of the log are lost")
            lost.append(text)

    return say


def errors(format: LogFormat) -> Say:
    """Lines on standard error."""

    def say(text: str) -> None:
        sys.stderr.write(line(text, format) + "\n")
        sys.stderr.flush()

    return say


def all_of(*says: Say) -> Say:
    """One function that tells each of several."""

    def say(text: str) -> None:
        for s in says:
            s(text)

    return say
