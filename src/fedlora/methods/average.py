"""The averaging family: which halves are trained and which are shared is all that differs.

    distribute  client k receives the shared leaves
    train       SGD or AdamW on its trained leaves
    aggregate   leafwise mean, weights p_k by examples or uniform

HomLoRA   = FedIT = FedAvg-LoRA  trains A, B  shares A, B   biased: (sum pB)(sum pA) != sum p BA   (arXiv:2305.05644)
FFA-LoRA  (arXiv:2403.12313)     trains B     shares B      A frozen at the common seeded start: exact, half the bytes
FedSA-LoRA (arXiv:2410.01463)    trains A, B  shares A      B_i stays with client i; with adapter="vera": d shared, b kept
Share-B   (Fed-ALoRA, arXiv:2509.25414)  trains A, B  shares B      the mirror of FedSA
Local-only                       trains A, B  shares nothing
Centralized LoRA                 one client holds all data; everybody is served its model
FedAvg + local fine-tuning       HomLoRA; before serving, each client takes `tune` steps of its own

Choices: FedSA's head is personal in the released configuration and shared or personal as `head` says here; the paper
averages uniformly in effect (`weights="uniform"`), the default here is by examples as in FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..tree import Key
from .sgd import SGDMethod


@dataclass(frozen=True)
class HomLoRA(SGDMethod):
    """FedAvg of both factors; all clients have one rank."""

    name: ClassVar[str] = "homlora"
    title: ClassVar[str] = "HomLoRA"
    paper: ClassVar[str] = "arXiv:2305.05644"

    def trains(self, k: Key) -> bool:
        return True

    def shares(self, k: Key) -> bool:
        return True


@dataclass(frozen=True)
class FFALoRA(SGDMethod):
    """Freeze A, average B."""

    name: ClassVar[str] = "ffa"
    title: ClassVar[str] = "FFA-LoRA"
    family: ClassVar[str] = "exact"
    needs_halves: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2403.12313"

    def trains(self, k: Key) -> bool:
        return k.part in self.form.second

    def shares(self, k: Key) -> bool:
        return True


@dataclass(frozen=True)
class FedSALoRA(SGDMethod):
    """Train both halves, share the first."""

    name: ClassVar[str] = "fedsa"
    title: ClassVar[str] = "FedSA-LoRA"
    family: ClassVar[str] = "personal"
    needs_halves: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2410.01463"

    def trains(self, k: Key) -> bool:
        return True

    def shares(self, k: Key) -> bool:
        return k.part in self.form.first


@dataclass(frozen=True)
class ShareB(SGDMethod):
    """Train both halves, share the second."""

    name: ClassVar[str] = "share-b"
    title: ClassVar[str] = "Share-B"
    family: ClassVar[str] = "personal"
    needs_halves: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2509.25414"

    def trains(self, k: Key) -> bool:
        return True

    def shares(self, k: Key) -> bool:
        return k.part in self.form.second


@dataclass(frozen=True)
class LocalLoRA(SGDMethod):
    """Every client alone; `head="shared"` means trained, and stays personal too."""

    name: ClassVar[str] = "local"
    title: ClassVar[str] = "Local-only"
    family: ClassVar[str] = "personal"
    shares_head: ClassVar[bool] = False

    @property
    def sends(self) -> bool:
        return False

    def trains(self, k: Key) -> bool:
        return True

    def shares(self, k: Key) -> bool:
        return False


@dataclass(frozen=True)
class CentralizedLoRA(SGDMethod):
    """The upper reference: one client holds everybody's training data."""

    name: ClassVar[str] = "centralized"
    title: ClassVar[str] = "Centralized"
    paper: ClassVar[str] = "arXiv:2106.09685"
    pooled: ClassVar[bool] = True

    def trains(self, k: Key) -> bool:
        return True

    def shares(self, k: Key) -> bool:
        return True


@dataclass(frozen=True)
class FineTunedLoRA(SGDMethod):
    """HomLoRA, then `tune` local steps on the client's own training data before it is served."""

    name: ClassVar[str] = "fedavg-ft"
    title: ClassVar[str] = "FedAvg + fine-tuning"
    paper: ClassVar[str] = "arXiv:2305.05644"
    family: ClassVar[str] = "personal"
    tune: int = 10

    def trains(self, k: Key) -> bool:
        return True

    def shares(self, k: Key) -> bool:
        return True
