"""In-process runtime: clients trained a block at a time over one frozen base.

Equal to training them one at a time, dropout included; blocks only make it faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch

from ..arguments import Checked
from ..errors import ConfigError, Problem, TrainingError, UploadError
from ..methods.contract import Client, Context, Method, RoundInfo, ServerState, Upload
from ..model.adapted import Batch
from ..training.batching import row_lengths, stack_batches
from ..training.loss import Loss
from ..training.optimizers import schedule
from ..tree import Params, apart, stack, unstack, where
from . import wire
from .channel import Channel, Declared, Sent
from .private import Placed

# What an allocator without an error class of its own says: PyTorch's on the CPU, and oneDNN's.
REFUSED = ("DefaultCPUAllocator", "could not create a primitive", "could not create a memory object")
Pace = Callable[[RoundInfo, int, int], float]  # (round, step, steps of this client) -> learning-rate factor


@dataclass(frozen=True)
class Schedule(Checked):
    """Learning-rate schedule over the whole run: all rounds and local steps are one line, so warm-up never restarts."""

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= 1:
            raise ConfigError([Problem("Schedule.warmup", self.warmup, "a share of the run from 0 to 1")])

    def __call__(self, info: RoundInfo, step: int, steps: int) -> float:
        return schedule(self.kind, self.warmup, (info.round + (step + 0.5) / steps) / max(info.rounds, 1))


@dataclass
class Trained:
    """What one client's local work gave."""

    upload: Params
    kept: Params
    metrics: dict[str, float]
    served: Params = field(default_factory=dict)  # filled only if the caller asked for models to serve
    sent: Sent | None = None  # the upload as it travels and arrives; `kept` then holds what guards keep as well


