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
from torch import Tensor

from ..errors import Problem
from ..kernels.dropout import GOLDEN
from ..model.dropout import mix, signed
from ..seeds import np_rng, number
from ..tree import Key, Params, select
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
    family: ClassVar[str] = "exact"
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
        numbers, ranks = down[Key(self.label, "", DRAW)], down[Key(self.label, "", "rank")]
        held = torch.arange(self.rank, device=ranks.device) < ranks[:, None]  # [K r]
        fresh: Params = {}
        for s in self.layers_of(context):
            a = drawn(numbers, self.rank, s.in_, context.seed, "flora", info.round, s.name)
            fresh[Key(self.label, s.name, "A")] = a * held[:, :, None]
            fresh[Key(self.label, s.name, "B")] = a.new_zeros(len(a), s.out, self.rank)
        return super().begin(context, info, select(down, lambda k: k.part != DRAW) | fresh, kept)


def drawn(numbers: Tensor, r: int, n: int, *path: object) -> Tensor:
    """A at its start for each client, [K r n], uniform as in LoRA: hashes of its number, drawn where the clients are trained."""
    counter = torch.arange(r * n, device=numbers.device)
    bits = mix(mix(numbers + signed(number(*path)))[:, None] + (counter + 1) * GOLDEN)
    unit = ((bits >> 40) & (2**24 - 1)).float() / 2**24
    return ((2 * unit - 1) * n**-0.5).view(-1, r, n)
