"""Errors that say who, what came, what was expected and what to do.

FedloraError
  x ConfigError    a recipe or an argument is wrong; holds every problem found, not only the first
  x DataError      a file, column, label or client is not usable
  x ModelError     a model, layer or target does not fit
  x StateError     a run folder is damaged, foreign or full
  x UploadError    a client's upload was refused
  x TrainingError  training cannot go on (non-finite loss everywhere, too few clients)
  x BudgetError    a round would spend more privacy than the run may
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar


class FedloraError(Exception):
    """Base of all errors a user can cause and mend; the command line prints them without a traceback."""

    exit_code: ClassVar[int] = 1


class DataError(FedloraError):
    """A file, column, label or client is not usable."""


class ModelError(FedloraError):
    """A model, layer or target does not fit."""


class StateError(FedloraError):
    """A run folder is damaged, belongs to another recipe, or cannot be written."""


class UploadError(FedloraError):
    """A client's upload was refused; the round goes on without it."""


class TrainingError(FedloraError):
    """Training cannot go on."""


class BudgetError(FedloraError):
    """A round would spend more privacy than the run may; it was not trained."""


TOLD = "(see text)"  # `got` of a problem whose text already says everything


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration."""

    field: str  # dotted path in the recipe, e.g. "method.rank"
    got: Any
    expected: str
    remedy: str = ""

    @classmethod
    def told(cls, field: str, e: FedloraError) -> Problem:
        """What another error says, which names its field where it knows a nearer one than `field`."""
        named = re.match(r"((?:model|data|partition|method|train|federation|evaluation|run)(?:\.[a-z_]+)*): ", str(e))
        return cls(named[1] if named else field, TOLD, str(e)[named.end() if named else 0 :])

    def __str__(self) -> str:
        got = "" if self.got is TOLD else f"got {self.got!r}, expected "
        text = f"{self.field}: {got}{self.expected}"
        return f"{text}; {self.remedy}" if self.remedy else text


class ConfigError(FedloraError):
    """All problems of a configuration at once, each of them once."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple({str(p): p for p in problems}.values())
        lines = "\n".join(f"  - {p}" for p in self.problems)
        count = len(self.problems)
        super().__init__(f"{count} problem{'s' * (count != 1)} in the configuration:\n{lines}")


def printable(text: object, most: int = 2000) -> str:
    """What somebody else has sent, safe to print: one line, at most `most` characters, and what is no printable character
    (escape sequences, line breaks, marks that turn the writing around) written out as Python does."""
    said = str(text)
    cut = said if len(said) <= most else said[: most - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def near(name: str, known: Iterable[str], n: int = 3) -> str:
    """A remedy that lists the near misses: "did you mean 'query', 'key'?" or what exists at all."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(str(name), known, n=n, cutoff=0.5)
    if close:
        return "did you mean " + ", ".join(repr(c) for c in close) + "?"
    shown = ", ".join(repr(k) for k in known[:8]) + (", ..." if len(known) > 8 else "")
    return f"available: {shown}" if known else "none are available"
