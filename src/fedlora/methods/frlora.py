"""FRLoRA: every round restarts at the base's principal components, and the global step goes into the base
(Yan et al., ICLR 2025).

    start      W0 = U S V^T;   s B0 A0 = its best rank-r part, half of the singular values on each side;   W <- W0 - s B0 A0
    train      A and B, from A0 and B0, on the current W
    aggregate  Am, Bm: means;   W <- W + s (Bm Am - B0 A0);   clients start from A0, B0 again

With A = A0 + dA and B = B0 + dB (adapters/pissa.py) only the changes travel, and the step is

    s (Bm Am - B0 A0) = s (dBm Am + B0 dAm)

so over the rounds B0 takes the sum of all dAm, and the base's change has rank (t + 1) r after t rounds. Choices: `exact` takes the
mean of the clients' products in place of Bm Am, by stacking; the head is averaged and kept; moments start anew each round, as A
and B do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..adapters import AdapterName
from ..adapters.pissa import PiSSA
from ..errors import Problem
from ..tree import Key, Params, mean, select
from .contract import Context, RoundInfo, ServerState, Upload, Work
from .onbase import BASE, OnBase, grown
from .sgd import SGDMethod, block_size, expand, to

BEGIN = "begin"  # a leaf that says nothing, so that a first message has one even where the head does not travel


@dataclass(frozen=True)
class FRLoRA(OnBase):
    """Clients start each round at the base's principal components; means are merged into the base. exact: of the products."""

    name: ClassVar[str] = "frlora"
    title: ClassVar[str] = "FRLoRA"
    paper: ClassVar[str] = "ICLR 2025"
    adapter: AdapterName = "pissa"
    exact: bool = False

    @property
    def anew(self) -> bool:
        return True

    def problems(self) -> list[Problem]:
        bad = SGDMethod.problems(
            self
        )  # not OnBase's: these leaves are changes of factors, which need no form of its kind
        if not isinstance(self.form, PiSSA):
            bad.append(
                Problem("method.adapter", self.adapter, "pissa: FRLoRA starts at the base's principal components")
            )
        if self.moments == "keep":
            bad.append(Problem("method.moments", "keep", "reset", "FRLoRA's adapters start anew in each round"))
        return bad

    def init(self, context: Context) -> ServerState:
        params = select(super().init(context).params, lambda k: k.adapter != self.label)
        return ServerState(0, params | {Key(self.label, "", BEGIN): torch.tensor(0)})

    def frozen(self, k: Key) -> bool:
        return super().frozen(k) or k.part == BEGIN

    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        start = select(self.start(context), lambda k: k.adapter == self.label)
        return super().begin(context, info, down | to(expand(start, block_size(down)), down), kept)

    def aggregate(self, context: Context, server: ServerState, uploads: Iterable[Upload]) -> ServerState:
        seen = list(uploads)
        total = sum(self.weight(u) for u in seen)
        new = mean((u.params, self.weight(u)) for u in seen)
        params = server.params | select(new, lambda k: k.adapter != self.label)
        start = self.fixed(context)
        for layer in self.layers_of(context):
            at = lambda part, layer=layer: Key(self.label, layer.name, part)  # noqa: E731
            s, b0, a0 = self.form.scale_at(layer.name), start[at("B0")], start[at("A0")]  # type: ignore[attr-defined]
            da = new[at("dA")]
            b, a = s * new[at("dB")], a0 + da
            if self.exact:
                b = torch.cat([s * self.weight(u) / total * u.params[at("dB")] for u in seen], 1)
                a = torch.cat([a0 + u.params[at("dA")] for u in seen])
            known = Key(BASE, layer.name, "A")
            if known in params:  # B0's own rows come first
                n = len(a0)
                params = params | {known: torch.cat([params[known][:n] + da, params[known][n:]])}
            else:
                b, a = torch.cat([s * b0, b], 1), torch.cat([da, a])
            params = grown(params, layer.name, b, a)
        return ServerState(server.round + 1, params, server.notes)
