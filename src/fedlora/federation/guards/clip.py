"""Clipping by the norm of a client's change (McMahan et al., ICLR 2018, arXiv:1710.06963, "flat clipping").

    client   d = up - down;  up = down + d * min(1, C / ||d||),  ||.|| over all leaves together

Choices: leaves that state facts (ranks) stay as they are; a client that prunes is compared with what it kept of `down`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...errors import Problem
from ...methods.contract import Client, Method, RoundInfo
from ...tree import Params
from .guard import Guard, change, no_change


@dataclass(frozen=True)
class Clip(Guard):
    """A client's change has at most this Frobenius norm. norm: C."""

    name: ClassVar[str] = "clip"
    title: ClassVar[str] = "Clipping by norm"
    paper: ClassVar[str] = "arXiv:1710.06963"
    norm: float = 1.0

    def problems(self) -> list[Problem]:
        if self.norm > 0:
            return []
        return [Problem("norm", self.norm, "a number > 0", "0.1 to 10 are in use")]

    def cannot(self, method: Method) -> str | None:
        if method.states:
            return f"{method.title} sends a norm of its leaves beside them, which clipping would make untrue"
        return no_change(method) or super().cannot(method)

    def leave(self, up: Params, down: Params, state: Params, info: RoundInfo, client: Client) -> Params:
        d = change(up, down)
        if not d:
            return up
        size = torch.stack([torch.linalg.vector_norm(v.double()) for v in d.values()]).norm()
        if not size > self.norm:
            return up  # to the bit what it was
        factor = float(self.norm / size)
        return up | {k: up[k] + v * (factor - 1) for k, v in d.items()}
