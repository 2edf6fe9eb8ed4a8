"""What every delta form shares: the class that a form fills in, patterns over layers, seeded starts.

A form's delta at a layer is a set of named parts. While clients train, every part has the client axis K first: x [K*b ... i] is the
layer's input, y [K*b ... o] its output. Parts are cast to x's dtype, so fp32 deltas ride on a bf16 base.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..errors import ModelError, Problem
from ..layers import Layer
from ..seeds import rng
from ..tree import Key, Params

Parts = Mapping[str, Tensor]
Pattern = tuple[tuple[str, int], ...]  # (end of a layer's name or regular expression, rank), as PEFT's rank_pattern
Densities = tuple[tuple[str, float], ...]  # the same with densities
Self = TypeVar("Self", bound="Form")


class Change(NamedTuple):
    """What a delta adds to a layer's own weight [o i] (norms [h], embeddings [v h]) and bias [o]; None adds nothing."""

    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Held:
    """A PEFT folder as data, so that no form imports PEFT: checkpoints/peft.py makes the folder of it.

    config: name of PEFT's config class; options: its arguments beside the target layers. leaves: path of a tensor in the base that
    PEFT has wrapped -> its value; added: the same for values that are added to what PEFT starts with.
    """

    config: str
    options: Mapping[str, Any]
    leaves: Mapping[str, Tensor]
    added: Mapping[str, Tensor] = field(default_factory=dict)


class Form(ABC):
    """One delta form: its leaves and their start, what it does to a layer, how it leaves for other software.

    An instance holds the form's hyperparameters; `apply`, `merge` and `hold` need none, because `view` has put scales into the parts.
    """

    names: ClassVar[Mapping[str, str]] = {}  # name in recipes -> what it is, one sentence with its source
    shapes: ClassVar[tuple[frozenset[str], ...]]  # the sets of parts that make a delta of this form at one layer
    first: ClassVar[frozenset[str]] = frozenset()  # leaves that FedSA-LoRA shares; empty: the form has no halves
    second: ClassVar[frozenset[str]] = frozenset()  # leaves that it keeps
    low_rank: ClassVar[bool] = False  # the delta is the product s B A of the leaves A, B and nothing else
    ranks_by_layer: ClassVar[bool] = False  # takes method.rank_pattern
    no_merge: ClassVar[str] = ""  # why no weight of the base can hold it; "" where `merge` can
    no_peft: ClassVar[str] = ""  # why PEFT cannot hold it; "" where `hold` can
    leaves: ClassVar[frozenset[str]] = frozenset()  # parts that are trained, where they are not all of `shapes`
    groups: tuple[str, ...] = ("target",)  # groups of the model's layers it lives on (model/groups.py)

    @classmethod
    def make(cls: type[Self], name: str, rank: int, alpha: float, pattern: Pattern, field: str) -> Self:
        """The form called `name` in a recipe; a form takes of the hyperparameters what it has."""
        return cls()

    @classmethod
    def trained(cls) -> frozenset[str]:
        """The parts that are trained, and so may be uploaded."""
        return cls.leaves or frozenset().union(*cls.shapes)

    @abstractmethod
    def init(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        """Trainable leaves of adapter `name` at the start: the delta is zero."""

    def fixed(self, name: str, layers: Sequence[Layer], *seed: object) -> Params:
        """Frozen leaves that every party derives from the seed, or from its own copy of the base; never sent, never stored."""
        return {}

    def view(self, p: Params) -> Params:
        """Leaves, trained and fixed, as the model takes them: scales are applied, and the parts are one of `shapes`."""
        return p

    def check(self, who: str, layers: Sequence[Layer]) -> None:  # noqa: B027 (most forms fit everywhere)
        """Raise ModelError where a layer cannot carry the form. who: the method, for the message."""

    @staticmethod
    @abstractmethod
    def apply(x: Tensor, y: Tensor, p: Parts, module: Any) -> Tensor:
        """The layer's output with the delta: a pure function. module: the base's layer."""

    @classmethod
    def merge(cls, p: Parts, module: Any) -> Change:
        """What the delta of one client (no client axis) adds to the layer's own weight and bias."""
        raise NotImplementedError

    @classmethod
    def hold(cls, at: Mapping[str, Sequence[Parts]]) -> Held:
        """The PEFT folder of one client's deltas (no client axis), by layer; a layer may have several."""
        raise NotImplementedError


# tensors ------------------------------------------------------------------------------------------------------------
def rows(x: Tensor, k: int) -> Tensor:
    """[K*b ... i] -> [K T i]."""
    return x.reshape(k, -1, x.shape[-1])


def plus_bias(y: Tensor, c: Tensor) -> Tensor:
    """y + c for each client, c [K o]."""
    return (rows(y, len(c)) + c.to(y.dtype)[:, None]).view_as(y)


@lru_cache(maxsize=1024)
def uniform(r: int, in_: int, *path: object) -> Tensor:
    """A at its start, [r i]. Kept: every client of a round asks for it, and nothing writes into leaves."""
    return (torch.rand(r, in_, generator=rng(*path)) * 2 - 1) * in_**-0.5


@lru_cache(maxsize=4096)
def zeros(key: Key, *shape: int) -> Tensor:
    """Zeros, kept likewise; one for each leaf: a file cannot hold two names of one memory."""
    return torch.zeros(*shape)


# patterns -----------------------------------------------------------------------------------------------------------
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def matches(pattern: str, layer: str) -> bool:
    """Whether `pattern`, the end of a layer's name or a regular expression, names the layer `site`."""
    return _expression(pattern).match(layer) is not None


def pattern_problems(
    field: str, patterns: Iterable[tuple[str, float]], good: Callable[[float], bool], expected: str
) -> list[Problem]:
    """What is wrong with a pattern field on its own: values that are not good, and what is no regular expression."""
    bad = []
    for pattern, value in patterns:
        if not good(value):
            bad.append(Problem(field, f"{pattern}: {value}", expected))
        try:
            _expression(pattern)
        except re.error as e:
            bad.append(Problem(field, pattern, "the end of a layer's name, or a regular expression", e.msg))
    return bad


def all_match(field: str, patterns: Iterable[tuple[str, object]], layers: Sequence[Layer]) -> None:
    """Raise ModelError for a pattern that names no layer."""
    for pattern, _ in patterns:
        if not any(matches(pattern, s.name) for s in layers):
            raise ModelError(
                f"{field}: {pattern!r} matches none of the {len(layers)} target layers, e.g. {layers[0].name!r}; "
                "write the end of a layer's name, e.g. query, or a regular expression"
            )
