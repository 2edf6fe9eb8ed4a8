"""Numbers as people read and write them; a dash for what was not measured. Commands, pages and recipes share them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTHING = "–"


def number(x: Any, digits: int = 3) -> str:
    """A score."""
    return NOTHING if x is None or x != x else f"{x:.{digits}f}"


def count(n: float | None) -> str:
    """Parameters, in thousands or millions."""
    if n is None:
        return NOTHING
    return f"{n:.0f}" if n < 1000 else f"{n / 1e3:.0f} k" if n < 1e6 else f"{n / 1e6:.1f} M"


def size(n: float | None) -> str:
    """Bytes: 1.2 MB."""
    if n is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def seconds(s: float | None) -> str:
    """A time: 0.3 s, 85 s, 2.5 min, 3.1 h."""
    if s is None:
        return NOTHING
    if 0 < s < 0.95:
        return f"{s:.1g} s"
    return f"{s:.0f} s" if s < 120 else f"{s / 60:.1f} min" if s < 5400 else f"{s / 3600:.1f} h"


def fields(choice: Mapping[str, Any]) -> str:
    """Fields of a recipe and their values: "lr 0.001, rank 4"."""
    return ", ".join(
        f"{path.rpartition('.')[2]} {v:g}" if isinstance(v, float) else f"{path.rpartition('.')[2]} {v}"
        for path, v in choice.items()
    )


def counted(c: float | None, n: int) -> int:
    """A count as it is, a share in (0, 1] as the nearest whole number of n things, at least 1, and None as all n."""
    if c is None:
        return n
    return max(1, round(c * n)) if isinstance(c, float) and 0 < c <= 1 else int(c)
