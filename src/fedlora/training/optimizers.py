"""Elementwise optimizers as pure functions, so K stacked clients train exactly as K separate ones.

Each takes `lr`, a factor [K] on its own learning rate (the schedule), so that clients of a block may be at different
steps. The update rules are those of torch.optim; a test holds them equal. Leaves of equal shape are not looped over one
by one: torch's foreach kernels update all of them at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..arguments import Checked
from ..errors import ConfigError, Problem
from ..tree import Key, Params, norm, per_client

STEPS = Key("", "", "steps")
State = dict[str, Params]  # e.g. {"m": ..., "v": ..., "t": ...}; every leaf [K ...]


def clip(g: Params, most: float | None) -> Params:
    """Scale each client's gradients so that their norm over all leaves is at most `most`; None changes nothing."""
    if most is None or not g:
        return g
    total = torch.stack([norm(v) for v in g.values()]).square().sum(0).sqrt()  # [K]
    factor = (most / (total + 1e-6)).clamp(max=1.0)  # torch.nn.utils.clip_grad_norm_'s rule
    return {k: v * per_client(factor, v) for k, v in g.items()}


def _spread(factor: Tensor, like: list[Tensor]) -> list[Tensor]:
    """factor [K] as one view per leaf that broadcasts against it; one copy to the device, not one per leaf."""
    factor = factor.to(like[0].device, like[0].dtype, non_blocking=True)  # the host need not wait for the device
    return [per_client(factor, v) for v in like]


class Optimizer(Checked, ABC):
    """`init(params) -> state`, `update(gradients, state, params, lr) -> (params, state)`."""

    @property
    @abstractmethod
    def moments(self) -> int:
        """Values that the state holds for each value trained."""

    @abstractmethod
    def init(self, p: Params) -> State:
        """The state before the first step, for leaves p [K ...]."""

    @abstractmethod
    def update(self, g: Params, s: State, p: Params, lr: Tensor) -> tuple[Params, State]:
        """(new leaves, new state) after one step along -g. g, p: leaves [K ...]; lr: factor [K] on the optimizer's own rate."""


def _check(name: str, **rules: tuple[float, bool, str]) -> None:
    bad = [Problem(f"{name}.{field}", v, want) for field, (v, ok, want) in rules.items() if not ok]
    if bad:
        raise ConfigError(bad)


@dataclass(frozen=True)
class SGD(Optimizer):
    """torch.optim.SGD: v = momentum v + g (+ decay p); p -= lr v."""

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(
            "SGD",
            lr=(self.lr, self.lr >= 0, "a number >= 0"),
            momentum=(self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)"),
            weight_decay=(self.weight_decay, self.weight_decay >= 0, "a number >= 0"),
        )

    @property
    def moments(self) -> int:
        return 1 if self.momentum else 0

    def init(self, p: Params) -> State:
        return {"m": {k: torch.zeros_like(v) for k, v in p.items()}} if self.momentum else {}

    def update(self, g: Params, s: State, p: Params, lr: Tensor) -> tuple[Params, State]:
        if not p:
            return p, s
        keys = list(p)
        value, grads = [p[k] for k in keys], [g[k] for k in keys]
        if self.weight_decay:
            grads = list(torch._foreach_add(grads, value, alpha=self.weight_decay))
        if self.momentum:
            grads = list(torch._foreach_add(torch._foreach_mul([s["m"][k] for k in keys], self.momentum), grads))
            s = {"m": dict(zip(keys, grads, strict=True))}
        new = torch._foreach_sub(value, torch._foreach_mul(grads, _spread(lr * self.lr, value)))
        return dict(zip(keys, new, strict=True)), s


@dataclass(frozen=True)
class AdamW(Optimizer):
    """torch.optim.AdamW (Loshchilov & Hutter, arXiv:1711.05101): decoupled decay, bias-corrected moments."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check(
            "AdamW",
            lr=(self.lr, self.lr >= 0, "a number >= 0"),
            betas=(self.betas[0], all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)"),
            eps=(self.eps, self.eps > 0, "a number > 0"),
            weight_decay=(self.weight_decay, self.weight_decay >= 0, "a number >= 0"),
        )

    @property
    def moments(self) -> int:
        return 2

    def init(self, p: Params) -> State:
        zeros = {k: torch.zeros_like(v) for k, v in p.items()}
        clients = len(next(iter(p.values()))) if p else 0
        # t [K] counts steps per client, on the CPU; all leaves share it
        return {"m": zeros, "v": zeros, "t": {STEPS: torch.zeros(clients, dtype=torch.float64)}}

    def update(self, g: Params, s: State, p: Params, lr: Tensor) -> tuple[Params, State]:
        if not p:
            return p, s
        (b1, b2), keys = self.betas, list(p)
        value, grads = [p[k] for k in keys], [g[k] for k in keys]
        t = s["t"][STEPS] + 1  # [K]
        m = torch._foreach_lerp([s["m"][k] for k in keys], grads, 1 - b1)
        v = torch._foreach_mul([s["v"][k] for k in keys], b2)
        torch._foreach_addcmul_(v, grads, grads, 1 - b2)  # in place where the tensors are this step's own
        rate = lr.to(t) * self.lr
        size, root = rate / (1 - b1**t), (1 - b2**t).sqrt()  # [K]; small and in float64, as torch computes them
        below = torch._foreach_sqrt(v)
        torch._foreach_div_(below, _spread(root, value))
        torch._foreach_add_(below, self.eps)
        step = torch._foreach_div(m, below)
        torch._foreach_mul_(step, _spread(size, value))
        if self.weight_decay:
            shrink = 1 - rate * self.weight_decay
            value = list(torch._foreach_mul(value, _spread(shrink, value)))
        new = torch._foreach_sub(value, step)
        pack = lambda vs: dict(zip(keys, vs, strict=True))  # noqa: E731
        return pack(new), {"m": pack(m), "v": pack(v), "t": {STEPS: t}}


def schedule(kind: str, warmup: float, progress: float) -> float:
    """Learning-rate factor in [0, 1] at `progress` in [0, 1) of the whole run (all rounds, so that nothing restarts).

    Linear warm-up over the first `warmup` share, then "constant", "linear" decay to 0 or "cosine" decay to 0.
    """
    import math

    if progress < warmup:
        return progress / warmup
    left = (progress - warmup) / max(1 - warmup, 1e-12)
    return {"constant": 1.0, "linear": 1 - left, "cosine": 0.5 * (1 + math.cos(math.pi * left))}[kind]
