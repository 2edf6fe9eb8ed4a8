"""The partitions, one short file each. A file put here is found: PARTITIONS maps the kinds in recipes to the classes."""

from __future__ import annotations

from ...registry import found
from .partition import Given, Partition

PARTITIONS: dict[str, type[Partition]] = found(__name__, __path__, Partition)  # type: ignore[type-abstract]
NAMES: tuple[str, ...] = tuple(sorted(PARTITIONS))

__all__ = ["NAMES", "PARTITIONS", "Given", "Partition"]
