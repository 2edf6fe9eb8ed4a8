"""What methods share whose server owns both halves of an adapter while a round trains one of them."""

from __future__ import annotations

from abc import abstractmethod

from ..errors import Problem
from ..tree import Key, Params, select
from .contract import Context, RoundInfo, ServerState, Work
from .sgd import SGDMethod


class Halves(SGDMethod):
    """Both halves come down; the live one and the head are trained and sent, the other one stays as received."""

    @abstractmethod
    def live(self, k: Key, round: int) -> bool:
        """Whether a leaf of the adapter is trained in this round (0-based)."""

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if self.moments == "keep":
            why = f"{self.title} does not train the same leaves, on the same axes, in every round"
            bad.append(Problem("method.moments", "keep", "reset", why))
        return bad

    def trains(self, k: Key) -> bool:
        return True

    def shares(self, k: Key) -> bool:
        return True

    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        still = select(down, lambda k: k.adapter == self.label and not self.live(k, info.round))
        work = super().begin(context, info, select(down, lambda k: k not in still), kept)
        return work | {"fixed": work["fixed"] | still}

    def beside(self, server: ServerState) -> Params:
        return select(server.params, lambda k: k.adapter == self.label)
