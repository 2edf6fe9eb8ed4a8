"""What each method costs on a given model, measured: seconds and memory of one client's local step, and its messages."""

from __future__ import annotations

import statistics
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints import peft, pretrained
from ..errors import FedloraError
from ..federation import wire
from ..methods import METHODS
from ..methods.contract import Client, Context, Method, RoundInfo, Work
from ..model.adapted import Adapted, Batch
from ..model.groups import groups
from ..model.targets import matching
from ..training.loss import Loss
from ..training.tasks import made
from ..tree import stack

REPEATS = 3


@dataclass(frozen=True)
class Cost:
    """One method on one model. seconds: the median of a local step; memory: bytes alive at once for gradients (saved
    activations, counted) and the client's leaves; down, up: bytes of a message. refused: why the method cannot serve it."""

    method: str
    title: str
    seconds: float = 0.0
    memory: int = 0
    down: int = 0
    up: int = 0
    refused: str = ""


class Saved:
    """Counts the bytes that autograd keeps for the backward pass; `peak` is the most at one time."""

    def __init__(self) -> None:
        self.alive = self.peak = 0
        self.seen: dict[int, int] = {}

    def pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.seen:
            self.alive += size
            self.peak = max(self.peak, self.alive)
            kept = t.view_as(t)  # lives as long as autograd keeps it
            weakref.finalize(kept, self.free, key)
            self.seen[key] = size
            return kept
        return t

    def free(self, key: int) -> None:
        self.alive -= self.seen.pop(key, 0)


def costs(
    name: str, task: str = "classification", targets: Any = "auto", batch_size: int = 4, length: int = 32,
    options: dict[str, Any] | None = None, methods: Sequence[str] | None = None, on: Callable[[str], None] = lambda name: None,
) -> list[Cost]:  # fmt: skip
    """Every method with its default hyperparameters (and `options` where it has them) on model `name`, one local step of
    `batch_size` rows of `length` random tokens. Steps of a method alternate with HomLoRA's own, and `seconds` is scaled by
    that pair, so that a busy machine cannot favour anybody. Raises ModelError for a model that cannot be loaded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a head knows is no matter here
        loaded = pretrained.load(name, task, classes=2, attention="eager")
    config: Any = loaded.base.config
    chosen = [METHODS[m] for m in methods or METHODS]
    ids = torch.randint(5, config.vocab_size, (1, batch_size, length), generator=torch.Generator().manual_seed(0))
    mask, g = torch.ones_like(ids), np.random.default_rng(0)
    labels = torch.from_numpy(made(task, 2).drawn(ids[0].numpy(), mask[0].numpy(), g))[None]
    batch: Batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batch |= {
        "weight": torch.ones(1, batch_size),
        "seed": torch.arange(batch_size)[None],
        "common": torch.zeros(1, dtype=torch.long),
    }
    reference = Bench(METHODS["homlora"](), loaded, task, targets, batch)
    reference.step()
    base = statistics.median(reference.step() for _ in range(REPEATS))
    out = []
    for cls in chosen:
        on(cls.title)
        plain: Any = cls()
        known = {f.name for f in fields(plain)}
        try:
            method = replace(plain, **{k: v for k, v in (options or {}).items() if k in known})
            bench = Bench(method, loaded, task, targets, batch)
            bench.step()
            ratios = [bench.step() / reference.step() for _ in range(REPEATS)]
        except FedloraError as e:
            out.append(Cost(cls.name, cls.title, refused=str(e)))
            continue
        out.append(Cost(cls.name, cls.title, statistics.median(ratios) * base, bench.memory(), *bench.messages()))
    return out


class Bench:
    """One method's client on the model, ready to step."""

    def __init__(self, method: Method, loaded: pretrained.Pretrained, task: str, targets: Any, batch: Batch):
        self.method, self.batch = method, batch
        names = peft.default_targets(loaded.model_type, loaded.base) if targets == "auto" else targets
        inside = [n for n in matching(loaded.base, names) if n not in loaded.head]
        self.groups = groups(method.groups, loaded.base, loaded.model_type, inside, loaded.head)
        self.loaded, self.task = loaded, task
        with self.model() as model:
            self.context = Context(model.groups, 0)
            client = Client("any", 1)
            self.down = method.broadcast(self.context, method.init(self.context), client)
            self.kept = method.keep(self.context, client)
            self.work: Work = method.begin(self.context, RoundInfo(0, 1), stack([self.down]), stack([self.kept]))

    def model(self) -> _Open:
        return _Open(Adapted(self.loaded.base, self.groups))

    def step(self) -> float:
        """Seconds of one local step."""
        with self.model() as model:
            loss = Loss(model, made(self.task, 2))
            start = time.perf_counter()
            self.method.step(self.work, loss, torch.ones(1, dtype=torch.float64), *[self.batch] * self.method.draws)
            return time.perf_counter() - start

    def memory(self) -> int:
        """Bytes: leaves of a client and the most that autograd kept at one time during a step."""
        saved = Saved()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
            self.step()
        leaves = sum(v.numel() * v.element_size() for group in self.work.values() for v in group.values())
        return saved.peak + leaves

    def messages(self) -> tuple[int, int]:
        """Bytes of a message down and up."""
        up, _ = self.method.finish(self.work)
        one = {k: v[0] for k, v in up.items()}
        return len(wire.encode(self.down)), len(wire.encode(one))


class _Open:
    """Hooks on the shared base for as long as they are needed."""

    def __init__(self, model: Adapted):
        self.adapted = model

    def __enter__(self) -> Adapted:
        return self.adapted

    def __exit__(self, *error: object) -> None:
        self.adapted.close()
