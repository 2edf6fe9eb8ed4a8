"""Fed-SB: r x r messages (Singhal et al., TMLR 2026, arXiv:2502.15436).

    dW = s B R A,   A and B orthonormal, fixed and common (adapters/lora_xs.py);   clients train R
    aggregate       R = sum_k p_k R_k, exact:   B (sum p R) A = sum p B R A

A message of r^2 numbers at each layer allows large ranks (64 to 200 in the paper, with alpha = r). Choices: A and B are the
principal directions of W0 (adapter "lora-xs") or random ("lora-xs-random"). The official code takes them from the gradient of
examples of the pooled training set, which no server of a federation has; that start is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..adapters import AdapterName
from ..adapters.lora_xs import LoRAXS
from ..errors import Problem
from .average import HomLoRA


@dataclass(frozen=True)
class FedSB(HomLoRA):
    """Train and average the r x r core between two fixed orthonormal factors."""

    name: ClassVar[str] = "fedsb"
    title: ClassVar[str] = "Fed-SB"
    paper: ClassVar[str] = "arXiv:2502.15436"
    family: ClassVar[str] = "small"
    adapter: AdapterName = "lora-xs"

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if not isinstance(self.form, LoRAXS):
            bad.append(
                Problem("method.adapter", self.adapter, "lora-xs or lora-xs-random: Fed-SB trains an r x r core")
            )
        return bad
