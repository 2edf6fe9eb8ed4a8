"""PF2LoRA's synthetic example (arXiv:2503.03920, section 6; details ours): clients whose true updates have different ranks.

Two clients hold y = W_k x with W_k in 10 x 10 of rank 3 and 5; their leading directions are the same. One adapter of one
rank for both cannot be right for both. A common one of rank 4 and personal ones of rank 1 can: the one client takes a
direction away, the other adds one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..data.batches import LocalWork
from ..data.federated import from_arrays
from ..evaluation.analyses import effective_ranks, products
from ..federation.callbacks import Callback
from ..federation.engine import Schedule
from ..federation.run import Federation
from ..federation.setting import Evaluation, Sampling
from ..federation.views import served
from ..methods import METHODS
from ..methods.contract import Client, Method, ServerState
from ..model.adapted import Adapted
from ..seeds import np_rng
from ..training.optimizers import AdamW
from ..training.task import Task
from ..tree import Params

SIZE, RANKS, CLIENTS = 10, (3, 5), ("a", "b")
SINGULAR = (2.0, 1.6, 1.2, 1.0, 0.8)
THRESHOLD = 0.05  # of the largest singular value: what counts in an effective rank
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "HomLoRA, rank 4": ("homlora", {"rank": 4, "alpha": 4.0}),
    "HomLoRA, rank 5": ("homlora", {"rank": 5, "alpha": 5.0}),
    "HetLoRA, ranks 3 and 5": (
        "hetlora",
        {"rank": 5, "alpha": 5.0, "rank_min": 3, "plan": "explicit", "ranks": (("a", 3), ("b", 5)), "gamma": 1.0},
    ),
    "FedSA-LoRA, rank 4": ("fedsa", {"rank": 4, "alpha": 4.0}),
    "PF2LoRA, 4 + 1, first-order": (
        "pf2lora",
        {"rank": 4, "alpha": 4.0, "rank_personal": 1, "alpha_personal": 1.0, "lr_personal": 0.2, "hypergradient": "first_order"},
    ),
    "PF2LoRA, 4 + 1": (
        "pf2lora",
        {"rank": 4, "alpha": 4.0, "rank_personal": 1, "alpha_personal": 1.0, "lr_personal": 0.2},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Squares(Task):
    """Sum of squares of a vector's error; labels [N o]."""

    kind: ClassVar[str] = "vector"

    def row_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        return (output - labels).square().sum(-1)


class Linear(nn.Module):
    """The base: W0 = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(SIZE, SIZE, bias=False)
        nn.init.zeros_(self.w.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w(x)
        return out


@dataclass(frozen=True)
class Course:
    """One method's way: relative error ||W_k - dW_k|| / ||W_k|| per client at `rounds`, and the effective ranks at the end."""

    label: str
    rounds: list[int]
    errors: dict[str, list[float]]
    ranks: dict[str, int]


def truth(seed: int = 0) -> dict[str, np.ndarray]:
    """W_k [10 10] of each client: the leading 3 or 5 of common directions."""
    g = np_rng(seed, "example")
    u, v = (np.linalg.qr(g.normal(size=(SIZE, SIZE)))[0] for _ in range(2))
    return {c: (u[:, :r] * SINGULAR[:r]) @ v[:, :r].T for c, r in zip(CLIENTS, RANKS, strict=True)}


def federation(method: Method, seed: int = 0, rows: int = 400, rounds: int = 400) -> Federation:
    """The example's clients, model and data around a method. Nothing is written before it is run."""
    g = np_rng(seed, "example rows")
    x = g.normal(size=(len(CLIENTS) * rows, SIZE)).astype(np.float32)
    y = np.concatenate([x[i * rows : (i + 1) * rows] @ w.T for i, w in enumerate(truth(seed).values())])
    data = from_arrays(
        {"x": x, "labels": y.astype(np.float32)},
        kind="column",
        by=np.repeat(CLIENTS, rows).tolist(),
        clients=len(CLIENTS),
        validation=0.0,
        seed=seed,
    )
    return Federation(
        model=Adapted(Linear(), {"target": ["w"]}), task=Squares(), data=data, method=method, output=Path("unused"),
        plan=LocalWork(steps=10, epochs=None, batch_size=32), sampling=Sampling(rounds=rounds), schedule=Schedule("cosine"),
        evaluation=Evaluation(views=("personal",)), seed=seed, block=len(CLIENTS),
    )  # fmt: skip


def course(label: str, seed: int = 0, rounds: int = 400, points: int = 40) -> Course:
    """Train one of SETTINGS and measure its models at `points` rounds."""
    name, options = SETTINGS[label]
    kind: Any = METHODS[name]
    f = federation(kind(optimizer=AdamW(1e-2), head="frozen", **options), seed, rounds=rounds)
    kept: dict[str, Params] = {}
    engine = dataclasses.replace(
        f.engine(Callback()), load=lambda id, r: kept.get(id), save=lambda id, r, p: kept.update({id: p})
    )
    server: ServerState = f.method.init(f.context)
    cohort: list[Client] = [f.client(i) for i in range(len(CLIENTS))]
    true = truth(seed)
    at: list[int] = []
    errors: dict[str, list[float]] = {c: [] for c in f.data.ids}
    models: list[Params] = []
    while server.round < rounds:
        server, _ = engine.round(server, rounds, cohort)
        if server.round % max(rounds // points, 1) == 0 or server.round == rounds:
            models = served(f, engine, server, range(len(CLIENTS)), "personal")
            at.append(server.round)
            for c, p in zip(f.data.ids, models, strict=True):
                a, b = products(p)["w"]
                w = torch.from_numpy(true[c])
                errors[c].append(float((b @ a - w).norm() / w.norm()))
    ranks = {c: effective_ranks(p, THRESHOLD)["w"] for c, p in zip(f.data.ids, models, strict=True)}
    return Course(label, at, errors, ranks)


def courses(seed: int = 0, rounds: int = 400, on: Callable[[str], None] = lambda label: None) -> list[Course]:
    """All of SETTINGS."""
    out = []
    for label in SETTINGS:
        on(label)
        out.append(course(label, seed, rounds))
    return out
