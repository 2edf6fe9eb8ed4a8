"""Ranks that differ by client: plans that give each client its rank, truncation, and aggregation with zero-padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import ConfigError, Problem
from ..seeds import np_rng
from ..tree import Key, Params, cut_rank, mean, pad_rank, rank, select
from .contract import Client, Context, ServerState, Upload
from .sgd import SGDMethod

Plan = Literal["same", "uniform", "power", "explicit", "budget", "memory"]


def uniform(low: int, high: int, *path: object) -> int:
    """A rank uniform in [low, high]."""
    return int(np_rng("rank", *path).integers(low, high + 1))


def power_law(low: int, high: int, exponent: float, *path: object) -> int:
    """A rank with P(r) proportional to r^-exponent on [low, high]: many weak clients, few strong ones."""
    ranks = range(low, high + 1)
    weight = [r**-exponent for r in ranks]
    return int(np_rng("rank", *path).choice(list(ranks), p=[w / sum(weight) for w in weight]))


def from_budget(bytes_: float, per_rank: int, fixed: int, low: int, high: int) -> int:
    """The largest rank that fits: per_rank and fixed count fp32 values; the result is kept in [low, high]."""
    return int(min(high, max(low, (bytes_ - 4 * fixed) // (4 * per_rank))))


def truncate(p: Params, ranks: Callable[[Key], int]) -> Params:
    """The leading ranks(key) components of every factor."""
    return {k: cut_rank(k, v, ranks(k)).clone() for k, v in p.items()}


def padded_mean(
    uploads: Iterable[tuple[Upload, Callable[[Key], float]]], server: Params, rank_max: int, guard: bool = True
) -> Params:
    """sum_k p_k (leaf of client k, factors zero-padded to rank_max); p_k, which may differ by leaf, is normalised here.

    Weights of a leaf that are all zero count as equal. guard: a component that no cohort member holds keeps its server
    value. Zero in both factors never trains again, so literal padding (guard=False) kills components for good.
    """
    held: dict[tuple[str, str], int] = {}
    weighted: Params = {}
    plain: Params = {}
    total: dict[Key, float] = {}
    n = 0
    for n, (u, weight) in enumerate(uploads, 1):  # noqa: B007
        for k, v in u.params.items():
            if k.part == "rank":
                continue
            if rank(k, v):
                held[k.adapter, k.layer] = max(held.get((k.adapter, k.layer), 0), rank(k, v))
            v, w = pad_rank(k, v, rank_max), weight(k)
            total[k] = total.get(k, 0.0) + w
            weighted[k] = v * w if k not in weighted else weighted[k] + v * w
            plain[k] = v.clone() if k not in plain else plain[k] + v
    new = {k: v / total[k] if total[k] > 0 else plain[k] / n for k, v in weighted.items()}
    if guard:
        for k, v in new.items():
            r = held.get((k.adapter, k.layer), rank_max)
            if rank(k, v) and r < rank_max:
                axis = -2 if k.part == "A" else -1
                rest = server[k].narrow(axis, r, rank_max - r)
                new[k] = torch.cat([v.narrow(axis, 0, r), rest], axis)
    return new


def stacked(
    uploads: Iterable[Upload], weight: Callable[[Upload], float]
) -> tuple[Params, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """(mean of the other leaves, layer -> (b [o n], a [n i]) with b @ a = sum_k p_k B_k A_k): factors side by side."""
    bs: dict[str, list[torch.Tensor]] = {}
    rows: dict[str, list[torch.Tensor]] = {}
    total = 0.0

    def rest() -> Iterable[tuple[Params, float]]:
        nonlocal total
        for u in uploads:
            p = weight(u)
            total += p
            for k, v in u.params.items():
                if k.part in ("A", "B"):
                    (rows if k.part == "A" else bs).setdefault(k.layer, []).append(v * p**0.5)
            yield select(u.params, lambda k: k.part not in ("A", "B", "rank")), p

    new = mean(rest())
    return new, {layer: (torch.cat(b, 1) / total, torch.cat(rows[layer], 0)) for layer, b in bs.items()}


def lookup(ranks: Mapping[str, float], client: Client) -> float | None:
    """A client's entry in an explicit plan; "*" is the default."""
    return ranks.get(client.id, ranks.get("*"))


