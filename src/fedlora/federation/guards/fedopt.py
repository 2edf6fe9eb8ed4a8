"""Optimizers at the server (Reddi et al., ICLR 2021, arXiv:2003.00295, algorithm 2; FedAvgM: Hsu et al., arXiv:1909.06335).

    D = aggregate - x                               the clients' mean change stands for a negative gradient
    FedAvgM     m = momentum m + D                                                   x <- x + lr m
    the others  m = beta_1 m + (1 - beta_1) D                                        x <- x + lr m / (sqrt v + tau)
        FedAdagrad   v = v + D^2
        FedAdam      v = beta_2 v + (1 - beta_2) D^2
        FedYogi      v = v - (1 - beta_2) D^2 sign(v - D^2)

m starts at 0 and v at tau^2. As in the paper there is no bias correction; Flower's FedAdam has one, and starts v at 0. Each
entry of each shared leaf has its own m and v. B starts at zero, so it may need a larger rate than A: `lr_ratio` times lr, as
LoRA+ has it (arXiv:2402.12354).

A leaf that no client has moved stays, and its m and v with it: the half of an adapter that a round freezes, frozen leaves.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import Problem
from ...methods.contract import Method, ServerState
from ...tree import Key, Params
from .guard import STATED, Guard


@dataclass(frozen=True)
class FedOpt(Guard):
    """What the four share. lr: the server's rate; lr_ratio: B's rate over that of the other leaves."""

    paper: ClassVar[str] = "arXiv:2003.00295"
    lr: float = 0.1
    lr_ratio: float = 1.0

    def problems(self) -> list[Problem]:
        bad = []
        if not self.lr > 0:
            bad.append(Problem("lr", self.lr, "a number > 0", "0.1 to 1 are usual"))
        if not self.lr_ratio > 0:
            bad.append(
                Problem("lr_ratio", self.lr_ratio, "a number > 0", "1 treats A and B alike, 4 to 16 are LoRA+'s")
            )
        return bad

    def cannot(self, method: Method) -> str | None:
        if method.sends and not method.averages:
            return f"the server of {method.title} is no mean of leaves of one shape, so their change is no direction"
        return super().cannot(method)

    def settle(self, new: ServerState, old: ServerState, state: Params) -> tuple[ServerState, Params]:
        moved: Params = {}
        states: Params = {}
        for k, mean in new.params.items():
            x = old.params.get(k)
            if x is None or x.shape != mean.shape or not mean.is_floating_point() or k.part in STATED:
                continue
            mine = {part: state[_of(k, part)] for part in "mv" if _of(k, part) in state}
            if not torch.equal(mean, x):
                step, mine = self.step(mean - x, mine)
                moved[k] = x + self.lr * (self.lr_ratio if k.part in ("B", "dB") else 1.0) * step
            states |= {_of(k, part): v for part, v in mine.items()}
        return replace(new, params=new.params | moved), states

    @abstractmethod
    def step(self, d: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """(step, next state) of one leaf; state holds m and v, or nothing at first."""


def _of(k: Key, part: str) -> Key:
    return k._replace(adapter=f"{k.adapter}~{part}")


def _rate(name: str, value: float) -> list[Problem]:
    return [] if 0 <= value < 1 else [Problem(name, value, "a number in [0, 1)", "0.9 is usual")]


@dataclass(frozen=True)
class FedAvgM(FedOpt):
    """Momentum at the server. lr 1 and momentum 0 are the mean itself."""

    name: ClassVar[str] = "fedavgm"
    title: ClassVar[str] = "FedAvgM"
    paper: ClassVar[str] = "arXiv:1909.06335"
    lr: float = 1.0
    momentum: float = 0.9

    def problems(self) -> list[Problem]:
        return super().problems() + _rate("momentum", self.momentum)

    def step(self, d: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        m = self.momentum * state["m"] + d if state else d
        return m, {"m": m}


@dataclass(frozen=True)
class Adaptive(FedOpt):
    """Rates by entry. tau: how adaptive, small is more."""

    beta_1: float = 0.9
    tau: float = 1e-3

    def problems(self) -> list[Problem]:
        bad = super().problems() + _rate("beta_1", self.beta_1)
        if not self.tau > 0:
            bad.append(Problem("tau", self.tau, "a number > 0", "0.001 is usual"))
        return bad

    def step(self, d: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        before = state or {"m": torch.zeros_like(d), "v": torch.full_like(d, self.tau**2)}
        m = self.beta_1 * before["m"] + (1 - self.beta_1) * d
        v = self.second(before["v"], d.square())
        return m / (v.sqrt() + self.tau), {"m": m, "v": v}

    @abstractmethod
    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """The next v, from D^2."""


@dataclass(frozen=True)
class FedAdagrad(Adaptive):
    """Adagrad at the server."""

    name: ClassVar[str] = "fedadagrad"
    title: ClassVar[str] = "FedAdagrad"
    beta_1: float = 0.0  # as in the paper's experiments

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square


@dataclass(frozen=True)
class FedAdam(Adaptive):
    """Adam at the server, without bias correction."""

    name: ClassVar[str] = "fedadam"
    title: ClassVar[str] = "FedAdam"
    beta_2: float = 0.99

    def problems(self) -> list[Problem]:
        return super().problems() + _rate("beta_2", self.beta_2)

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta_2 * v + (1 - self.beta_2) * square


@dataclass(frozen=True)
class FedYogi(Adaptive):
    """Yogi at the server: v follows D^2 by steps that do not depend on how far it is."""

    name: ClassVar[str] = "fedyogi"
    title: ClassVar[str] = "FedYogi"
    beta_2: float = 0.99

    def problems(self) -> list[Problem]:
        return super().problems() + _rate("beta_2", self.beta_2)

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta_2) * square * (v - square).sign()
