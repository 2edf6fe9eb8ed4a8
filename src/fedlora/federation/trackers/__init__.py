"""Trackers, one file each. A file put here is found: TRACKERS maps the names in recipes to the classes."""

from __future__ import annotations

from ...registry import found
from .tracker import Tracker

TRACKERS: dict[str, type[Tracker]] = found(__name__, __path__, Tracker)  # type: ignore[type-abstract]
NAMES = tuple(TRACKERS)
