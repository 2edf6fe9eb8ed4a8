"""What the forms of two factors share: ranks and scales by layer, and their start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from ..errors import ModelError
from ..layers import Layer
from ..tree import Key, Params
from .base import Form, Pattern, all_match, matches, uniform, zeros

Self = TypeVar("Self", bound="Factored")


@dataclass(frozen=True)
class Factored(Form):
    """Factors A [r i] and B [o r] at each layer."""

    ranks_by_layer: ClassVar[bool] = True
    rank: int = 8
    alpha: float = 16.0
    rs: bool = False  # rsLoRA's scale
    pattern: Pattern = ()
    field: str = "method.rank_pattern"  # whose pattern it is

    @classmethod
    def make(cls: type[Self], name: str, rank: int, alpha: float, pattern: Pattern, field: str) -> Self:
        return cls(rank, alpha, name == "rslora", pattern, field)

    def rank_at(self, layer: str) -> int:
        """r of a layer: of the first pattern that matches it, else `rank`."""
        return next((r for name, r in self.pattern if matches(name, layer)), self.rank)

    def scale_at(self, layer: str) -> float:
        """s of a layer: alpha / r, of rsLoRA alpha / sqrt(r)."""
        r = self.rank_at(layer)
        return self.alpha / r**0.5 if self.rs else self.alpha / r

    def init(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        all_match(self.field, self.pattern, layers)
        out: Params = {}
        for s in layers:
            r = self.rank_at(s.name)
            out[Key(name, s.name, "A")] = uniform(r, s.in_, *seed, name, s.name)
            out[Key(name, s.name, "B")] = zeros(Key(name, s.name, "B"), s.out, r)
        return out

    def view(self, p: Params) -> Params:
        return {k: v * self.scale_at(k.layer) if k.part == "B" else v for k, v in p.items()}

    def check(self, who: str, layers: Sequence[Layer]) -> None:
        """A rank above a layer's size buys nothing and hides a mistake: refused. VeRA's rank may exceed it."""
        for s in layers:
            r = self.rank_at(s.name)
            if r > min(s.out, s.in_):
                raise ModelError(
                    f"{who}: rank {r} exceeds the layer {s.name!r} of {s.out} x {s.in_}; "
                    f"lower method.rank to at most {min(s.out, s.in_)} or choose other targets"
                )
