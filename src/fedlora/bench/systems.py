"""The systems under measurement. Each is ready after its constructor; `round` trains all clients from one start and returns
the averaged leaves, keyed layer/part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from .. import kernels
from ..checkpoints import peft, pretrained
from ..federation.engine import Schedule, train_block
from ..methods.contract import Client, Context, RoundInfo, Upload
from ..model.adapted import Adapted, Batch
from ..model.groups import groups
from ..model.targets import matching
from ..training.loss import Loss
from ..tree import Params
from .work import CLASSES, Work

Leaves = dict[str, Tensor]


class System(ABC):
    """One way to do the work. keeps: whether freed memory stays with the process (`memory.kept`)."""

    keeps = False

    def __init__(self, work: Work):
        self.work = work

    @abstractmethod
    def round(self, batches: list[list[Batch]]) -> Leaves: ...


def averaged(clients: Iterable[Leaves]) -> Leaves:
    """The plain mean over clients, as each arrives."""
    total: Leaves = {}
    n = 0
    for n, leaves in enumerate(clients, 1):
        total = {k: total[k] + v if n > 1 else v for k, v in leaves.items()}
    return {k: v / n for k, v in total.items()}


class Fedlora(System):
    """This library. block: clients at once; dtype: of the frozen base; compiled: whether compiled operators are used."""

    keeps = True  # as in every run

    def __init__(self, work: Work, block: int | None, dtype: str, compiled: bool = True):
        super().__init__(work)
        ours = compiled and kernels.useful(torch.device(work.device), pretrained.DTYPES[dtype])
        attention = None if ours else "eager"  # as a run's "auto"
        loaded = pretrained.load(
            work.model, work.task, CLASSES, seed=work.seed, dtype=dtype, attention=attention, device=work.device
        )
        names = [
            n
            for n in matching(loaded.base, peft.default_targets(loaded.model_type, loaded.base))
            if n not in loaded.head
        ]
        self.method = work.method()
        found = groups(self.method.groups, loaded.base, loaded.model_type, names, loaded.head)
        model = Adapted(loaded.base, found, dropout=False, compiled=compiled)
        self.context = Context(model.groups, work.seed)
        self.server = self.method.init(self.context)
        self.loss, self.block = Loss(model, work.goal()), block or work.regime.clients

    def round(self, batches: list[list[Batch]]) -> Leaves:
        uploads: list[Upload] = []
        for i in range(0, len(batches), self.block):
            part = batches[i : i + self.block]
            clients = [Client(str(i + j), 1) for j in range(len(part))]
            down: list[Params] = [self.server.params] * len(part)
            if self.method.per_client:
                down = [self.method.broadcast(self.context, self.server, c) for c in clients]
            kept = [self.method.keep(self.context, c) for c in clients]
            done = train_block(self.method, self.context, self.loss, RoundInfo(0, 1), down, kept, part, Schedule())
            uploads += [Upload(c, d.upload) for c, d in zip(clients, done, strict=True)]
        new = self.method.aggregate(self.context, self.server, uploads)
        return named(new.params)


def named(params: Params) -> Leaves:
    """LoRA's and the head's leaves by layer and part, as other systems know them; others by their full names."""
    return {f"{k.layer}/{k.part}" if k.adapter in ("lora", "head") else str(k): v for k, v in params.items()}


def start(work: Work) -> tuple[Leaves, list[str]]:
    """The leaves that every system starts from, and the target layers."""
    ours = Fedlora(work, 1, "fp32")
    return named(ours.server.params), [s.name for s in ours.context.layers("target")]
