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

from ..arguments import Checked
from ..errors import ModelError
from ..layers import Layer
from ..model.adapted import Batch
from ..training.loss import Loss
from ..tree import Key, Params, apart

FAMILIES = {  # the groups of `fedlora methods`, in their order
    "averaging": "Averages of factors",
    "exact": "Exact averages of products",
    "personal": "Models of one's own",
    "ranks": "Clients of different ranks",
    "sparse": "Sparse, full and other updates",
    "small": "Small messages",
}
Work = dict[str, Params]  # everything a block of clients carries from step to step; leaves [K ...]
Metrics = dict[str, Tensor]  # [K]


@dataclass(frozen=True)
class Client:
    """What the server may know about a client."""

    id: str
    examples: int


@dataclass(frozen=True)
class ServerState:
    """All that a run needs to go on; written to disk after every round."""

    round: int  # rounds done
    params: Params
    notes: dict[str, Any] = field(default_factory=dict)  # JSON only
    guards: Params = field(default_factory=dict)  # what the channel's guards remember; no method sees it

    @classmethod
    def restored(cls, round: int, params: Params, notes: dict[str, Any]) -> ServerState:
        """The server that a state file holds: `leaves` and notes."""
        own, guards = apart(params)
        return cls(round, own, notes, guards)

    @property
    def leaves(self) -> Params:
        """All leaves, as they go to disk."""
        return self.params | self.guards


@dataclass(frozen=True)
class Upload:
    """One client's accepted reply."""

    client: Client
    params: Params
    metrics: Mapping[str, float] = field(default_factory=dict)  # what the client reports of its training: the mean loss


@dataclass(frozen=True)
class Context:
    """Fixed facts about the run that both sides know.

    start: (layer, part) -> where the trained factors and the head begin, instead of a delta of zero; B with its scale.
    """

    groups: Mapping[str, Sequence[Layer]]
    seed: int
    start: Mapping[tuple[str, str], Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def head(self) -> Sequence[Layer]:
        """The layers of the task head; () for a model without one."""
        return self.groups.get("head", ())

    def layers(self, group: str) -> Sequence[Layer]:
        """Layers of a group; raises ModelError where the model has none."""
        found = self.groups.get(group, ())
        if not found:
            raise ModelError(f"model: no {group!r} layers, found groups {sorted(self.groups)}; set model.targets")
        return found


@dataclass(frozen=True)
class RoundInfo:
    """What a client must know of the run; it comes with the message, not from a global."""

    round: int  # 0-based: the round being trained
    rounds: int  # of the whole run


class Method(Checked, ABC):
    """The contract; tests/test_contract.py holds every method to it."""

    section: ClassVar[str] = "method"  # of a recipe, in errors
    name: ClassVar[str]  # in recipes
    title: ClassVar[str]  # in tables
    paper: ClassVar[str] = ""
    family: ClassVar[str] = "averaging"  # of FAMILIES
    pooled: ClassVar[bool] = False  # trains one client that holds everybody's data
    inner: ClassVar[Mapping[str, Sequence[str]]] = {}  # fields that hold another method -> the methods they may hold

    # abilities: what the engine, the channel and its guards ask of a method ---------------------------------------
    @property
    def draws(self) -> int:
        """Independent minibatches that one local step takes."""
        return 1

    @property
    def least_steps(self) -> int:
        """Local steps of a round below which a part of the method would never train."""
        return 1

    def draws_for(self, down: Params) -> int:
        """The same for a client that has received `down`: a stage may take fewer than the method's most."""
        return self.draws

    @property
    def second_order(self) -> bool:
        """Whether a step differentiates the model twice."""
        return False

    @property
    def per_client(self) -> bool:
        """Whether `broadcast` depends on the client."""
        return False

    @property
    def groups(self) -> Sequence[str]:
        """Groups of layers (model/groups.py) that the method needs beside target and head."""
        return ()

    @property
    def tune(self) -> int:
        """Local steps taken before a client's model is served (FedAvg + fine-tuning, Per-FedAvg)."""
        return 0

    @property
    def sends(self) -> bool:
        """Whether clients upload anything."""
        return True

    @property
    def averages(self) -> bool:
        """Whether the next server is a weighted leafwise mean of uploads that all have the same shapes."""
        return False

    @property
    def states(self) -> bool:
        """Whether an upload holds numbers computed from its other leaves (a norm), which a guard would make untrue."""
        return False

    @property
    def tuner(self) -> Method:
        """The method whose local steps `tune` counts; this one unless it says otherwise."""
        return self

    @property
    def grows(self) -> bool:
        """Whether the server's leaves may get larger from round to round."""
        return False

    @property
    def anew(self) -> bool:
        """Whether clients send leaves that did not come down: such an upload is no change of what the client received."""
        return False

    def weight(self, upload: Upload) -> float:
        """p_k of an upload before normalisation; by number of examples, as FedAvg weighs."""
        return float(upload.client.examples)

    def fixed(self, context: Context) -> Params:
        """Leaves that every party derives from the seed (frozen halves, masks). Nobody owns or sends them."""
        return {}

    def idle(self, k: Key, down: Params) -> bool:
        """Whether a personal leaf waits for a later stage, and is not trained beside what comes `down` now."""
        return False

    def frozen(self, k: Key) -> bool:
        """Whether a leaf of the server only comes down: clients bind it, do not train it and do not send it back."""
        return False

    def phase(self, round: int) -> object:
        """Rounds (0-based) of one phase send the same leaves; one phase for most methods."""
        return None

    # server
    @abstractmethod
    def init(self, context: Context) -> ServerState:
        """Round 0."""

    @abstractmethod
    def broadcast(self, context: Context, server: ServerState, client: Client) -> Params:
        """What this client receives."""

    def whole(self, context: Context, server: ServerState) -> Params:
        """What a client without limits would receive: the global model is made of it."""
        return self.broadcast(context, server, Client("", 1))

    @abstractmethod
    def aggregate(self, context: Context, server: ServerState, uploads: Iterable[Upload]) -> ServerState:
        """The next server. Reads `uploads` once, so that they can stream."""

    def advance(self, context: Context, server: ServerState) -> ServerState:
        """Between two rounds, after evaluation: a method with stages changes the parametrisation here."""
        return server

    def beside(self, server: ServerState) -> Params:
        """Leaves of the server that an upload's factors belong with though they do not travel up, for the exactness meter."""
        return {}

    def caution(self, context: Context, clients: Iterable[Client]) -> str:
        """What `fedlora check` should warn of, as a sentence; "" where there is nothing."""
        return ""

    def aggregated(self, old: ServerState, new: ServerState) -> Params:
        """Factors whose products are what a round has made of its uploads, for the exactness meter."""
        return new.params

    def record(self, server: ServerState) -> dict[str, Any]:
        """What of the server's notes belongs in the round's record; JSON."""
        return {}

    # client
    @abstractmethod
    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        """What a block of clients starts its local work with. down, kept: leaves [K ...] of server and clients; they are read only."""

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
    def personal(self, context: Context, down: Params, kept: Params) -> Params:
        """The deltas a client serves from what it received and kept, model-ready."""

    def keep(self, context: Context, client: Client) -> Params:
        """Personal leaves of a client that has none yet; an unseen client serves these."""
        return {}

    def fresh(self, context: Context, client: Client) -> Params:
        """Personal leaves with which a client that has never trained is served; training starts from `keep`."""
        return self.keep(context, client)
