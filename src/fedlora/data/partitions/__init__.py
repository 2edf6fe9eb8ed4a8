"""The partitions, one short file each. A file put here is found: its name, with "-" for "_", is the kind in recipes.

NAMES are known without loading anything; PARTITIONS, from names to classes, is made when it is first asked for.
"""

from __future__ import annotations

from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..partition import Partition

    PARTITIONS: dict[str, type[Partition]]

NAMES: tuple[str, ...] = tuple(sorted(m.name.replace("_", "-") for m in iter_modules(__path__)))


def __getattr__(name: str) -> Any:
    if name != "PARTITIONS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ...registry import found
    from ..partition import Partition

    globals()[name] = kinds = found(__name__, __path__, Partition)  # type: ignore[type-abstract]
    assert set(kinds) == set(NAMES), f"a kind is called otherwise than its file: {sorted(kinds)}, {NAMES}"
    return kinds
