"""Ranks that differ by client: plans that give each client its rank, truncation, and aggregation with zero-padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ..errors import ConfigError, Problem
from ..evaluation.analyses import singular_values
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
    uploads: Iterable[tuple[Upload, Callable[[Key], float]]],
    server: Params,
    rank_max: int,
    guard: bool = True,
    holders: bool = False,
) -> Params:
    """sum_k p_k (leaf of client k, factors zero-padded to rank_max); p_k, which may differ by leaf, is normalised here.

    Weights of a leaf that are all zero count as equal. guard: a component that no cohort member holds keeps its server
    value. Zero in both factors never trains again, so literal padding (guard=False) kills components for good. holders: p_k
    is normalised for each component over the clients that hold it, so that nobody counts as zero.
    """
    held: dict[tuple[str, str], int] = {}
    mass: dict[Key, torch.Tensor] = {}  # of each component: the holders' weights and their number, [2 r], float64
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
            r, v, w = rank(k, v), pad_rank(k, v, rank_max), weight(k)
            if holders and r:
                mass.setdefault(k, torch.zeros(2, rank_max, dtype=torch.float64))[:, :r] += torch.tensor(
                    [[w], [1.0]], dtype=torch.float64
                )
            total[k] = total.get(k, 0.0) + w
            weighted[k] = v * w if k not in weighted else weighted[k] + v * w
            plain[k] = v.clone() if k not in plain else plain[k] + v
    new = {k: v / total[k] if total[k] > 0 else plain[k] / n for k, v in weighted.items()}
    for k, (w, number) in mass.items():
        if bool((number == n).all()):
            continue  # all clients hold all components: the plain mean, to the last bit
        across = lambda x, k=k, v=new[k]: x.clamp_min(1e-300).view(-1, 1) if k.part == "A" else x.clamp_min(1e-300)  # noqa: E731
        new[k] = (weighted[k] / across(w) if total[k] > 0 else plain[k] / across(number)).to(plain[k].dtype)
    if guard:
        for k, v in new.items():
            r = held.get((k.adapter, k.layer), rank_max)
            if rank(k, v) and r < rank_max:
                axis = -2 if k.part == "A" else -1
                rest = server[k].narrow(axis, r, rank_max - r)
                new[k] = torch.cat([v.narrow(axis, 0, r), rest], axis)
    return new


class Stacked(NamedTuple):
    """Factors side by side: b [o n], a [n i] with b @ a = sum_k p_k B_k A_k, p_k normalised."""

    b: torch.Tensor
    a: torch.Tensor
    component: torch.Tensor  # [n] which component of its client a column is
    share: torch.Tensor  # [n] the client's p_k, float64

    def held(self, r: int) -> torch.Tensor:
        """P_i [r], float64: the share of clients that hold component i; exactly 1 where all do."""
        mass = torch.zeros(r, dtype=torch.float64).index_add(0, self.component, self.share)
        return torch.where(mass > 1 - 1e-9, 1.0, mass)


def stacked(uploads: Iterable[Upload], weight: Callable[[Upload], float]) -> tuple[Params, dict[str, Stacked]]:
    """(mean of the other leaves, layer -> stacked factors)."""
    bs: dict[str, list[torch.Tensor]] = {}
    rows: dict[str, list[torch.Tensor]] = {}
    weights: list[float] = []

    def rest() -> Iterable[tuple[Params, float]]:
        for u in uploads:
            p = weight(u)
            weights.append(p)
            for k, v in u.params.items():
                if k.part in ("A", "B"):
                    (rows if k.part == "A" else bs).setdefault(k.layer, []).append(v * p**0.5)
            yield select(u.params, lambda k: k.part not in ("A", "B", "rank")), p

    new, out = mean(rest()), {}
    total = sum(weights)
    for layer, b in bs.items():
        sizes = torch.tensor([v.shape[1] for v in b])
        share = torch.tensor(weights, dtype=torch.float64).repeat_interleave(sizes) / total
        component = torch.cat([torch.arange(int(n)) for n in sizes])
        out[layer] = Stacked(torch.cat(b, 1) / total, torch.cat(rows[layer], 0), component, share)
    return new, out


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
    def collapses(self) -> bool:
        """Whether a client counts as zero in the components that it does not hold."""
        return False

    def caution(self, context: Context, clients: Iterable[Client]) -> str:
        ranks = {self.first_rank(context, c) for c in clients}
        if not self.collapses or len(ranks) < 2:
            return ""
        return (
            f"clients have ranks from {min(ranks)} to {max(ranks)}, and count as zero beyond their own: what the server learns beyond "
            f"rank {min(ranks)} shrinks from round to round. method.padding: holders keeps it"
        )

    def record(self, server: ServerState) -> dict[str, Any]:
        """spectrum: share of each component in the energy (squared singular values) of the server's B A, all layers together.

        In millionths: the last bits of singular values follow where in memory the factors lie, and a resumed run's are elsewhere.
        """
        energy = torch.zeros(self.rank, dtype=torch.float64)
        for k, a in server.params.items():
            kb = k._replace(part="B")
            if k.part == "A" and k.adapter == self.label and kb in server.params:
                s = singular_values(server.params[kb].double(), a.double())[: self.rank]
                energy[: len(s)] += s.square()
        total = float(energy.sum())
        return {"spectrum": [round(x, 6) for x in (energy / total).tolist()]} if total > 0 else {}

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
