"""FedALT: an adapter of one's own beside a frozen one of the rest of the world (Bian et al., AAAI 2026, arXiv:2503.11880).

    y = W0 x + s (a_1(x) B_k A_k x + a_0(x) B_R A_R x),   (a_1, a_0) = softmax(G_k x), token by token (adapters/routed.py)
    train       A_k, B_k, which nobody overwrites, and the router G_k;  A_R, B_R as received
    aggregate   the server remembers the last A_k, B_k of every client
    distribute  A_R = mean of the others' A, B_R = mean of the others' B: different for each client

Near the start the router's weights are about 1/2, so an adapter acts with half its scale: mind it when alphas are compared. The
means of the factors are taken apart, so B_R A_R is not the mean of products. With two clients, the rest of the world is
the other one.

Choices: a client of which nobody has uploaded yet gets B_R = 0; one that has never trained is served the mean of all at a
weight of 1/2; all clients count alike; the head is a mean by `weights`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..adapters import Form
from ..adapters.routed import Routed
from ..errors import Problem
from ..tree import Key, Params, mean, select
from .contract import Client, Context, RoundInfo, ServerState, Upload, Work
from .sgd import SGDMethod

SENT = "sent"  # a copy of a client's own adapter on its way to the server
REST = ("A_rest", "B_rest")


@dataclass(frozen=True)
class FedALT(SGDMethod):
    """A personal adapter and the mean of the others' ones, weighed by a personal router."""

    name: ClassVar[str] = "fedalt"
    title: ClassVar[str] = "FedALT"
    paper: ClassVar[str] = "arXiv:2503.11880"
    family: ClassVar[str] = "personal"

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if self.adapter != "lora":
            bad.append(Problem("method.adapter", self.adapter, "lora: FedALT routes between two low-rank products"))
        return bad

    @property
    def form(self) -> Form:
        return Routed(self.rank, self.alpha, False, self.rank_pattern)

    @property
    def per_client(self) -> bool:
        return True

    @property
    def averages(self) -> bool:
        return False

    @property
    def anew(self) -> bool:
        return True

    def trains(self, k: Key) -> bool:
        return True

    def shares(self, k: Key) -> bool:
        return False

    # server -----------------------------------------------------------------------------------------------------
    def init(self, context: Context) -> ServerState:
        return ServerState(0, super().init(context).params, {"clients": {}})

    def broadcast(self, context: Context, server: ServerState, client: Client) -> Params:
        known: dict[str, int] = server.notes["clients"]
        own = known.get(client.id)
        others = [_of(n) for n in sorted(known.values()) if n != own]  # in one order, or sums would differ
        out = select(server.params, lambda k: k.adapter == "head")
        for k, v in self.start(context).items():
            if k.part in ("A", "B") and k.adapter == self.label:
                last = [server.params[k._replace(adapter=n)] for n in others]
                out[k._replace(part=f"{k.part}_rest")] = torch.stack(last).mean(0) if last else v
        return out

    def aggregate(self, context: Context, server: ServerState, uploads: Iterable[Upload]) -> ServerState:
        known = dict(server.notes["clients"])
        last: Params = {}

        def heads() -> Iterable[tuple[Params, float]]:
            for u in uploads:
                n = known.setdefault(u.client.id, len(known))
                last.update({k._replace(adapter=_of(n)): v for k, v in u.params.items() if k.adapter == SENT})
                yield select(u.params, lambda k: k.adapter != SENT), self.weight(u)

        new = mean(heads())
        return ServerState(server.round + 1, server.params | new | last, server.notes | {"clients": known})

    # client -----------------------------------------------------------------------------------------------------
    def fresh(self, context: Context, client: Client) -> Params:
        """Its own adapter is as good as none (B = 0), and its router weighs both alike."""
        return {k: torch.zeros_like(v) if k.part == "gate" else v for k, v in self.keep(context, client).items()}

    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        rest = select(down, lambda k: k.part in REST)
        work = super().begin(context, info, select(down, lambda k: k not in rest), kept)
        return work | {"fixed": work["fixed"] | rest}

    def finish(self, work: Work) -> tuple[Params, Params]:
        up, kept = super().finish(work)
        mine = {k: v for k, v in work["train"].items() if k.adapter == self.label and k.part in ("A", "B")}
        return up | {k._replace(adapter=SENT): v for k, v in mine.items()}, kept


def _of(n: int) -> str:
    """The adapter that stands for the last upload of the server's client number n."""
    return f"client{n}"
