"""RoLoRA: the halves take turns (Chen et al., NeurIPS 2025, arXiv:2502.01755).

    rounds 1, 3, ...   clients train and send B; A as received
    rounds 2, 4, ...   clients train and send A; B as received
    aggregate          mean of the half that travelled; exact, since all clients have the other half in common

It starts with B: while B = 0, A has no gradient. Choices: turns of `period` rounds; which half is `first`; a client receives
both halves in every round, so that one which missed rounds has what the others have; the head is trained and sent in every
round; moments start anew each round, as a half sleeps between its turns. DoRA's m goes with B; VeRA's halves are d and b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..errors import Problem
from ..tree import Key
from .halves import Halves


@dataclass(frozen=True)
class RoLoRA(Halves):
    """Train and average one half of the adapter a round, by turns. period: rounds of a turn; first: whose turn is first."""

    name: ClassVar[str] = "rolora"
    title: ClassVar[str] = "RoLoRA"
    paper: ClassVar[str] = "arXiv:2502.01755"
    family: ClassVar[str] = "exact"
    needs_halves: ClassVar[bool] = True
    period: int = 1
    first: Literal["B", "A"] = "B"

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if self.period < 1:
            bad.append(Problem("method.period", self.period, "an integer >= 1", "1 as in the paper"))
        return bad

    def phase(self, round: int) -> str:
        return "AB"[(round // self.period + (self.first == "B")) % 2]

    def live(self, k: Key, round: int) -> bool:
        return k.part in (self.form.first if self.phase(round) == "A" else self.form.second)