def train_block(
    method: Method,
    context: Context,
    loss: Loss,
    info: RoundInfo,
    down: Sequence[Params],
    kept: Sequence[Params],
    batches: Sequence[Sequence[Batch]],
    pace: Pace,
    serve: bool = False,
    tick: Callable[[int, int], None] = lambda done, steps: None,
) -> list[Trained]:
    """Train K clients in lockstep; a client that runs out of batches waits unchanged.

    down, kept: one tree per client, no client axis. batches: per client, `method.draws` of them a step.
    serve: also give what each client serves from where it stands. tick: hears after each step how many of how many are done.
    """
    if clash := down[0].keys() & kept[0].keys():
        raise ValueError(
            f"{method.title}: every leaf has one owner, but server and client own {sorted(map(str, clash))}"
        )
    device, d = loss.model.device, method.draws_for(down[0])
    work = method.begin(context, info, _to(stack(down), device), _to(stack(kept), device))
    bound = work.get("bound")  # frozen leaves of the server: part of the model, and no leaf of the method's
    loss = loss.beside(bound) if bound else loss
    steps = [len(b) // d for b in batches]
    seen: dict[str, list[torch.Tensor]] = {}
    alive = []
    for t in range(max(steps)):
        now = [b[d * min(t, n - 1) :][:d] for b, n in zip(batches, steps, strict=True)]  # [client][draw]
        draws = [_to_batch(stack_batches(draw), device) for draw in zip(*now, strict=True)]
        lr = torch.tensor([pace(info, min(t, n - 1), n) for n in steps], dtype=torch.float64)
        new, metrics = method.step(work, loss, lr, *draws)
        alive.append(torch.tensor([t < n for n in steps]))
        work = where(alive[-1], new, work)
        for name, v in metrics.items():
            seen.setdefault(name, []).append(v)
        tick(t + 1, max(steps))
    live = torch.stack(alive).double()  # [steps K]
    means = {n: _mean(torch.stack(v).double().cpu(), live) for n, v in seen.items()}
    served = method.served(work) | (bound or {}) if serve else {}
    up, mine = method.finish(work)
    k = len(down)
    out = []
    for j, (p, s) in enumerate(zip(unstack(_to(up | mine, "cpu"), k), unstack(_to(served, "cpu"), k), strict=True)):
        # Unstacking cuts every leaf to its client's rank, so it comes before the two are told apart.
        upload, kept_ = (
            {key: p[key] for key in up},
            {key: p[key] for key in mine},
        )
        out.append(Trained(upload, kept_, {n: float(v[j]) for n, v in means.items()}, s))
    return out


def _mean(values: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Mean over a client's own steps, [steps K] -> [K]; what a waiting client computed does not count."""
    return torch.where(live > 0, values, 0.0).sum(0) / live.sum(0)


def _to(p: Params, device: torch.device | str) -> Params:
    # Step counters stay on the CPU, where the optimizer reads them.
    return {k: v if k.part == "steps" else v.to(device) for k, v in p.items()}


def _to_batch(batch: Batch, device: torch.device) -> Batch:
    """Tensors that the model reads go to the device; bookkeeping stays where the host reads it.

    Away from the CPU the lengths of the rows are counted here and go along as "tokens": to ask the device for them would
    make the host wait for it in every step. Nor does the host wait until the device has copied the batch.
    """
    if device.type == "cpu":
        return batch
    there = {n: v if n == "common" else v.to(device, non_blocking=True) for n, v in batch.items()}
    lengths = row_lengths(batch)
    return there if lengths is None else there | {"tokens": lengths}


class Effort(NamedTuple):
    """What a client's local work was: optimizer steps, rows in their minibatches (all draws of a step), real tokens."""

    steps: int
    rows: int
    tokens: int

    @classmethod
    def of(cls, batches: Sequence[Batch], draws: int) -> Effort:
        """Of a client's minibatches, of which a step takes `draws`."""
        rows = sum(len(next(iter(b.values()))) for b in batches)
        tokens = sum(int(b["attention_mask"].sum()) for b in batches if "attention_mask" in b)
        return cls(len(batches) // draws, rows, tokens)


@dataclass
class RoundLog:
    """What a round tells its caller beside the next server."""

    losses: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    up: wire.Traffic = field(default_factory=wire.Traffic)
    down: wire.Traffic = field(default_factory=wire.Traffic)
    examples: int = 0
    tokens: int = 0
    steps: int = 0  # local ones of all clients, and the rows that they saw; 0 where sites do not tell
    rows: int = 0
    cohort: Sequence[str] | None = None  # the clients that were asked, if they are others than planned


@dataclass
class Engine:
    """One method over one model and its clients' data.

    batches(client, order, draws) gives a client's minibatches of a round; load and save are the store of kept leaves.
    """

    method: Method
    context: Context
    loss: Loss
    batches: Callable[[Client, RoundInfo, int], Sequence[Batch]]
    load: Callable[[str, int], Params | None]
    save: Callable[[str, int, Params], None]
    pace: Pace = Schedule()
    block: int = 8
    min_clients: int = 1
    channel: Channel = Channel()
    on_block: Callable[[int], None] = lambda n: None
    on_lowered: Callable[[int, int], None] = lambda block, clients: None
    on_step: Callable[[int, int], None] = lambda done, steps: None
    received: Callable[[Client], Params] | None = None  # only at a site: the broadcast that came for this client

    def down(self, server: ServerState, client: Client) -> Params:
        """What this client receives, as it arrives."""
        if self.received is not None:
            return self.received(client)
        return self.channel.down(self.method.broadcast(self.context, server, client), RoundInfo(server.round, 0)).params

    def kept(self, client: Client, round: int) -> Params:
        """A client's personal leaves as of its last accepted upload before `round`."""
        return self._kept(client, round)[0]

    def serving(self, client: Client, round: int) -> Params:
        """The personal leaves with which a client is served: `kept`, or those of a client that has never trained."""
        own, _ = apart(self.load(client.id, round) or {})
        return own or self.method.fresh(self.context, client)

    def _kept(self, client: Client, round: int) -> tuple[Params, Params]:
        """(personal leaves, what the channel's guards keep) of a client before `round`."""
        own, guards = apart(self.load(client.id, round) or {})
        return own or self.method.keep(self.context, client), guards

    def round(
        self, server: ServerState, rounds: int, cohort: Sequence[Client], see: Callable[[Upload], None] = lambda u: None
    ) -> tuple[ServerState, RoundLog]:
        """Train `cohort` and aggregate; `see` looks at every accepted upload.

        Raises TrainingError when fewer than min_clients uploads are acceptable.
        """
        log = RoundLog()
        info = RoundInfo(server.round, rounds)

        def uploads() -> Iterator[Upload]:
            for u in self._uploads(server, info, cohort, log):
                see(u)
                yield u

        if not cohort and not any(isinstance(g, Placed) for g in self.channel.guards):
            return replace(server, round=server.round + 1), log  # nobody was drawn, so nothing has changed
        return self.channel.aggregate(self.method, self.context, server, uploads()), log

    def _uploads(
        self, server: ServerState, info: RoundInfo, cohort: Sequence[Client], log: RoundLog
    ) -> Iterator[Upload]:
        accepted = 0
        sent: Sent | None = None  # what all clients receive is encoded once
        declared = Declared(self.method, self.context, info)
        specs: dict[str, wire.Spec] = {}

        def down(c: Client) -> Params:
            nonlocal sent
            if sent is None or self.method.per_client:
                sent = self.channel.down(self.method.broadcast(self.context, server, c), info)
            log.down += sent.traffic
            specs[c.id] = declared(sent.params, c)
            return sent.params

        for c, r, effort in self.train(info, cohort, down):
            log.losses[c.id] = r.metrics.get("loss", float("nan"))
            log.tokens += effort.tokens
            log.steps += effort.steps
            log.rows += effort.rows
            assert r.sent is not None
            log.up += r.sent.traffic
            try:
                upload = self.channel.accept(r.sent.params, specs.pop(c.id))
                wire.finite(r.kept)  # a client that keeps all it trains would otherwise never be refused
            except UploadError as e:
                log.refused[c.id] = str(e)
                continue
            self.save(c.id, info.round, r.kept)
            accepted += 1
            log.examples += c.examples
            yield Upload(c, upload, r.metrics)
        enough(info.round, accepted, len(cohort), self.min_clients, log.refused)

    def train(
        self, info: RoundInfo, cohort: Sequence[Client], down: Callable[[Client], Params]
    ) -> Iterator[tuple[Client, Trained, Effort]]:
        """Every client's local work of a round with its message, and what it was; a block at a time."""
        for clients in blocks(cohort, self.block):
            received = [down(c) for c in clients]
            draws = [self.method.draws_for(p) for p in received]
            work = [self.batches(c, info, n) for c, n in zip(clients, draws, strict=True)]
            stored = [self._kept(c, info.round) for c in clients]
            results = self._trained(info, received, [own for own, _ in stored], work)
            each = zip(clients, results, received, stored, work, draws, strict=True)
            for c, r, down_, (_, guards), batches, n in each:
                r.sent = self.channel.up(r.upload, down_, guards, info, c)
                r.kept |= r.sent.kept
                yield c, r, Effort.of(batches, n)
            self.on_block(len(clients))

    def _trained(
        self, info: RoundInfo, down: Sequence[Params], kept: Sequence[Params], work: Sequence[Sequence[Batch]]
    ) -> list[Trained]:
        """`train_block` of these clients; in halves where it runs out of memory, and all later blocks as small."""
        n = len(work)
        if n <= self.block:
            try:
                return train_block(
                    self.method, self.context, self.loss, info, down, kept, work, self.pace, tick=self.on_step
                )
            except (MemoryError, RuntimeError) as e:
                if not out_of_memory(e):
                    raise
                if n == 1:
                    raise TrainingError(
                        f"{self.method.title}: a single client does not fit into memory ({str(e)[:200]}); set "
                        "train.accumulation, model.gradient_checkpointing or model.dtype=bf16, or lower train.batch_size"
                    ) from e
            self.block = -(-n // 2)  # outside the except clause, since the error's traceback keeps tensors alive
            self.on_lowered(self.block, n)
        parts = [slice(i, i + self.block) for i in range(0, n, self.block)]
        return [t for s in parts for t in self._trained(info, down[s], kept[s], work[s])]


def out_of_memory(e: BaseException) -> bool:
    """Whether an accelerator's or the CPU's allocator has refused (the latter has no class of its own), or oneDNN's, which
    only says that it "could not create" a primitive or its memory."""
    said = str(e)
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or any(text in said for text in REFUSED)


def enough(round: int, accepted: int, asked: int, least: int, refused: Mapping[str, str]) -> None:
    """Raise TrainingError where a round has too few acceptable uploads."""
    if accepted < least:
        why = "; ".join(f"{c}: {e}" for c, e in list(refused.items())[:3])
        raise TrainingError(
            f"round {round + 1}: {accepted} acceptable uploads of {asked}, expected at least "
            f"{least} (federation.min_clients). {why}; lower train.lr, set train.clip, or look at the data. "
            "The round was dropped; earlier rounds are kept"
        )


def in_order(cohort: Sequence[Client]) -> list[Client]:
    """The order in which uploads are summed: large clients first. The last bits of a sum depend on it."""
    return sorted(cohort, key=lambda c: -c.examples)  # a stable sort: the size of blocks does not matter


def blocks(cohort: Sequence[Client], size: int) -> Iterator[Sequence[Client]]:
    """Blocks of at most `size` clients; clients of like size together, so few wait."""
    todo = in_order(cohort)
    for i in range(0, len(todo), size):
        yield todo[i : i + size]
