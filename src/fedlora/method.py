"""A federated fine-tuning method: eight pure functions and its hyperparameters. No other state.

A method is a frozen dataclass. Runtimes own the loops (in-process engine, Flower), methods own the maths. On the server
a leaf has no client axis; in `begin`, `step`, `finish`, `personal` every leaf is [K ...], the clients of one block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from .errors import ModelError
from .loss import Loss
from .model import Batch, Site
from .tree import Params

Work = dict[str, Params]  # everything a block of clients carries from step to step; leaves [K ...]
Metrics = dict[str, Tensor]  # [K]


@dataclass(frozen=True)
class Client:
    """What the server may know about a client."""

    id: str
    examples: int


@dataclass(frozen=True)
class Server:
    """All that a run needs to go on; written to disk after every round."""

    round: int  # rounds done
    params: Params
    notes: dict[str, Any] = field(default_factory=dict)  # JSON only


@dataclass(frozen=True)
class Upload:
    """One client's accepted reply."""

    client: Client
    params: Params
    metrics: Mapping[str, float] = field(default_factory=dict)  # declared ones: the mean training loss


@dataclass(frozen=True)
class Scene:
    """Fixed facts about the run that both sides know."""

    groups: Mapping[str, Sequence[Site]]
    seed: int

    @property
    def head(self) -> Sequence[Site]:
        return self.groups.get("head", ())

    def sites(self, group: str) -> Sequence[Site]:
        """Sites of a group; raises ModelError where the model has none."""
        found = self.groups.get(group, ())
        if not found:
            raise ModelError(f"model: no {group!r} sites, found groups {sorted(self.groups)}; set model.targets")
        return found


@dataclass(frozen=True)
class Order:
    """What a client must know of the run; it comes with the message, not from a global."""

    round: int  # 0-based: the round being trained
    rounds: int  # of the whole run


class Method(ABC):
    """The contract; tests/test_contract.py holds every method to it."""

    name: ClassVar[str]  # in recipes
    title: ClassVar[str]  # in tables
    paper: ClassVar[str] = ""
    draws: ClassVar[int] = 1  # independent minibatches a step takes
    second_order: bool = False  # differentiates the model twice
    per_client: bool = False  # broadcast depends on the client
    pooled: ClassVar[bool] = False  # trains one client that holds everybody's data
    groups: ClassVar[Sequence[str]] = ()  # groups of sites (sites.py) beside target and head
    tune: int = 0  # local steps taken before a client's model is served (FedAvg + fine-tuning, Per-FedAvg)

    @property
    def tuner(self) -> Method:
        """Whose local steps those are; this method's own unless it says otherwise."""
        return self

    # server
    @abstractmethod
    def init(self, scene: Scene) -> Server:
        """Round 0."""

    @abstractmethod
    def broadcast(self, scene: Scene, server: Server, client: Client) -> Params:
        """What this client receives."""

    @abstractmethod
    def aggregate(self, scene: Scene, server: Server, uploads: Iterable[Upload]) -> Server:
        """The next server. Reads `uploads` once, so that they can stream."""

    def advance(self, scene: Scene, server: Server) -> Server:
        """Between two rounds, after evaluation: a method with stages changes the parametrisation here."""
        return server

    def record(self, server: Server) -> dict[str, Any]:
        """What of the server's notes belongs in the round's record; JSON."""
        return {}

    # client
    @abstractmethod
    def begin(self, scene: Scene, order: Order, down: Params, kept: Params) -> Work: ...

    @abstractmethod
    def step(self, work: Work, loss: Loss, lr: Tensor, *draws: Batch) -> tuple[Work, Metrics]:
        """One local step. lr [K] is the schedule's factor on the method's own learning rates."""

    @abstractmethod
    def finish(self, work: Work) -> tuple[Params, Params]:
        """(upload, kept)."""

    @abstractmethod
    def served(self, work: Work) -> Params:
        """The deltas a client serves from where its work stands, model-ready."""

    @abstractmethod
    def personal(self, scene: Scene, down: Params, kept: Params) -> Params:
        """The deltas a client serves from what it received and kept, model-ready."""

    def keep(self, scene: Scene, client: Client) -> Params:
        """Personal leaves of a client that has none yet; an unseen client serves these."""
        return {}
