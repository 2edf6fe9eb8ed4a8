"""PF2LoRA's personal adapters on HetLoRA's ranks: the two papers composed.

    distribute, self-prune, aggregate   the common adapter, as HetLoRA (arXiv:2401.06432)
    train                               both adapters, as PF2LoRA (arXiv:2503.03920), Algorithm 1; HetLoRA's penalty on the
                                        common adapter's tail is added to the upper gradient

Not a paper's method: neither paper composes them. A client's personal rank must be below the smallest common one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import Problem
from .hetlora import HetLoRA
from .pf2lora import PF2LoRA


@dataclass(frozen=True)
class PF2HetLoRA(PF2LoRA, HetLoRA):
    """A common adapter of the client's own rank and a small personal one."""

    name: ClassVar[str] = "pf2hetlora"
    title: ClassVar[str] = "PF2LoRA on HetLoRA ranks"
    paper: ClassVar[str] = ""
    family: ClassVar[str] = "ranks"
    rank_min: int = 3

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if self.rank_personal >= self.rank_min:
            bad.append(
                Problem(
                    "method.rank_personal",
                    self.rank_personal,
                    f"below rank_min={self.rank_min}, the smallest common rank",
                    "lower it or raise method.rank_min",
                )
            )
        if self.share != "both":
            bad.append(
                Problem("method.share", self.share, "both: PF2LoRA's common adapter is shared whole", "or use hetlora")
            )
        return bad
