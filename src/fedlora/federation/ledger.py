"""What a run has spent: privacy.json in its folder, written before a round is trained and never taken back.

A round that was cut off is done again. In a simulation its noise is the same then, and so is what it releases: it is charged
once. In a deployment nothing of it was released, unless its state was committed and lost again; so a round that has been
released is charged once more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BudgetError, StateError
from .accountant import Mechanism
from .engine import RoundLog
from .records import TrainLine
from .store import Store

if TYPE_CHECKING:
    from .run import Federation

FILE = "privacy.json"


@dataclass
class Ledger:
    """The charges of a run. fresh: noise is drawn anew where a round is done again (a deployment)."""

    store: Store
    mechanism: Mechanism
    delta: float
    budget: float | None
    rounds: int
    fresh: bool = False
    scores: str = "withheld"

    def __post_init__(self) -> None:
        self._affordable: int | None = None

    def charges(self) -> dict[int, int]:
        """Round (0-based) -> times it was charged. Raises StateError where the file is damaged."""
        return {int(r): int(n) for r, n in self.store.read_json(FILE).get("charges", {}).items()}

    @property
    def spent(self) -> int:
        """Rounds charged, repeated ones each time."""
        return sum(self.charges().values())

    def opened(self, done: int) -> None:
        """Look at the file when a run is taken up with `done` rounds committed. Raises StateError if it knows fewer."""
        missing = set(range(done)) - set(self.charges())
        if missing:
            raise StateError(
                f"{self.store.root / FILE}: {len(missing)} of {done} rounds that were trained are not charged in it; restore the file. "
                "Without it nobody can say what the run has spent"
            )

    def charge(self, round: int) -> None:
        """Spend a round before it is trained. Raises BudgetError where the budget would be passed; nothing is charged then."""
        found = self.store.read_json(FILE)
        charges = {int(r): int(n) for r, n in found.get("charges", {}).items()}
        again = charges.get(round, 0)
        if again and (not self.fresh or found.get("open") == round):
            return
        total = sum(charges.values()) + 1
        if self.budget is not None and total > self.affordable(max(total, self.rounds)):
            cost = self.mechanism.epsilon(total, self.delta)
            raise BudgetError(
                f"round {round + 1} would bring epsilon to {cost:.4g} at delta {self.delta:g}, and the budget is {self.budget:g}: it is "
                f"not trained. {total - 1} rounds are kept; stop here (federation.rounds={total - 1}), or start a run with more noise"
            )
        self._write(charges | {round: again + 1}, round)

    def facts(self) -> dict[str, Any]:
        """What is spent, for the record of a round. epsilon None stands for infinity."""
        return {"epsilon": _finite(self.mechanism.epsilon(self.spent, self.delta)), "delta": self.delta}

    def final(self) -> dict[str, Any]:
        """What is spent, by both ways of accounting, and what of the run is not covered."""
        m, spent = self.mechanism, self.spent
        losses = m.losses(spent, self.delta)
        return {
            "epsilon": _finite(m.epsilon(spent, self.delta)),
            "delta": self.delta,
            "renyi": _finite(m.renyi(spent, self.delta)),
            "losses": None if losses is None else _finite(losses),
            "neighbours": "exchange a client" if m.exchanges else "one client more or less",
            "rounds": spent,
            "noise": m.noise,
            "cohort": m.cohort,
            "clients": m.clients,
            "expected": m.expected,
            "budget": self.budget,
            "scores": self.scores,
        }

    def released(self, round: int) -> None:
        """Say that the round's result leaves now, before its state is committed."""
        if self.fresh:
            self._write(self.charges(), None)

    def affordable(self, rounds: int) -> int:
        """The most rounds that the budget pays for."""
        if self.budget is None:
            return rounds
        if self._affordable is None or self._affordable >= self.rounds:
            self._affordable = self.mechanism.affordable(rounds, self.delta, self.budget)
        return self._affordable

    def _write(self, charges: dict[int, int], open: int | None) -> None:
        total = sum(charges.values())
        self.store.write_json(
            FILE,
            {
                "charges": {str(r): n for r, n in sorted(charges.items())},
                "open": open,
                "epsilon": _finite(self.mechanism.epsilon(total, self.delta)),
                "delta": self.delta,
                "budget": self.budget,
                "noise": self.mechanism.noise,
                "cohort": self.mechanism.cohort,
                "clients": self.mechanism.clients,
                "expected": self.mechanism.expected,
            },
        )


def ledger_of(f: Federation) -> Ledger | None:
    """The ledger of a run that spends a privacy budget."""
    if (guard := f.private) is None:
        return None
    rule, place = guard.rule, guard.place
    return Ledger(f.store, guard.mechanism, rule.delta, rule.epsilon, place.rounds, place.fresh, rule.scores)


def withheld(round: int, log: RoundLog, share: float, extra: dict[str, Any]) -> TrainLine:
    """The record of a round that tells nothing of its clients. share: the mean size of a cohort over this one's, by which bytes are
    scaled: how many came is nobody's business."""
    up, down = ({k: int(v * share + 0.5) for k, v in t.as_dict().items()} for t in (log.up, log.down))
    return TrainLine(round, float("nan"), [], {}, 0, {}, {"up": up, "down": down}, extra=extra)


def _finite(epsilon: float) -> float | None:
    """None for infinity, which JSON does not have."""
    return epsilon if math.isfinite(epsilon) else None
