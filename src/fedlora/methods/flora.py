"""FLoRA: stack the factors instead of averaging them (Wang et al., NeurIPS 2024, arXiv:2409.05976).

    distribute  the stack of earlier rounds, which is the base's change (onbase.py)
    train       a fresh adapter of the client's own rank: A drawn, B = 0
    aggregate   B_S = [p_1 s B_1 ... p_K s B_K],  A_S = [A_1; ...; A_K];   W <- W + B_S A_S = W + s sum_k p_k B_k A_k, exact

Choices: the head is averaged and kept, not started anew; one scale s = alpha / rank for all ranks (in the paper's runs
alpha_k / r_k is one number too); each client draws its A from the seed, the round and a number that comes down with the
message; moments start anew, since the adapters do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..adapters.base import uniform
from ..errors import Problem
from ..seeds import np_rng
from ..tree import Key, Params, pad_rank, select
from .contract import Client, Context, RoundInfo, ServerState, Upload, Work
from .onbase import OnBase, grown
from .ranks import Plan, Ranked, stacked

DRAW = "draw"


@dataclass(frozen=True)
class FLoRA(OnBase, Ranked):
    """Products are added to the base by stacking factors; a fresh adapter each round. plan: "same" gives all clients `rank`."""

    name: ClassVar[str] = "flora"
    title: ClassVar[str] = "FLoRA"
    paper: ClassVar[str] = "arXiv:2409.05976"
    plan: Plan = "same"

    @property
    def anew(self) -> bool:
        return True

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if self.moments == "keep":
            bad.append(Problem("method.moments", "keep", "reset", "FLoRA's adapters are new in each round"))
        return bad

    # server -----------------------------------------------------------------------------------------------------
    def init(self, context: Context) -> ServerState:
        start = super().init(context)
        return ServerState(0, select(start.params, lambda k: k.adapter != self.label), start.notes)

    def broadcast(self, context: Context, server: ServerState, client: Client) -> Params:
        ranks = self.rank_of(context, server, client)
        number = int(np_rng("draw", context.seed, client.id).integers(2**31))
        own = {Key(self.label, at, "rank"): torch.tensor(r) for at, r in ranks.items()}
        return server.params | own | {Key(self.label, "", DRAW): torch.tensor(number)}

    def aggregate(self, context: Context, server: ServerState, uploads: Iterable[Upload]) -> ServerState:
        rest, products = stacked(uploads, self.weight)
        params = server.params | rest
        for layer, found in products.items():
            params = grown(params, layer, found.b * self.form.scale_at(layer), found.a)  # type: ignore[attr-defined]
        return ServerState(server.round + 1, params, server.notes)

    # client -----------------------------------------------------------------------------------------------------
    def frozen(self, k: Key) -> bool:
        return super().frozen(k) or k.part == DRAW

    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        numbers = down[Key(self.label, "", DRAW)].tolist()
        ranks = down[Key(self.label, "", "rank")].tolist()
        fresh: Params = {}
        for s in self.layers_of(context):
            a, b = Key(self.label, s.name, "A"), Key(self.label, s.name, "B")
            drawn = [
                uniform(r, s.in_, context.seed, "flora", info.round, n, s.name)
                for r, n in zip(ranks, numbers, strict=True)
            ]
            fresh[a] = torch.stack([pad_rank(a, v, max(ranks)) for v in drawn])
            fresh[b] = torch.zeros(len(ranks), s.out, max(ranks))
        device = down[Key(self.label, "", DRAW)].device
        live = select(down, lambda k: k.part != DRAW)
        return super().begin(context, info, live | {k: v.to(device) for k, v in fresh.items()}, kept)
