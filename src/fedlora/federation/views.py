"""What is measured of a federation: whose model on whose rows, and the meters over models.

Views: personal (what a client would serve), global (the shared part with fresh personal leaves), unseen (clients that
never trained), cross (client i's model on client j's data).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..data.batches import LocalWork, train_batches
from ..evaluation.analyses import asymmetry, effective_ranks
from ..evaluation.predictions import predict
from ..methods.contract import RoundInfo, ServerState
from ..training.metrics import Scores, summary
from ..tree import Params, select, stack, unstack
from . import generation
from .engine import Engine, Schedule, train_block
from .records import AsymmetryLine, CrossLine, EffectiveRanksLine, EvalLine, Line, SamplesLine
from .setting import Setting, View


def served(f: Setting, engine: Engine, server: ServerState, clients: Sequence[int], view: View) -> list[Params]:
    """Model-ready deltas of each client: its personal model, or the shared part with fresh personal leaves."""
    method, fresh = f.method, view == "global"
    if alike(f) and (fresh or not method.tune):
        down = engine.down(server, f.client(clients[0]))
        one = unstack(method.personal(f.context, stack([down]), {}), 1)[0]
        return [one] * len(clients)
    out: list[Params] = []
    for i in range(0, len(clients), engine.block):
        part = [f.client(k) for k in clients[i : i + engine.block]]
        down_each = [engine.down(server, c) for c in part]
        kept = [method.fresh(f.context, c) if fresh else engine.serving(c, server.round) for c in part]
        if method.tune and not fresh:
            info, tuner = RoundInfo(server.round, max(f.sampling.rounds, server.round + 1)), method.tuner
            plan = LocalWork(method.tune, None, f.plan.batch_size)
            work = [
                train_batches(f.data, k, plan, tuner.draws, f.seed, "tune", server.round, f.data.ids[k])
                for k in clients[i : i + engine.block]
            ]
            # Fresh moments, and the full learning rate.
            kept = [select(p, lambda k: "~" not in k.adapter) for p in kept]
            done = train_block(tuner, f.context, f.loss, info, down_each, kept, work, Schedule(), serve=True)
            out += [r.served for r in done]
        else:
            out += unstack(method.personal(f.context, stack(down_each), stack(kept)), len(part))
    return out


def whole(f: Setting, engine: Engine, server: ServerState) -> Params:
    """Model-ready deltas of the global model: all that the server holds, with fresh personal leaves."""
    down = engine.channel.down(f.method.whole(f.context, server), RoundInfo(server.round, f.sampling.rounds)).params
    kept = f.method.fresh(f.context, f.client(0))
    return unstack(f.method.personal(f.context, stack([down]), stack([kept])), 1)[0]


def alike(f: Setting) -> bool:
    """Whether all clients serve the same deltas (before tuning)."""
    return not f.method.keep(f.context, f.client(0)) and not f.method.per_client


def scores(f: Setting, params: Sequence[Params], clients: Sequence[int], split: str, block: int) -> dict[str, Scores]:
    """Scores of params[j] on the rows that client clients[j] holds in `split`."""
    rows = [f.data.splits[split][k] for k in clients]
    found = predict(f.model, f.task, f.data, params, clients, rows, f.evaluation.batch_size, block)
    return dict(zip((f.data.ids[k] for k in clients), f.task.scores(found), strict=True))


def evaluate(f: Setting, engine: Engine, server: ServerState) -> list[Line]:
    """Lines of metrics for every view and split that has rows."""
    lines: list[Line] = []
    sample = f.evaluation.scored(f.training, f.seed) if f.training else []
    groups: dict[View, list[int]] = {v: sample for v in f.evaluation.views if v in ("personal", "global")}
    if f.data.unseen:
        groups["unseen"] = list(range(f.training, len(f.data.ids)))
    of = f.training if len(sample) < f.training else 0
    seen: dict[tuple[int, str], dict[str, Scores]] = {}  # a method without personal parts serves both views the same
    for view, clients in groups.items():
        twin = view == "global" and alike(f) and not f.method.tune
        splits = [s for s in ("validation", "test") if s in f.data.splits and f.data.splits[s].offsets[-1] > 0]
        found = {s: seen[len(clients), s] for s in splits if twin and (len(clients), s) in seen}
        if left := [s for s in splits if s not in found]:
            found |= by_split(f, engine, server, clients, view, left)
        for split in splits:
            seen[len(clients), split] = found[split]
            lines.append(scored(f, server.round, view, split, found[split], of=0 if view == "unseen" else of))
    if "cross" in f.evaluation.views and server.round == f.sampling.rounds:
        lines.append(cross(f, engine, server))
    if (g := f.evaluation.generation) is not None and g.samples and server.round == f.sampling.rounds:
        lines += samples(f, g, engine, server)
    return lines + (analyse(f, engine, server) if f.evaluation.analyses else [])


def by_split(
    f: Setting, engine: Engine, server: ServerState, clients: Sequence[int], view: View, splits: Sequence[str]
) -> dict[str, dict[str, Scores]]:
    """Scores of every client that has rows, by split. The models of one block at a time are in memory."""
    held = {s: f.data.splits[s].sizes for s in splits}
    asked = [k for k in clients if any(held[s][k] for s in splits)]
    size = len(asked) if alike(f) and (view == "global" or not f.method.tune) else engine.block
    out: dict[str, dict[str, Scores]] = {s: {} for s in splits}
    for i in range(0, len(asked), max(size, 1)):
        part = asked[i : i + size]
        models = dict(zip(part, served(f, engine, server, part, view), strict=True))
        for s in splits:
            have = [k for k in part if held[s][k]]
            own = [models[k] for k in have]
            out[s] |= scores(f, own, have, s, engine.block) if have else {}
            if have and (g := f.evaluation.generation) is not None:
                for id, written in generation.scores(f, g, own, have, s, engine.block).items():
                    out[s][id] |= written
    return out


def scored(
    f: Setting, round: int, view: str, split: str, clients: dict[str, Scores], missing: int = 0, of: int = 0
) -> EvalLine:
    """The record of clients' scores, with their summary. missing: clients with rows whose scores did not arrive; of: the
    clients of which these are a sample, 0 where they are all."""
    s = summary(clients, f.task.lower)
    return EvalLine(round, view, split, clients, s["mean"], s["weighted"], s["worst_decile"], missing, of)


def some(f: Setting) -> list[int]:
    """Up to cross_clients clients, spread over all."""
    n = min(f.evaluation.cross_clients, f.training)
    return [int(k) for k in np.linspace(0, f.training - 1, n).round()]


def analyse(f: Setting, engine: Engine, server: ServerState) -> list[Line]:
    """Effective ranks and likeness of the factors, for up to cross_clients clients."""
    chosen = some(f)
    models = served(f, engine, server, chosen, "personal")
    lines: list[Line] = []
    if "effective-ranks" in f.evaluation.analyses:
        by_client = {
            f.data.ids[k]: effective_ranks(p, f.evaluation.threshold) for k, p in zip(chosen, models, strict=True)
        }
        lines.append(EffectiveRanksLine(server.round, f.evaluation.threshold, by_client))
    if "asymmetry" in f.evaluation.analyses and server.round:
        method, first = f.method, f.client(chosen[0])
        down, kept = method.broadcast(f.context, method.init(f.context), first), method.keep(f.context, first)
        start = unstack(method.personal(f.context, stack([down]), stack([kept])), 1)[0]
        lines.append(AsymmetryLine(server.round, asymmetry(models, start)))
    return lines


def cross(f: Setting, engine: Engine, server: ServerState) -> CrossLine:
    """Client i's model on client j's test data, for up to cross_clients clients spread over all."""
    chosen = some(f)
    n = len(chosen)
    params = served(f, engine, server, chosen, "personal")
    metric = f.task.metric
    matrix = []
    for p in params:
        row = scores(f, [p] * n, chosen, "test", engine.block)
        matrix.append([row[f.data.ids[k]].get(metric, float("nan")) for k in chosen])
    return CrossLine(server.round, "test", metric, [f.data.ids[k] for k in chosen], matrix)


def samples(f: Setting, g: generation.Generation, engine: Engine, server: ServerState) -> list[Line]:
    """What the models of a few clients answer to one question of each of several clients, side by side."""
    split = next((s for s in ("test", "validation") if s in f.data.splits and f.data.splits[s].offsets[-1] > 0), None)
    if split is None:
        return []
    clients = some(f)[:: -(-len(some(f)) // generation.MOST_SAMPLED)]
    held = [k for k in dict.fromkeys([*clients, *range(f.training)]) if f.data.splits[split].sizes[k]]
    owners = held[: g.samples]
    chosen = [generation.asked(f, g, k, split)[0] for k in owners]
    models = served(f, engine, server, clients, "personal")
    found = generation.write(f, g, models, [chosen] * len(clients), engine.block)
    asked = [
        {
            "client": f.data.ids[k],
            "prompt": g.tokenizer.decode(list(q.prompt), skip_special_tokens=True),
            "references": list(q.references),
        }
        for k, q in zip(owners, chosen, strict=True)
    ]
    return [
        SamplesLine(
            server.round, split, asked, {f.data.ids[k]: list(w.answers) for k, w in zip(clients, found, strict=True)}
        )
    ]