@dataclass(frozen=True)
class Ranked(SGDMethod):
    """Clients of different ranks: each receives the leading r_k components of the server's factors.

    rank: r_max. plan: the same for all; uniform in [rank_min, rank], truncated power law with `exponent`, explicit, or from bytes: "budget" of
    a message, "memory" of all that is trained (value, gradient and moments; activations, which do not depend on the rank, are
    not in it). `ranks` maps client id, or "*", to its rank or bytes. One scale alpha / r_max serves all ranks.
    """

    rank_min: int = 2
    plan: Plan = "uniform"
    exponent: float = 1.0
    ranks: tuple[tuple[str, float], ...] = ()

    @property
    def per_client(self) -> bool:
        return True

    @property
    def averages(self) -> bool:
        return False

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if self.rank_pattern:
            bad.append(
                Problem(
                    "method.rank_pattern",
                    dict(self.rank_pattern),
                    f"none: in {self.title} ranks differ by client",
                    "use plan and ranks",
                )
            )
        if self.plan != "same" and self.rank >= 1 and not 1 <= self.rank_min <= self.rank:
            bad.append(
                Problem("method.rank_min", self.rank_min, f"1 to rank_max={self.rank}", "lower it or raise method.rank")
            )
        if self.plan in ("explicit", "budget", "memory") and not self.ranks:
            bad.append(
                Problem(
                    "method.ranks", self.ranks, f"a client: value map for plan {self.plan!r}", "'*' is everybody else"
                )
            )
        if self.plan == "explicit":
            for client, r in self.ranks:
                if not self.rank_min <= r <= self.rank:
                    side = (
                        f"exceeds rank_max={self.rank}; raise method.rank"
                        if r > self.rank
                        else f"is below rank_min={self.rank_min}; lower it"
                    )
                    bad.append(
                        Problem(
                            "method.ranks",
                            f"{self.title}: rank {r} of client {client!r} {side}",
                            f"{self.rank_min} to {self.rank}",
                        )
                    )
        return bad

    # ranks ------------------------------------------------------------------------------------------------------
    def first_rank(self, context: Context, client: Client) -> int:
        """r_k at the start."""
        if self.plan == "same":
            return self.rank
        if self.plan == "uniform":
            return uniform(self.rank_min, self.rank, context.seed, client.id)
        if self.plan == "power":
            return power_law(self.rank_min, self.rank, self.exponent, context.seed, client.id)
        given = lookup(dict(self.ranks), client)
        if given is None:
            raise ConfigError(
                [Problem("method.ranks", f"nothing for client {client.id!r}", "a value", "add it, or '*' for the rest")]
            )
        if self.plan in ("budget", "memory"):
            return self.affordable(context, given)
        return int(given)

    def affordable(self, context: Context, bytes_: float) -> int:
        """The rank that a message, or the memory of what is trained, of `bytes_` allows."""
        memory = self.plan == "memory"
        copies = 2 + self.optimizer.moments if memory else 1  # value, gradient, moments
        sides = [
            n
            for s in context.layers("target")
            for part, n in (("A", s.in_), ("B", s.out))
            if memory or self.shared(Key(self.label, s.name, part))
        ]
        has_head = self.head != "frozen" if memory else self.head == "shared"
        head = sum(s.out * s.in_ + s.out for s in context.head) if has_head else 0
        return from_budget(bytes_, copies * sum(sides), copies * head, self.rank_min, self.rank)

    def rank_of(self, context: Context, server: ServerState, client: Client) -> dict[str, int]:
        """layer -> r_k now; "" stands for all layers where one decision is taken a client."""
        known = server.notes["ranks"].get(client.id)
        return known or dict.fromkeys(self.deciders(context), self.first_rank(context, client))

    def deciders(self, context: Context) -> Sequence[str]:
        """Layers with a rank of their own; "" is one rank for all."""
        return [""]

    def init(self, context: Context) -> ServerState:
        return ServerState(0, super().init(context).params, {"ranks": {}})

    def broadcast(self, context: Context, server: ServerState, client: Client) -> Params:
        r = self.rank_of(context, server, client)
        cut = truncate(server.params, lambda k: r.get(k.layer, r.get("", self.rank)))
        return cut | {Key(self.label, layer, "rank"): torch.tensor(n) for layer, n in r.items()}

    def whole(self, context: Context, server: ServerState) -> Params:
        """The server's factors at their full rank."""
        return server.params | {Key(self.label, at, "rank"): torch.tensor(self.rank) for at in self.deciders(context)}

    def keep(self, context: Context, client: Client) -> Params:
        return truncate(super().keep(context, client), lambda k: self.first_rank(context, client))
