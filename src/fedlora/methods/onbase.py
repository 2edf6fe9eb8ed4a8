"""What methods share that change the base: a delta on it that the server owns and every message to a client carries.

It comes down whole, so a client that missed rounds has the base of one that did not, and its bytes are counted. The papers' clients
take part in every round and add what is new to their own copy. It stays in fp32 beside the base; added to weights in half
precision, most of it would be rounded away. At each layer it is two factors side by side with those of earlier rounds, and one
dense matrix as soon as that has fewer numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import named
from ..errors import Problem
from ..tree import Key, Params, select
from .contract import Context, ServerState
from .sgd import SGDMethod

BASE = "base"


class OnBase(SGDMethod):
    """Leaves of the adapter "base" are frozen: bound beside the model, neither trained nor sent back."""

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if not self.form.low_rank:
            forms = named(lambda f: f.low_rank)
            bad.append(
                Problem("method.adapter", self.adapter, f"{forms}: {self.title} adds low-rank products to the base")
            )
        return bad

    @property
    def averages(self) -> bool:
        return False

    @property
    def grows(self) -> bool:
        return True

    def trains(self, k: Key) -> bool:
        return True

    def shares(self, k: Key) -> bool:
        return True

    def frozen(self, k: Key) -> bool:
        return k.adapter == BASE

    def bound(self, context: Context, p: Params) -> Params:
        """The base's delta is model-ready as it is: its scale is in B."""
        return select(p, lambda k: k.adapter == BASE)

    def aggregated(self, old: ServerState, new: ServerState) -> Params:
        """The new factors beside those that the base has gained."""
        out = dict(new.params)
        for k, a in new.params.items():
            if k.adapter == BASE and k.part == "A":
                kb = k._replace(part="B")
                before, s = len(old.params.get(k, a[:0])), self.form.scale_at(k.layer)  # type: ignore[attr-defined]
                gained = {k: a[before:], kb: new.params[kb][:, before:] / s}
                for key, v in gained.items():
                    own, axis = key._replace(adapter=self.label), -2 if key.part == "A" else -1
                    out[own] = torch.cat([out[own], v], axis) if own in out else v
        return select(out, lambda k: k.adapter != BASE)


def grown(p: Params, layer: str, b: Tensor, a: Tensor) -> Params:
    """p with b @ a, [o n] @ [n i], added to the base's delta at a layer."""
    ka, kb, whole = (Key(BASE, layer, part) for part in ("A", "B", "weight"))
    if whole in p:
        return p | {whole: p[whole] + b @ a}
    if ka in p:
        b, a = torch.cat([p[kb], b], 1), torch.cat([p[ka], a])
    if a.numel() + b.numel() < b.shape[0] * a.shape[1]:
        return p | {ka: a, kb: b}
    return select(p, lambda k: k not in (ka, kb)) | {whole: b @ a}
