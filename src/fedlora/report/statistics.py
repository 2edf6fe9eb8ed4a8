"""What runs can tell: intervals and differences whose unit is the seed.

The clients of one run share what was averaged, so they are not independent and never count as repetitions.

    interval     two-level bootstrap of a setting's mean: seeds are drawn with replacement, then clients within each
    differences  of two settings on the same seeds and partitions: one number a seed, Student's interval and test over
                 seeds, p corrected over all pairs by Holm's step-down rule (Scandinavian Journal of Statistics, 1979)

Below LEAST seeds no p is given: an interval of three seeds is wide, and a p of three seeds rests on the assumption of
normal seeds alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

LEAST = 5  # seeds that a p needs
LEVEL = 0.95  # of all intervals
DRAWS = 2000  # of a bootstrap

Seed = tuple[int, str]  # (seed, partition): runs of two settings are paired where both agree
Scores = Mapping[Seed, Mapping[str, float]]  # seed -> client -> score


@dataclass(frozen=True)
class Pair:
    """Setting `a` against `b` on the seeds that both have. difference: mean of a - b over seeds."""

    a: str
    b: str
    seeds: int
    difference: float
    low: float | None  # bounds of the interval of the difference; None for one seed
    high: float | None
    p: float | None  # two-sided, corrected; None below LEAST seeds
    apart: int = 0  # clients that one of the two has scored and the other has not, over all seeds; they are left out

    @property
    def verdict(self) -> str:
        """What may be said, in words."""
        if self.p is None:
            return f"{self.seeds} seed{'s' if self.seeds > 1 else ''} cannot tell"
        return "differs" if self.p < 1 - LEVEL else "within noise"


def interval(scores: Scores) -> tuple[float, float] | None:
    """Bounds of a setting's mean over clients and seeds; None for a single seed, whose own spread nobody knows."""
    runs = [np.array(list(clients.values())) for clients in scores.values() if clients]
    if len(runs) < 2:
        return None
    draw = np.random.default_rng(0)
    means = np.empty((len(runs), DRAWS))
    picked = draw.integers(len(runs), size=(len(runs), DRAWS))
    for s, run in enumerate(runs):  # one resample of a run's clients for every place in which the run is drawn
        at = picked == s
        means[at] = run[draw.integers(len(run), size=(int(at.sum()), len(run)))].mean(1)
    low, high = np.quantile(means.mean(0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def differences(settings: Mapping[str, Scores]) -> list[Pair]:
    """Every two settings that have a seed in common, on the clients that both have scored."""
    found = []
    for a, b in itertools.combinations(settings, 2):
        one, two = settings[a], settings[b]
        gaps, apart = [], 0
        for seed in sorted(one.keys() & two.keys()):
            if clients := sorted(one[seed].keys() & two[seed].keys()):
                gaps.append(float(np.mean([one[seed][c] - two[seed][c] for c in clients])))
                apart += len(one[seed].keys() ^ two[seed].keys())
        if gaps:
            found.append(replace(_pair(a, b, gaps), apart=apart))
    tested = [x for x in found if x.p is not None]
    corrected = iter(holm([x.p for x in tested if x.p is not None]))
    return [replace(x, p=next(corrected)) if x.p is not None else x for x in found]


def _pair(a: str, b: str, gaps: Sequence[float]) -> Pair:
    """Student's interval and test of one number a seed."""
    from scipy import stats

    n, mean = len(gaps), float(np.mean(gaps))
    if n < 2:
        return Pair(a, b, n, mean, None, None, None)
    error = float(np.std(gaps, ddof=1)) / math.sqrt(n)
    wide = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    # Gaps that are all the same have no spread to compare with: equal runs do not differ, other gaps surely do.
    ratio = mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
    p = float(2 * stats.t.sf(abs(ratio), n - 1)) if n >= LEAST else None
    return Pair(a, b, n, mean, mean - wide, mean + wide, p)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p, in the given order: the i-th smallest times (m - i), never below a smaller one's, at most 1."""
    out, highest = [0.0] * len(p), 0.0
    for i, at in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - i) * p[at]))
        out[at] = highest
    return out
