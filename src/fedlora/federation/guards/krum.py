"""Krum and multi-Krum (Blanchard et al., NeurIPS 2017), on what uploads do to the model.

    server   score(i) = sum of the K - f - 2 smallest ||u_i - u_j||^2, j != i
             Krum takes the upload of the least score, multi-Krum the m of the least

u are products B A where both factors travel (geometry.py), so an attacker gains nothing by hiding a product in factors that
look harmless one by one, and clients that rotate their factors are as near as they were.

Choices: f = floor(share * K), lowered to (K - 3) // 2 where the paper's condition K >= 2 f + 3 asks for it; m = K - f; of fewer
than three uploads all are taken. The method weighs what was chosen by its own rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from ...errors import Problem
from ...methods.contract import ServerState, Upload
from .geometry import gram, squared
from .guard import Guard


@dataclass(frozen=True)
class Krum(Guard):
    """The uploads that are nearest to the others. share: of clients that may be wrong, in [0, 0.5); select: m, 1 for Krum,
    None for all but those."""

    name: ClassVar[str] = "krum"
    title: ClassVar[str] = "Krum"
    paper: ClassVar[str] = "NeurIPS 2017"
    share: float = 0.2
    select: int | None = None

    def problems(self) -> list[Problem]:
        bad = []
        if not 0 <= self.share < 0.5:
            bad.append(
                Problem("share", self.share, "a number in [0, 0.5)", "above the share of clients that may be wrong")
            )
        if self.select is not None and self.select < 1:
            bad.append(Problem("select", self.select, "a whole number >= 1, or null"))
        return bad

    def arrive(self, uploads: Iterable[Upload], server: ServerState) -> Iterable[Upload]:
        seen = list(uploads)
        n = len(seen)
        if n < 3:
            return seen
        wrong = min(int(Fraction(str(self.share)) * n), (n - 3) // 2)
        far = squared(gram([u.params for u in seen]))
        scores = far.sort(1).values[:, 1 : n - wrong - 1].sum(1)  # the first is the upload itself
        best = scores.sort(stable=True).indices[: self.select or n - wrong]
        return [seen[i] for i in sorted(best.tolist())]
