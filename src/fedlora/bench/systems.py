"""The systems under measurement. Each is ready after its constructor; `round` trains all clients from one start and returns
the averaged leaves, keyed site/part."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor

from .. import peft_io, pretrained
from ..engine import Schedule, train_block
from ..method import Client, Order, Scene, Upload
from ..model import Adapted, Batch, matching
from ..sites import groups
from ..tasks import Classification, Loss
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
    """This library. block: clients at once; dtype: of the frozen base."""

    keeps = True  # as in every run

    def __init__(self, work: Work, block: int | None, dtype: str):
        super().__init__(work)
        loaded = pretrained.load(work.model, "classification", CLASSES, seed=work.seed, dtype=dtype, attention="eager")
        names = [n for n in matching(loaded.base, peft_io.default_targets(loaded.model_type)) if n not in loaded.head]
        found = groups(("target",), loaded.base, loaded.model_type, names, loaded.head)
        model = Adapted(loaded.base, found, dropout=False)
        self.method, self.scene = work.method(), Scene(model.groups, work.seed)
        self.server = self.method.init(self.scene)
        self.loss, self.block = Loss(model, Classification(CLASSES)), block or work.regime.clients

    def round(self, batches: list[list[Batch]]) -> Leaves:
        uploads: list[Upload] = []
        for i in range(0, len(batches), self.block):
            part = batches[i : i + self.block]
            down: list[Params] = [self.server.params] * len(part)
            done = train_block(
                self.method, self.scene, self.loss, Order(0, 1), down, [{}] * len(part), part, Schedule()
            )
            uploads += [Upload(Client(str(i + j), 1), d.upload) for j, d in enumerate(done)]
        new = self.method.aggregate(self.scene, self.server, uploads)
        return {f"{k.site}/{k.part}": v for k, v in new.params.items()}


def start(work: Work) -> tuple[Leaves, list[str]]:
    """The leaves that every system starts from, and the target layers."""
    ours = Fedlora(work, 1, "fp32")
    return {f"{k.site}/{k.part}": v for k, v in ours.server.params.items()}, [
        s.name for s in ours.scene.sites("target")
    ]
