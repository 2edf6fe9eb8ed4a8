"""LoRA (Hu et al., arXiv:2106.09685) and rsLoRA (arXiv:2312.03732): h = W0 x + s B (A x)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Change, Held, Parts, rows
from .factors import Factored


@dataclass(frozen=True)
class LoRA(Factored):
    """A ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform, a = sqrt 5, as PEFT), B = 0."""

    names: ClassVar[Mapping[str, str]] = {
        "lora": "s = alpha / r; A ~ U(-1/sqrt(in), 1/sqrt(in)) (Kaiming-uniform, a = sqrt 5, as PEFT), B = 0 (arXiv:2106.09685)",
        "rslora": "s = alpha / sqrt(r) (arXiv:2312.03732)",
    }
    shapes: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"A", "B"}),)
    first: ClassVar[frozenset[str]] = frozenset({"A"})
    second: ClassVar[frozenset[str]] = frozenset({"B"})
    low_rank: ClassVar[bool] = True

    @staticmethod
    def apply(x: Tensor, y: Tensor, p: Parts, module: Any) -> Tensor:
        a, b = p["A"].to(x.dtype), p["B"].to(x.dtype)
        h = torch.bmm(rows(x, len(a)), a.mT)  # [K T r]
        return torch.baddbmm(rows(y, len(a)), h, b.mT).view_as(y)

    @classmethod
    def merge(cls, p: Parts, module: Any) -> Change:
        return Change(p["B"] @ p["A"])

    @classmethod
    def hold(cls, at: Mapping[str, Sequence[Parts]]) -> Held:
        """Scale is in B already, so lora_alpha = r. Several products at a layer are one of the summed rank, side by side."""
        leaves: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        for layer, each in at.items():
            leaves[f"{layer}.lora_A.default.weight"] = a = torch.cat([p["A"] for p in each])
            leaves[f"{layer}.lora_B.default.weight"] = torch.cat([p["B"] for p in each], 1)
            ranks[layer] = len(a)
        common = max(ranks.values())
        odd = {f"^{layer}$": r for layer, r in ranks.items() if r != common}
        return Held(
            "LoraConfig", {"r": common, "lora_alpha": common, "rank_pattern": odd, "alpha_pattern": odd}, leaves
        )
