"""What would run: the facts that `fedlora check` tells of a setting. Nothing is trained here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..layers import Layer
from ..methods.contract import Client, RoundInfo, ServerState, Upload
from .channel import first_upload
from .guards.guard import Guard
from .setting import Setting
from .summary import operators

LISTED = 1000  # clients whose classes are listed one by one
PRICED = 64  # clients whose messages are measured one by one; a larger cohort is extrapolated from them


def round_bytes(f: Setting, server: ServerState, cohort: Sequence[Client]) -> dict[str, int]:
    """Bytes of a first round, both ways: every client's messages are built and measured."""
    channel, info = f.channel, RoundInfo(server.round, f.sampling.rounds)
    sent = {"down": 0, "up": 0}
    some = cohort[:PRICED]
    for c in some:
        down = channel.down(f.method.broadcast(f.context, server, c), info)
        up = first_upload(f.method, f.context, info, down.params, c)
        sent["down"] += down.traffic.total
        sent["up"] += channel.up(up, down.params, {}, info, c).traffic.total
    return {d: n * len(cohort) // len(some) for d, n in sent.items()}


def stages(f: Setting) -> list[tuple[int, ServerState]]:
    """(rounds done when it begins, the server's leaves then) of every stage of the method, and of every phase; one for most.

    The leaves have the shapes of a run's, and the values of a start. A stage that begins by the scores is taken to begin at
    the latest round that the method allows.
    """
    server = f.method.init(f.context)
    out, growing = [(0, server)], f.method.grows
    for t in range(1, f.sampling.rounds):
        ended = _untrained(f, server) if growing else replace(server, round=t)
        new = f.method.advance(f.context, ended)
        changed = _shapes(new) != _shapes(server)
        growing = growing and changed
        if changed or f.method.phase(t) != f.method.phase(t - 1):
            out.append((t, new))
        server = new
    return out


def kind(f: Setting, round: int, server: ServerState) -> object:
    """Equal for rounds whose messages and steps have the same shapes."""
    return f.method.phase(round), _shapes(server)


def _shapes(server: ServerState) -> object:
    return tuple((k, v.shape) for k, v in server.params.items())


def _untrained(f: Setting, server: ServerState) -> ServerState:
    """The server after a round in which nobody trains: its leaves have the shapes of a run's."""
    info, cohort = RoundInfo(server.round, f.sampling.rounds), f.cohort(server.round)
    down = {c: f.method.broadcast(f.context, server, c) for c in cohort}
    ups = (Upload(c, first_upload(f.method, f.context, info, p, c)) for c, p in down.items())
    return f.method.aggregate(f.context, server, ups)


def run_bytes(f: Setting, cohort: Sequence[Client]) -> dict[str, int]:
    """Bytes of a whole run, both ways, if every round has such a cohort and nobody prunes a rank."""
    found = stages(f)
    ends = [t for t, _ in found[1:]] + [f.sampling.rounds]
    sent = {"down": 0, "up": 0}
    known: dict[object, dict[str, int]] = {}
    for (start, server), end in zip(found, ends, strict=True):
        at = kind(f, start, server)
        each = known[at] = known.get(at) or round_bytes(f, server, cohort)
        sent = {d: n + each[d] * (end - start) for d, n in sent.items()}
    return sent


@dataclass(frozen=True)
class RunFacts:
    """What would run. Counts are of scalars, bytes of encoded messages.

    numbers, attention and kernels say in what and by which operators the base computes, and why.
    layers: modules that get adapters, a number in their names as "*", with how many there are and their shape out x in.
    caution: what the method warns of, "" for nothing.
    block: clients that would be trained at once. histogram: training rows of the first LISTED clients [clients classes],
    () without classes; class_rows, class_clients: training rows of each class, and clients that have some; classes_held: of each client.
    """

    method: str
    caution: str
    device: str
    numbers: str
    attention: str
    kernels: str
    sites: int
    layers: Mapping[str, Sequence[tuple[str, int, str]]]
    rows: Mapping[str, int]
    truncated: int
    clients: int
    unseen: int
    cohort: int
    block: int
    rounds: int
    steps: int
    parameters: Mapping[str, int]
    bytes_per_round: Mapping[str, int]
    bytes: Mapping[str, int]
    guards: Sequence[str]
    ids: Sequence[str]
    sizes: Sequence[int]
    label_names: Sequence[str]
    histogram: Sequence[Sequence[int]]
    class_rows: Sequence[int]
    class_clients: Sequence[int]
    classes_held: Sequence[int]


def facts(f: Setting, block: int) -> RunFacts:
    """The facts of a setting. block: clients that would be trained at once."""
    cohort = f.cohort(0)
    if f.sampling.cohort == "poisson":  # a typical cohort, which is never empty
        cohort = [f.client(k) for k in range(max(1, round(f.sampling.expected(f.training))))]
    train = f.data.splits["train"]
    held = f.data.histogram("train") if f.data.label_names else np.zeros((0, 0), np.int64)
    config = getattr(f.model.base, "config", None)
    return RunFacts(
        method=repr(f.method),
        caution=f.method.caution(f.context, (f.client(k) for k in range(f.training))),
        device=str(f.model.device),
        numbers=f.numbers or str(f.model.dtype).removeprefix("torch."),
        attention=getattr(config, "_attn_implementation", None) or "",
        kernels=operators(f.model),
        sites=len(f.model.groups["target"]),
        layers={g: named(layers) for g, layers in f.model.groups.items() if layers},
        rows={s: int(r.offsets[-1]) for s, r in f.data.splits.items()},
        truncated=f.data.truncated,
        clients=f.training,
        unseen=f.data.unseen,
        cohort=len(cohort),
        block=min(block, len(cohort)),
        rounds=f.sampling.rounds,
        steps=f.plan.count(int(train.sizes.max()), f.method.draws),
        parameters=f.parameters(),
        bytes_per_round=round_bytes(f, f.method.init(f.context), cohort),
        bytes=run_bytes(f, cohort),
        guards=[repr(g) + cost(f, g) for g in f.sampling.guards],
        ids=list(f.data.ids),
        sizes=train.sizes.tolist(),
        label_names=list(f.data.label_names),
        histogram=held[:LISTED].tolist(),
        class_rows=held.sum(0).tolist(),
        class_clients=(held > 0).sum(0).tolist(),
        classes_held=(held > 0).sum(1).tolist(),
    )


def cost(f: Setting, g: Guard) -> str:
    """What a guard that spends a privacy budget will have spent after all rounds; "" for others."""
    p = f.private
    if p is None or p.rule is not g:
        return ""
    spent = p.mechanism.epsilon(f.sampling.rounds, p.rule.delta)
    return f": epsilon {spent:.3g} at delta {p.rule.delta:g} after {f.sampling.rounds} rounds, with noise {p.mechanism.noise:g}"


def named(layers: Sequence[Layer]) -> list[tuple[str, int, str]]:
    """Layers whose names differ in a number alone, together: (name with "*", how many, shape), in the base's order."""
    found: dict[tuple[str, str], int] = {}
    for s in layers:
        key = re.sub(r"(?<![^.])\d+(?![^.])", "*", s.name), f"{s.out} x {s.in_}"
        found[key] = found.get(key, 0) + 1
    return [(name, n, shape) for (name, shape), n in found.items()]
