"""The guard secagg at work: one round of the protocol between objects of one process (guards/secagg.py says which)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

from ..methods.contract import Client, ServerState, Upload
from ..seeds import np_rng, number
from ..tree import Params
from .guards.guard import Guard
from .guards.secagg import SecAgg
from .secagg import Hub, Member, fixed, graph, real, step


class Round(Guard):
    """One aggregation. cost: bytes up and down, and seconds, of a client in the mean."""

    name = SecAgg.name
    title = SecAgg.title

    def __init__(self, rule: SecAgg, like: Callable[[], Params], weight: Callable[[Upload], float]):
        self.rule, self.like, self.weight = rule, like, weight
        self.hub: Hub | None = None
        self.cost: dict[str, float] = {}

    def arrive(self, uploads: Iterable[Upload], server: ServerState) -> Iterable[Upload]:
        seen = list(uploads)
        if len(seen) < 3:
            yield from seen  # a sum of two tells each client the other's
            return
        x = {k: server.params[k] for k in sorted(self.like())}
        raw = [self.weight(u) for u in seen]
        weights = [w / max(raw) for w in raw]
        n, size = len(seen), sum(v.numel() for v in x.values())
        grain = step(self.rule.range, n)
        near = graph(n, self.rule.neighbours, number("secagg", server.round))
        threshold = max(2, math.ceil(self.rule.threshold * min(map(len, near))))
        self.hub = hub = Hub(near, threshold, size)
        start = time.perf_counter()
        members = [Member(i, near[i], threshold) for i in range(n)]
        hub.introduce(members)
        gone = set(np_rng("secagg", server.round).permutation(n)[: int(self.rule.vanish * n)].tolist())
        for m, u, w in zip(members, seen, weights, strict=True):
            if m.id not in gone:
                flat = torch.cat([(u.params[k].double() - v.double()).flatten() for k, v in x.items()]).numpy() * w
                hub.add(m.id, m.masked(fixed(flat, grain, self.rule.range)))
        answers = {m.id: m.unmask(hub.sent, gone) for m in members if m.id not in gone}
        total = real(hub.open(answers), grain) / sum(w for i, w in enumerate(weights) if i not in gone)
        near_mean = float(np.mean([len(g) for g in near]))
        self.cost = {
            "up": 64 + near_mean * (92 + 32) + 4 * size,
            "down": near_mean * (64 + 92),
            "seconds": (time.perf_counter() - start) / n,
        }
        parts = torch.from_numpy(total).split([v.numel() for v in x.values()])
        mean = {k: (v.double() + d.view(v.shape)).to(v.dtype) for (k, v), d in zip(x.items(), parts, strict=True)}
        yield Upload(Client("the mean of the round", 1), mean)
