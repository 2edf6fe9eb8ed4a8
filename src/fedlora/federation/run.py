"""A federation on one machine: rounds, evaluation, the run folder. The same objects a recipe builds can be made by hand.

fl.Federation(model=..., task=..., data=..., method=fl.FedSALoRA(rank=8), output="runs/mine").run()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..arguments import checked
from ..data.batches import batch_of
from ..errors import ConfigError, Problem, StateError, TrainingError, near
from ..evaluation.analyses import product_error
from ..methods.contract import Client, ServerState, Upload
from ..tree import Params, apart, select
from . import inputs
from .callbacks import Callback, Several
from .engine import Engine, RoundLog
from .ledger import Ledger, ledger_of, withheld
from .memory import auto_block, forget_peak, kept, peak_memory
from .outcome import Summary
from .records import EvalLine, HandoverLine, Line, Timing, TrainLine, lines_in, read_lines, read_timings
from .runtime import InProcess, Runtime
from .setting import Setting
from .store import Store
from .summary import chosen_round, describe_again, describe_run, means, summarise
from .trackers import TRACKERS
from .wire import finite_state

LAST = 2**31  # after every round
EXACTNESS_COHORT = 32  # the exactness meter holds a cohort's uploads; above this it is off


def in_process(fed: Federation, watch: Callback) -> Runtime:
    """Clients trained in this process."""
    return InProcess(fed, fed.engine(watch))


@dataclass
class Federation(Setting):
    """A run of a setting, in a folder.

    output: the run folder. block: clients trained at once, or "auto" from memory. keep: states on disk. trackers: names of TRACKERS. runtime: where
    clients are trained. patience: rounds without a better one on validation
    after which it stops. earlier: the folder of a finished run from which this one goes on.
    """

    output: str | Path
    block: int | Literal["auto"] = field(default="auto", kw_only=True)
    keep: Literal["last", "all"] = field(default="last", kw_only=True)
    tensorboard: bool = field(default=False, kw_only=True)
    trackers: Sequence[str] = field(default=(), kw_only=True)
    patience: int | None = field(default=None, kw_only=True)
    earlier: Store | None = field(default=None, kw_only=True)
    runtime: Callable[[Federation, Callback], Runtime] = field(default=in_process, kw_only=True)

    def __post_init__(self) -> None:
        least = {
            n: v for n in ("block", "patience", "accumulation") if isinstance(v := getattr(self, n), int) and v < 1
        }
        bad = [Problem(f"Federation.{n}", v, "an integer >= 1") for n, v in least.items()]
        strange = [t for t in self.trackers if t not in TRACKERS]
        bad += [Problem("Federation.trackers", t, "the name of a tracker", near(t, TRACKERS)) for t in strange]
        if bad:
            raise ConfigError(bad)
        super().__post_init__()
        self.store = Store(Path(self.output), keep=self.keep)
        self._beginning: tuple[int, Params, dict[str, Any]] | None = None
        self._ledger: Ledger | None = None
        self._means: list[EvalLine] = []  # of the rounds so far: the best one's states are kept

    # rounds -----------------------------------------------------------------------------------------------------
    def engine(self, watch: Callback) -> Engine:
        """The engine that trains this run's clients and reports to `watch`."""
        return Engine(
            self.method, self.context, self.loss, self.batches, self._load,
            lambda id, r, p: self.store.save_client(id, r, p), self.schedule, self.block_size(), self.sampling.least,
            self.channel, watch.clients_done, lambda b, n: self._lowered(b, n, watch), watch.steps_done,
        )  # fmt: skip

    def _load(self, id: str, round: int) -> Params | None:
        """A client's own leaves before a round; those of the earlier run until it has trained in this one."""
        own = self.store.load_client(id, round)
        if own is not None or self.earlier is None:
            return own
        self._opened()
        return (
            select(self.earlier.load_client(id, LAST) or {}, lambda k: "~" not in k.adapter and "@" not in k.adapter)
            or None
        )

    def _opened(self) -> tuple[int, Params, dict[str, Any]]:
        """The state of the earlier run's best round; from here on its store gives the leaves that belong to it."""
        assert self.earlier is not None
        if self._beginning is None:
            loaded = self.earlier.load_state("best")
            if loaded is None:
                raise StateError(
                    f"federation.start: {self.earlier.root} holds no finished round; name the folder of a run"
                )
            self.earlier.same({"base": inputs.base(self.model.base)})
            self._beginning = loaded
        return self._beginning

    def beginning(self) -> ServerState:
        """The server before the first round: the method's own, or the earlier run's. Raises StateError for one of another method."""
        first = self.method.init(self.context)
        if self.earlier is None:
            return first
        _, leaves, notes = self._opened()
        own, _ = apart(leaves)
        odd = sorted(str(k) for k in first.params.keys() ^ own.keys())
        odd += sorted(
            f"{k} of shape {list(own[k].shape)}, {list(v.shape)} here"
            for k, v in first.params.items()
            if k in own and own[k].shape != v.shape
        )
        if odd:
            raise StateError(
                f"federation.start: {self.earlier.root} has other leaves than this run ({odd[0]}; {len(odd)} in all), expected a run of the "
                "same method, rank, targets and head; keep these, or export its global model and name it as model.adapter"
            )
        return replace(first, params=own, notes=notes)

    def _lowered(self, block: int, clients: int, watch: Callback) -> None:
        """A resumed run starts with the blocks that fitted."""
        facts = self.store.read_json("environment.json")
        if facts:  # a site writes no environment.json
            self.store.write_json("environment.json", facts | {"block": block})
        self.store.facts["block"] = block
        watch.lowered(block, clients)

    def block_size(self) -> int:
        """Clients trained at once: as set, or what memory allows; 1 for models whose clients cannot share a forward."""
        rows = self.data.splits["train"].rows[:2]
        if not len(rows):
            return 1  # the server of a deployment holds no rows
        batch = batch_of(self.data, np.zeros(len(rows), np.int64), rows)
        together = self.model.probe({n: v[None].to(self.model.device) for n, v in batch.items()})
        if self.block != "auto":
            return self.block
        # A resumed run must group its clients as before, whatever memory is free today: sums would differ in their last bits.
        return self.store.block() or (auto_block(self) if together else 1)

    @checked
    def run(self, watch: Callback | None = None) -> Summary:
        """Train to the last round from wherever the run folder was left; returns the summary.

        KeyboardInterrupt drops the round at hand and leaves a folder that `run` takes up again.
        """
        watch = watch or Callback()
        forget_peak()
        with self.store.lock(), kept(), ExitStack() as end:
            end.callback(self.model.bind, {})  # a table that stood in for the base's own goes
            self.store.claim(self.recipe_hash, dict(self.recipe), inputs.of(self))
            self.store.rewind()
            loaded = self.store.load_server()
            before = lines_in(self.store.root) if loaded else []
            self._means = means(before)
            if self.runtime is in_process and "run" in self.store.facts:
                raise StateError(
                    f"{self.store.root}: a run over sites: start fedlora server again with this output folder"
                )
            done = loaded[0] if loaded else 0
            chosen = dict.fromkeys([*(["tensorboard"] if self.tensorboard else []), *self.trackers])
            if chosen:
                of = (done, self.name, self.recipe)
                watch = Several(watch, *(TRACKERS[t](self.store.root / t, *of) for t in chosen))
            watch.start(self.name, done, self.sampling.rounds)
            if before:
                watch.resumed(sum(x.sent("up") + x.sent("down") for x in before if isinstance(x, TrainLine)))
            runtime = self.runtime(self, watch)
            self.store.facts["block"] = runtime.block
            self._ledger = ledger_of(self)
            if self._ledger is not None:
                self._ledger.opened(done)
            if loaded is None:
                describe_run(self, self.store, runtime.block)
                server = self.beginning()
                self._commit(server, self.evaluate(runtime, server, watch), watch)
            else:
                describe_again(self, self.store, runtime.block)
                server = ServerState.restored(*loaded)
            while server.round < self.sampling.rounds and not self._stale(server.round):
                server = self._round(runtime, self._advance(runtime, server, watch), watch)
            folder = self.store.root
            result = summarise(self, server, read_lines(folder), read_timings(folder))
            if self._ledger is not None:
                result["privacy"] = self._ledger.final()
            if server.round < self.sampling.rounds:
                result["stopped"] = (
                    f"no round of the last {self.patience} was better on validation (federation.patience)"
                )
            self.store.write_json("summary.json", result)
            watch.end(result)
            return Summary(result, folder)

    def evaluate(self, runtime: Runtime, server: ServerState, watch: Callback) -> list[Line]:
        """Lines of metrics for every view and split that has rows."""
        if self.withheld:
            return []  # scores tell of the clients' rows, and epsilon does not cover them
        watch.evaluating(server.round)
        return runtime.evaluate(server)

    def _advance(self, runtime: Runtime, server: ServerState, watch: Callback) -> ServerState:
        """Let a method with stages change its parametrisation; what that does to the scores is recorded.

        The scores before are the round's own where it was evaluated, and else are taken here, as stage "before"."""
        new = self.channel.advance(self.method, self.context, server)
        if new is server:
            return server
        stages = {"handover": new} if self._due(server.round) else {"before": server, "handover": new}
        lines = [replace(line, stage=stage) for stage, s in stages.items() for line in self.evaluate(runtime, s, watch)]  # type: ignore[call-arg]
        self._commit(new, [HandoverLine(new.round, new.notes.get("handover", {})), *lines], watch)
        return new

    def _stale(self, round: int) -> bool:
        """Whether the best round on validation is `patience` rounds back."""
        if self.patience is None:
            return False
        best, split = chosen_round(self._means, self.task.metric, self.task.lower)
        return best is not None and split == "validation" and round - best >= self.patience

    def _due(self, round: int) -> bool:
        """Whether a round is evaluated: every so many, and the last."""
        return round % self.evaluation.every == 0 or round == self.sampling.rounds

    def _round(self, runtime: Runtime, server: ServerState, watch: Callback) -> ServerState:
        start = time.perf_counter()
        if self._ledger is not None:
            self._ledger.charge(server.round)
        cohort = runtime.cohort(server.round)
        watch.round_start(server.round + 1, len(cohort))
        seen = self.evaluation.exactness and len(cohort) <= EXACTNESS_COHORT and self.private is None
        meter = _Meter(self, server, seen)
        new, log = runtime.round(server, self.sampling.rounds, cohort, meter.see)
        if why := finite_state(new.leaves):
            raise TrainingError(
                f"round {new.round}: {why}, so that no client could train on; lower train.lr, set train.clip or "
                "federation.norm_bound. The round was dropped; earlier rounds are kept"
            )
        trained = time.perf_counter()
        lines: list[Line] = [self._train_line(new, cohort, log, meter.error(new))]
        if self._due(new.round):
            lines += self.evaluate(runtime, new, watch)
        evaluated = time.perf_counter()
        if self._ledger is not None:
            self._ledger.released(server.round)
        self._commit(new, lines, watch)
        spent = (trained - start, evaluated - trained, time.perf_counter() - evaluated)
        facts = Timing(new.round, *spent, log.tokens, peak_memory(), log.steps, log.rows).to_json()
        self.store.append_timing(facts)
        watch.round_done(new.round, facts | {"bytes": log.up.total + log.down.total})
        return new

    def _train_line(self, new: ServerState, cohort: Sequence[Client], log: RoundLog, error: float | None) -> TrainLine:
        extra = self.method.record(new)
        if self._ledger is not None:
            extra |= {"privacy": self._ledger.facts()}
        if self.private is not None:
            return withheld(new.round, log, self.place.expected / max(len(cohort), 1), extra)
        good = [v for c, v in log.losses.items() if c not in log.refused]
        return TrainLine(
            round=new.round,
            loss=float(np.mean(good)) if good else float("nan"),
            clients=list(log.cohort or [c.id for c in cohort]),
            losses=log.losses,
            examples=log.examples,
            refused=log.refused,
            bytes={"up": log.up.as_dict(), "down": log.down.as_dict()},
            exactness=None if error is None else {"product_error": error},
            extra=extra,
        )

    def _commit(self, server: ServerState, lines: Sequence[Line], watch: Callback) -> None:
        length = self.store.append_metrics([line.to_json() for line in lines])
        new = means(lines)
        self._means += new
        best, _ = chosen_round(self._means, self.task.metric, self.task.lower)
        hold = any(x.round == best for x in new)
        self.store.save_server(server.round, server.leaves, server.notes, length, best, hold)
        for line in lines:
            watch.record(line)


class _Meter:
    """Holds a round's uploads for the exactness meter, if it is on. server: what the clients of the round start from."""

    def __init__(self, f: Setting, server: ServerState, on: bool):
        self.method, self.context, self.server, self.on = f.method, f.context, server, on
        self.seen: list[tuple[Params, float]] = []

    def see(self, u: Upload) -> None:
        if self.on:
            self.seen.append((u.params, self.method.weight(u)))

    def error(self, new: ServerState) -> float | None:
        if not self.on or not self.seen:
            return None
        frozen = self.method.fixed(self.context)
        beside = frozen | self.method.beside(self.server)
        made = self.method.aggregated(self.server, new)
        return product_error([(beside | p, w) for p, w in self.seen], frozen | made)
