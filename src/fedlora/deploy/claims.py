"""What sites claim, and how much of it a server believes.

A claim cannot be proved: a site may say that it has more rows than it has. But it can be kept within what is possible and
within what the same site has said before, its effect can be bounded, and whoever stands far from all others is named.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import TrainingError, UploadError
from ..federation.wire import finite_state, magnitude
from ..methods.contract import Method, ServerState, Upload
from ..training.metrics import RANGE, Scores
from ..tree import Params, select
from .schema import LARGEST, PacketError, parsed, shown
from .schema import Scores as Claimed

FAR = 1e3  # times the usual norm of an upload: no local training of a round goes that far from where the others end
ODD = 100.0  # an upload this many times larger than the median is named in the log, but used
SLACK = 1e-3  # of a score: sums in float32 are not exact


# leaves ------------------------------------------------------------------------------------------------------------
def distant(uploads: Sequence[Upload], sent: Params) -> dict[str, str]:
    """Client id -> why its upload is refused: its norm is FAR times that of the median upload and of what the server holds.

    One upload of 1e30 leaves a mean that is finite, and with which no client can train any more. Refused are only those that
    no honest round produces; the median is honest while most uploads are. sent: the server's own leaves.
    """
    norms = {u.client.id: magnitude(u.params) for u in uploads}
    usual = max(statistics.median_low(norms.values()), magnitude(_uploaded(sent, uploads)), 1.0)
    return {
        c: f"its norm {n:.3g} is far from that of the others, expected at most {FAR * usual:.3g}"
        for c, n in norms.items()
        if not n <= FAR * usual
    }


def bound(norm_bound: float | None, server: ServerState, uploads: Sequence[Upload]) -> float | None:
    """The largest norm that the aggregate of uploads within `norm_bound` can have; a component that nobody uploads keeps the
    server's value."""
    return None if norm_bound is None else 2 * max(norm_bound, magnitude(_uploaded(server.params, uploads)))


def aggregated(
    aggregate: Callable[[Sequence[Upload]], ServerState],
    uploads: Sequence[Upload],
    least: int,
    most: float | None = None,
) -> tuple[ServerState, list[Upload], dict[str, str]]:
    """The next server, the uploads it is made of, and client id -> why its upload was left out.

    Where the aggregate may not be committed, the upload of the largest norm is left out and the rest are aggregated again.
    most: largest norm of the uploaded leaves in the aggregate. Raises TrainingError when fewer than `least` are left, so that
    a bad state is never committed.
    """
    kept = list(uploads)
    left: dict[str, str] = {}
    while True:
        why: str | None
        try:
            new = aggregate(kept)
            why = finite_state(new.leaves) or finite_state(_uploaded(new.params, kept), most)
        except (RuntimeError, ValueError, ArithmeticError) as e:  # the SVD fails on values that are not finite
            why = f"the uploads cannot be aggregated ({type(e).__name__})"
        if why is None:
            return new, kept, left
        largest = max(kept, key=lambda u: _order(magnitude(u.params)))
        left[largest.client.id] = f"{why}; this upload is the largest, of norm {magnitude(largest.params):.3g}"
        kept = [u for u in kept if u is not largest]
        if len(kept) < max(least, 1):
            raise TrainingError(
                f"{why}, and {len(kept)} uploads are left, expected at least {least} (federation.min_clients); set "
                "federation.norm_bound, or look at who sends what. The round was dropped; earlier rounds are kept"
            )


def _uploaded(params: Params, uploads: Sequence[Upload]) -> Params:
    """The leaves that uploads hold, too."""
    keys = {k for u in uploads for k in u.params}
    return select(params, lambda k: k in keys)


def _order(n: float) -> float:
    return math.inf if math.isnan(n) else n


# numbers -----------------------------------------------------------------------------------------------------------
def odd(claims: Mapping[str, float], what: str) -> list[str]:
    """Sentences on clients whose claim is ODD times the median of at least three: believed, and said to whoever watches."""
    claims = {c: v for c, v in claims.items() if math.isfinite(v)}  # a loss may stay at its site
    if len(claims) < 3:
        return []
    median = statistics.median_low(claims.values())
    total = sum(claims.values())
    return [
        f"{c} claims {what} {v:.6g}, {v / median:.0f} times the median; its share is {v / total:.0%}"
        for c, v in claims.items()
        if median > 0 and v > ODD * median
    ]


def odd_uploads(method: Method, uploads: Sequence[Upload]) -> list[str]:
    """Sentences on uploads whose loss, norm or weight stands far from all others'."""
    weight = getattr(method, "weight", None)
    found: dict[str, dict[str, float]] = {
        # A site may keep its losses.
        "a loss of": {u.client.id: abs(n) for u in uploads if math.isfinite(n := u.metrics["loss"])},
        "an upload of norm": {u.client.id: magnitude(u.params) for u in uploads},
        "a weight of": {u.client.id: float(weight(u)) for u in uploads} if weight else {},
    }
    return [text for what, claimed in found.items() for text in odd(claimed, what)]


def scores(given: object, rows: int, metric: str) -> Scores:
    """A client's scores on the `rows` rows that it holds of a split. Raises PacketError for what cannot be: a number of rows
    that it has not, a score outside its metric's range, no `metric`, by which rounds are chosen."""
    claimed = parsed(Claimed, {"scores": given}, "scores").scores
    n = claimed.get("n")
    if type(n) is not int or not 0 <= n <= rows:
        raise PacketError(f"scores: n is {shown(n)}, expected 0 to {rows}, the rows that the site has stated")
    if n == 0:
        return {"n": 0, "loss": math.nan}
    out: Scores = {"n": n}
    for name, value in claimed.items():
        low, high = RANGE.get(name, (-LARGEST, LARGEST))
        if isinstance(value, bool) or not low - SLACK <= value <= high + SLACK:
            raise PacketError(f"scores: {name} is {shown(value)}, expected {low:.3g} to {high:.3g}")
        out.setdefault(name, float(value))
    for name in ("loss", metric):
        if name not in out:
            raise PacketError(f"scores: {name} is missing")
    return out


def alike(found: Mapping[str, Scores]) -> tuple[dict[str, Scores], dict[str, str]]:
    """The scores that have the metrics which most clients have, and client id -> why its own are left out: a mean over clients
    of which one has no accuracy would be none."""
    names = Counter(frozenset(s) for s in found.values() if s["n"])
    if not names:
        return dict(found), {}
    usual = max(names, key=lambda s: (names[s], len(s), sorted(s)))
    odd = {c: sorted(usual ^ set(s)) for c, s in found.items() if s["n"] and set(s) != usual}
    return {c: s for c, s in found.items() if c not in odd}, {
        c: f"its scores differ from the others' in {', '.join(names[:3])}" for c, names in odd.items()
    }


def histogram(given: Mapping[Any, Sequence[int]] | None, sizes: Mapping[Any, int], classes: int) -> None:
    """Refuse class counts that are not those of `classes` classes over the rows stated. Raises UploadError."""
    for split, counts in (given or {}).items():
        if len(counts) != classes or sum(counts) > sizes.get(split, 0):
            raise UploadError(
                f"histogram of {split} has {len(counts)} classes and {sum(counts)} rows, expected {classes} and at most "
                f"{sizes.get(split, 0)}"
            )
