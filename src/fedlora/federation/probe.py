"""What a run takes, measured: a few local steps of its largest block and a part of an evaluation, all thrown away.

Memory is the resident set of this process at its peak, Python and its libraries included: the number that a run records
as its largest memory. Time is that of the tried steps and rows, for each token, times the tokens of a whole run.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..evaluation.predictions import predict
from ..methods.contract import Client, RoundInfo, ServerState, Upload
from ..model.adapted import Batch
from ..tree import Params, count
from . import views
from .engine import Engine, Schedule, blocks, in_order
from .facts import kind, stages
from .memory import client_bytes, forget_peak, free_bytes, kept, peak_memory, resident
from .run import EXACTNESS_COHORT
from .setting import POOLED, Setting, View

TIMED = 3  # steps that are timed after the one that warms up
LONG = 3.0  # seconds of a first step from which on no more are tried
MOST_STAGES = 3  # a server that grows with every round has a stage a round
MARGIN = 0.9  # of the free memory that a block may take by the estimate, to be tried at all


@dataclass(frozen=True)
class Cost:
    """What a run takes. Bytes of memory: `program` for Python and its libraries, `loaded` for the base and the data,
    `training` for the largest block and an evaluation; `device` is an accelerator's own, 0 where there is none.

    block: clients trained at once that fitted. step: seconds of one local step of a whole block; round, evaluation:
    seconds of all clients' work; seconds: of the whole run. tried: whether a step was tried; where not, `training` is
    estimated, the times are 0 and `why` says the reason.
    """

    block: int
    program: int
    loaded: int
    training: int
    device: int = 0
    step: float = 0.0
    round: float = 0.0
    evaluation: float = 0.0
    seconds: float = 0.0
    tried: bool = True
    why: str = ""

    @property
    def memory(self) -> int:
        """Largest resident set of the process, bytes."""
        return self.program + self.loaded + self.training


@dataclass
class _Stage:
    """What was measured of one stage of a method."""

    rate: float  # seconds of a token (of a row, where rows have no tokens) in a local step
    fixed: float  # seconds of a block beside its steps
    step: float  # seconds of a local step of the tried block
    round: float  # seconds of the whole cohort's round
    upload: int  # bytes of a client's leaves that the server gets
    block: int


def probe(f: Setting, block: int, program: int = 0) -> Cost:
    """Try a run of `f` with so many clients at once. program: resident bytes before its base and data were loaded."""
    gc.collect()
    start = resident()
    guess = estimated(f, block, program)
    free = free_bytes(f.model.device)
    if guess.training > MARGIN * free:
        why = f"{guess.training / 1e9:.1f} GB by estimate, {free / 1e9:.1f} GB are free"
        return replace(guess, why=why)
    forget_peak()
    accelerator = f.model.device.type == "cuda"
    if accelerator:
        torch.cuda.reset_peak_memory_stats(f.model.device)
    with kept():
        try:
            found = stages(f)
            # In a run's own order, since steps use what an evaluation has freed, as far as it fits.
            _evaluation(f, min(block, len(f.cohort(0))), found[0][1])
            measured = _stages(f, block, found)
            evaluation = _evaluation(f, measured[-1].block, found[-1][1])
        finally:
            f.model.bind({})
        peak = peak_memory()
    device = int(torch.cuda.max_memory_reserved(f.model.device)) if accelerator else 0
    ends = [t for t, _ in found[1:]] + [f.sampling.rounds]
    training = sum(m.round * (end - t) for m, (t, _), end in zip(measured, found, ends, strict=True))
    evaluations = 1 + sum(
        t % f.evaluation.every == 0 or t == f.sampling.rounds for t in range(1, f.sampling.rounds + 1)
    )
    return Cost(
        block=min(m.block for m in measured),
        program=guess.program,
        loaded=guess.loaded,
        training=max(peak - start, 0) + _held(f, measured, block),
        device=device,
        step=measured[0].step,
        round=training / f.sampling.rounds,
        evaluation=evaluation,
        seconds=training + evaluation * evaluations,
    )


def estimated(f: Setting, block: int, program: int = 0) -> Cost:
    """The cost of `f` by a formula (memory.py), with nothing tried and no times."""
    start, clients = resident(), min(block, len(f.cohort(0)))
    known = min(program, start)
    return Cost(clients, known, start - known, client_bytes(f) * clients, tried=False)


def _stages(f: Setting, block: int, found: Sequence[tuple[int, ServerState]]) -> list[_Stage]:
    """Every stage, measured; alike ones once, and of more than MOST_STAGES some that stand for the ones after them."""
    first: dict[object, int] = {}
    for i, (t, server) in enumerate(found):
        first.setdefault(kind(f, t, server), i)
    chosen = set(np.unique(np.linspace(0, len(first) - 1, MOST_STAGES).round()).astype(int).tolist())
    known: dict[object, _Stage] = {}
    for n, (k, i) in enumerate(first.items()):
        known[k] = _stage(f, block, found[i][1]) if n in chosen else known[list(first)[n - 1]]
    return [known[kind(f, t, server)] for t, server in found]


def _held(f: Setting, measured: Sequence[_Stage], block: int) -> int:
    """Uploads that a run holds at once and the probe did not: the exactness meter keeps those of a whole cohort."""
    cohort = len(f.cohort(0))
    if not f.evaluation.exactness or cohort > EXACTNESS_COHORT:
        return 0
    return max(cohort - block, 0) * max(m.upload for m in measured)


def _stage(f: Setting, block: int, server: ServerState) -> _Stage:
    """One stage of a method, whose server is `server`: local steps of the block with the largest clients."""
    cohort = f.cohort(server.round)
    info = RoundInfo(server.round, f.sampling.rounds)
    some = in_order(cohort)[:block]
    draws = {c.id: f.method.draws_for(f.method.broadcast(f.context, server, c)) for c in some}
    work = {c.id: f.batches(c, info, draws[c.id]) for c in some}
    steps = _heaviest_first(work, draws)
    tried = _Tried(f, work, draws, block)
    cold, _, upload = tried(server, some, steps[:1])
    if cold > LONG:
        seconds, fixed, used = cold, 0.0, steps[:1]
    else:
        used = [steps[1 + i % (len(steps) - 1)] if len(steps) > 1 else steps[0] for i in range(TIMED)]
        total, stamps, _ = tried(server, some, used)
        each = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
        seconds, fixed = each * len(used), max(total - each * len(used), 0.0)
    tokens = sum(_weight(b) for t in used for c in some for b in _at(work[c.id], t, draws[c.id]))
    rate = seconds / max(tokens, 1)
    whole = sum(_block_seconds(f, part, info, rate, draws[some[0].id]) + fixed for part in blocks(cohort, tried.block))
    return _Stage(rate, fixed, seconds / len(used), whole, upload, min(tried.block, len(some)))


class _Tried:
    """Calls train a block on some steps alone and throw the result away."""

    def __init__(self, f: Setting, work: Mapping[str, Sequence[Batch]], draws: Mapping[str, int], block: int):
        self.f, self.work, self.draws, self.block = f, work, draws, block
        self.stamps: dict[int, float] = {}

    def __call__(
        self, server: ServerState, clients: Sequence[Client], steps: Sequence[int]
    ) -> tuple[float, list[float], int]:
        """(seconds of all, when each step of the first block began, bytes of an upload)."""
        f, uploads = self.f, list[Upload]()
        cut = {c.id: [b for t in steps for b in _at(self.work[c.id], t, self.draws[c.id])] for c in clients}
        self.stamps.clear()
        engine = Engine(
            f.method, f.context, f.loss, lambda c, info, n: cut[c.id], lambda id, r: None, lambda id, r, p: None,
            self.pace, self.block, 1, f.channel, on_lowered=self.lowered,
        )  # fmt: skip
        begin = time.perf_counter()
        engine.round(replace(server, notes=dict(server.notes)), f.sampling.rounds, clients, uploads.append)
        sent = count(uploads[0].params) * 4 if uploads else 0
        return time.perf_counter() - begin, [self.stamps[i] for i in sorted(self.stamps)], sent

    def pace(self, info: RoundInfo, step: int, steps: int) -> float:
        """The engine asks for a step's learning rate when the step begins."""
        self.stamps.setdefault(step, time.perf_counter())
        return self.f.schedule(info, step, steps)

    def lowered(self, block: int, clients: int) -> None:
        """The block did not fit and is tried in halves."""
        self.block = block
        self.stamps.clear()


