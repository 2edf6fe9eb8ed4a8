"""How a frozen base comes to compute with compiled operators: by hooks, so that it keeps its modules and its code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attention import MOST
from .deltas import fit
from .fused import Now
from .int8 import Int8Linear
from .library import fits
from .linear import LowRank

# By model type: the layers whose tokens meet in fused attention alone, where each token sees all of its row.
STACKS = {
    "bert": "encoder.layer", "electra": "encoder.layer", "roberta": "encoder.layer", "xlm-roberta": "encoder.layer",
    "distilbert": "transformer.layer",
}  # fmt: skip
# The same where a token sees itself and those before it. Positions are rotations there.
CAUSAL = dict.fromkeys(("llama", "qwen2", "qwen3"), "layers")
# By model type, for classifiers that read a row at its first token: the module of a layer after which no token meets another.
FIRST = dict.fromkeys(("bert", "electra", "roberta", "xlm-roberta"), "attention.output")


def reader_of(base: nn.Module, last: nn.Module) -> nn.Module | None:
    """The module of the last layer from which on only first tokens are read; None where others are."""
    path = FIRST.get(getattr(getattr(base, "config", None), "model_type", ""))
    reads_first = type(base).__name__.endswith("ForSequenceClassification")
    return last.get_submodule(path) if path and reads_first else None


def stack_of(base: nn.Module) -> tuple[list[nn.Module], bool]:
    """The layers that can do without padding, [] for none, and whether they are causal."""
    config: Any = getattr(base, "config", None)
    inner: Any = getattr(base, "base_model", None)
    kind = getattr(config, "model_type", "")
    fused = getattr(config, "_attn_implementation", "") == "sdpa" and not getattr(config, "is_decoder", False)
    path = STACKS.get(kind) or CAUSAL.get(kind)
    if not path or inner is None or not fused or getattr(config, "use_sliding_window", False):
        return [], False
    return list(inner.get_submodule(path)), kind in CAUSAL


class Compiled:
    """A base's hooks. packs: whether its rows may do without padding; whole: whether all of what the base puts out is read, and not what
    its own head makes of it alone."""

    def __init__(self, base: nn.Module, now: Now, packs: bool = True, whole: bool = False):
        self.stack, self.causal = stack_of(base) if packs else ([], False)
        self.now, self._handed = now, False
        within = {id(m) for layer in self.stack for m in layer.modules()}
        # The names of the modules of those layers.
        self.within = frozenset(n for n, m in base.named_modules() if id(m) in within)
        self.hooks = []
        if self.stack:
            self.hooks = [
                self.stack[0].register_forward_pre_hook(self._enter),
                self.stack[-1].register_forward_hook(self._leave),
            ]
            if self.causal:
                self.hooks += [m.register_forward_pre_hook(self._turn, with_kwargs=True) for m in self.stack]
            reader = None if whole else reader_of(base, self.stack[-1])
            if reader is not None:
                self.hooks.append(reader.register_forward_pre_hook(self._narrow))

    def packs(self, longest: int) -> bool:
        """Whether rows of so many tokens are computed without padding."""
        return bool(self.stack) and longest <= MOST

    def flows(self, layer: nn.Module) -> bool:
        """Whether a layer's low-rank deltas can be added where the clients' tokens follow each other."""
        if isinstance(layer, Int8Linear):
            return fit(layer.codes)
        return isinstance(layer, nn.Linear) and fits(layer.weight) and fit(layer.weight)

    def hand(self, layer: nn.Module, bound: Sequence[Mapping[str, Tensor]]) -> None:
        """Before a layer: its deltas, all low-rank (A [K r i], B [K o r]), which its own product adds."""
        if isinstance(layer, nn.Linear):
            packing = self.now.packing if self.now.inside else None
            ends = packing.ends if packing is not None and packing.flat else None
            weight = layer.codes if isinstance(layer, Int8Linear) else layer.weight
            dtype = weight.dtype if ends is None and weight.is_floating_point() else torch.float32
            a, b = (torch.cat([p[n].to(dtype) for p in bound], axis) for n, axis in (("A", 1), ("B", 2)))
            self._handed, self.now.delta = True, LowRank(weight, a, b, ends)

    def added(self) -> bool:
        """After a layer: whether it has added the deltas that it was handed."""
        done = self._handed and self.now.delta is None
        self._handed, self.now.delta = False, None
        return done

    def _enter(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.now.packing is None:
            return None
        self.now.inside = True
        return (self.now.packing.pack(args[0]), *args[1:])

    def _turn(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """The rotations of packed tokens, which the base has made for rows."""
        packing, turns = self.now.packing, kwargs.get("position_embeddings")
        if packing is None or turns is None:
            return None
        pick = lambda x: x[packing.row if len(x) > 1 else 0, packing.token].view(packing.lines, packing.width, -1)  # noqa: E731
        return args, kwargs | {"position_embeddings": tuple(map(pick, turns))}

    def _narrow(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.now.packing is None or not self.now.inside:
            return None
        wide, self.now.packing = self.now.packing, self.now.packing.first
        return tuple(wide.to_first(x) for x in args)

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        if self.now.packing is None:
            return None
        self.now.inside = False
        return self.now.packing.unpack(out) if isinstance(out, Tensor) else (self.now.packing.unpack(out[0]), *out[1:])
