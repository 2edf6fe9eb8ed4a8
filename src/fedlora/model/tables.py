"""Embedding tables whose delta must be in the weight itself while the base computes.

A hook can add T[ids] to what a plain table gives. It cannot where a model reads the table by its weight (DeBERTa's relative
positions), looks rows up in a way of its own (BART scales words and shifts positions), or has one parameter under several names
(T5's and BART's `shared`). Such a table is replaced by W + T for one client at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..errors import ModelError


def sharing(base: nn.Module, module: nn.Module) -> list[nn.Module]:
    """The embeddings that hold this one's parameter, itself among them. An output layer that is tied to it is none of them."""
    return [m for m in base.modules() if isinstance(m, nn.Embedding) and m.weight is module.weight]


class Tables:
    """The base's tables of this kind, by layer."""

    def __init__(self, base: nn.Module, names: Iterable[str]):
        self._base = base
        self._modules = {n: m for n, m in base.named_modules() if isinstance(m, nn.Embedding)}
        self._homes: dict[str, list[nn.Module]] = {}
        self._weights: dict[str, nn.Parameter] = {}  # the placeholder that replaces a table
        names = [n for n in names if n in self._modules]
        for n in names:
            module = self._modules[n]
            twins = [o for o in names if o != n and self._modules[o].weight is module.weight]
            if twins:
                raise ModelError(
                    f"model: {n!r} and {twins[0]!r} are one parameter, which can have one delta only; name one of them"
                )
            if type(module).forward is not nn.Embedding.forward or len(sharing(base, module)) > 1:
                self.add(n)

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def add(self, name: str) -> None:
        """The layer is a table of this kind: nothing calls it, for example."""
        self._homes[name] = sharing(self._base, self._modules[name])

    def is_table(self, name: str) -> bool:
        """Whether a layer of the base is an embedding, whose weight is a table."""
        return name in self._modules

    def replace(self, changes: Mapping[str, Tensor]) -> None:
        """W + T in each table's place until the next call, T [K v h] of one client; no change: the base as it was."""
        for name, weight in self._weights.items():
            for module in self._homes[name]:
                module._parameters["weight"] = weight
        self._weights = {}
        for name, t in changes.items():
            if len(t) != 1:
                raise ModelError(
                    f"model: table {name!r} is read by its weight, so {len(t)} clients cannot be in one block; set run.block to 1"
                )
            own = self._homes[name][0].weight
            assert isinstance(own, nn.Parameter)
            self._weights[name] = own
            for module in self._homes[name]:
                module._parameters["weight"] = own + t[0].to(own)  # type: ignore[assignment]