def _weight(batch: Batch) -> int:
    """Tokens of a batch; its rows where they have no tokens."""
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else len(batch["labels"])


def _at(batches: Sequence[Batch], step: int, draws: int) -> Sequence[Batch]:
    """The minibatches of a client's step; a client with fewer steps stays at its last."""
    t = min(step, len(batches) // draws - 1)
    return batches[t * draws : (t + 1) * draws]


def _heaviest_first(work: Mapping[str, Sequence[Batch]], draws: Mapping[str, int]) -> list[int]:
    """Up to TIMED + 1 steps: the one with the most tokens, which takes the most memory, and others from the first to the last."""
    n = max(len(b) // draws[id] for id, b in work.items())
    tokens = [sum(_weight(b) for id, mine in work.items() for b in _at(mine, t, draws[id])) for t in range(n)]
    top = int(np.argmax(tokens))
    rest = [t for t in range(n) if t != top]
    return [top, *(rest[i] for i in sorted({int(x) for x in np.linspace(0, len(rest) - 1, TIMED)} if rest else set()))]


def _block_seconds(f: Setting, part: Sequence[Client], info: RoundInfo, rate: float, draws: int) -> float:
    """Local work of one block: all its clients compute for as long as the one with the most steps."""
    train, steps, tokens = f.data.splits["train"], 0, 0.0
    for c in part:
        rows = train.rows[: train.offsets[f.training]] if c.id == POOLED else train[f.index[c.id]]
        steps = max(steps, f.plan.count(len(rows), draws))
        each = min(f.plan.batch_size, len(rows))
        tokens += float(f.data.examples.lengths(rows).mean()) * each * draws if len(rows) else 0.0
    return rate * steps * tokens


def _evaluation(f: Setting, block: int, server: ServerState) -> float:
    """Seconds of one evaluation. A part of it is tried: the longest rows of a block, and others."""
    splits = [s for s in ("validation", "test") if s in f.data.splits and f.data.splits[s].offsets[-1] > 0]
    groups: list[tuple[View, range]] = [
        (v, range(f.training)) for v in f.evaluation.views if v in ("personal", "global")
    ]
    if f.data.unseen:
        groups.append(("unseen", range(f.training, len(f.data.ids))))
    if not splits or not groups:
        return 0.0
    engine = Engine(
        f.method, f.context, f.loss, f.batches, lambda id, r: None, lambda id, r, p: None, Schedule(), block, 1, f.channel
    )  # fmt: skip
    view, group = groups[0]
    held = {s: f.data.splits[s] for s in splits}
    most = np.sum([r.sizes for r in held.values()], axis=0)
    clients = sorted((k for k in group if most[k]), key=lambda k: -int(most[k]))[:block]
    if not clients:
        return 0.0
    begin = time.perf_counter()
    models = dict(zip(clients, views.served(f, engine, server, clients, view), strict=True))
    tuned = (time.perf_counter() - begin) / len(clients) if f.method.tune else 0.0
    seconds, tokens = 0.0, 0
    for rows in held.values():
        have = [k for k in clients if rows.sizes[k]]
        spent, n = _answered(f, [models[k] for k in have], have, [rows[k] for k in have], block) if have else (0.0, 0)
        seconds, tokens = seconds + spent, tokens + n
    total, twins = 0.0, views.alike(f) and not f.method.tune
    seen: set[int] = set()
    for name, members in groups:
        if twins and len(members) in seen:
            continue  # the same models as of a view before
        seen.add(len(members))
        asked = np.concatenate([r.rows[_span(r.offsets, members)] for r in held.values()])
        total += seconds / max(tokens, 1) * float(f.data.examples.lengths(asked).sum())
        total += tuned * len(members) if name != "global" else 0.0
    return total


def _span(offsets: np.ndarray, members: range) -> slice:
    return slice(int(offsets[members.start]), int(offsets[members.stop]))


def _answered(
    f: Setting, models: Sequence[Params], clients: Sequence[int], rows: Sequence[np.ndarray], block: int
) -> tuple[float, int]:
    """(seconds, tokens) of answers to two batches: the longest rows, and some of the others."""
    same = len({id(p) for p in models}) == 1
    each = max(1, f.evaluation.batch_size // (1 if same else len(models)))
    if same:
        models, clients, rows = models[:1], clients[:1], [np.concatenate(rows)]
    lengths = f.data.examples.lengths
    chosen = [_longest_and_some(r[np.argsort(-lengths(r), kind="stable")], each) for r in rows]
    begin = time.perf_counter()
    predict(f.model, f.task, f.data, models, clients, chosen, f.evaluation.batch_size, block)
    return time.perf_counter() - begin, int(sum(lengths(r).sum() for r in chosen))


def _longest_and_some(rows: np.ndarray, n: int) -> np.ndarray:
    """Of rows that are sorted, longest first: the first n, and n spread over the rest."""
    rest = rows[n:]
    return (
        np.concatenate([rows[:n], rest[np.unique(np.linspace(0, len(rest) - 1, n).astype(int))]]) if len(rest) else rows
    )
