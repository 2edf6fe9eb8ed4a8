"""The methods, one short file each. A file put here is found: METHODS maps the names in recipes to the classes."""

from __future__ import annotations

from ..method import Method
from ..registry import found

METHODS: dict[str, type[Method]] = found(__name__, __path__, Method)  # type: ignore[type-abstract]
