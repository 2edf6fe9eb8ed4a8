"""The methods, one short file each. A file put here is found: METHODS maps the names in recipes to the classes."""

from __future__ import annotations

from ..registry import found
from .contract import Method

METHODS: dict[str, type[Method]] = found(__name__, __path__, Method)  # type: ignore[type-abstract]
