"""The guards, one short file each. A file put here is found: GUARDS maps the names in recipes to the classes."""

from __future__ import annotations

from ...registry import found
from .guard import Guard

GUARDS: dict[str, type[Guard]] = found(__name__, __path__, Guard)
