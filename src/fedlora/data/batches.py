"""Minibatches of a client: a function of (seed, round, client), so order, resume and block size change nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..arguments import Checked
from ..errors import ConfigError, DataError, Problem
from ..model.adapted import Batch
from ..seeds import np_rng, number
from .federated import FederatedData


@dataclass(frozen=True)
class LocalWork(Checked):
    """Local work of one client in one round: `steps` optimizer steps, or `epochs` passes over its rows."""

    steps: int | None = 10
    epochs: float | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        bad = []
        if (self.steps is None) == (self.epochs is None):
            bad.append(Problem("train.steps", (self.steps, self.epochs), "exactly one of steps and epochs", "drop one"))
        if self.steps is not None and self.steps < 1:
            bad.append(Problem("train.steps", self.steps, "an integer >= 1"))
        if self.epochs is not None and not self.epochs > 0:
            bad.append(Problem("train.epochs", self.epochs, "a number > 0"))
        if self.batch_size < 1:
            bad.append(Problem("train.batch_size", self.batch_size, "an integer >= 1"))
        if bad:
            raise ConfigError(bad)

    def count(self, rows: int, draws: int) -> int:
        """Optimizer steps of a client that holds `rows` rows."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * -(-rows // self.batch_size) / draws))


def order(rows: np.ndarray, batches: int, size: int, *path: object) -> list[np.ndarray]:
    """`batches` minibatches of at most `size` rows: passes over the rows, each in a new order; the last of a pass may be
    smaller, as with torch's DataLoader."""
    out: list[np.ndarray] = []
    generator = np_rng("batches", *path)
    while len(out) < batches:
        shuffled = generator.permutation(rows)
        out += [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
    return out[:batches]


def batch_of(data: FederatedData, owners: np.ndarray, rows: np.ndarray) -> Batch:
    """Rows as their owners see them, [b ...]: with the owner's permutation of the labels where there is one.

    owners int64 [b]: the client of each row.
    """
    batch = data.examples.collate(rows)
    if data.label_maps is not None:
        batch["labels"] = torch.from_numpy(data.label_maps[owners, batch["labels"].numpy()])
    return batch


def train_batches(data: FederatedData, client: int | None, plan: LocalWork, draws: int, *path: object) -> list[Batch]:
    """The minibatches of one client for one round, `draws` a step; client None is everybody's data pooled.

    The path ends with the client's id. Each row has the seed of its dropout masks.
    """
    split = data.splits["train"]
    training = np.arange(len(split) - data.unseen) if client is None else np.array([client])
    rows = np.concatenate([split[k] for k in training])
    if not len(rows):
        raise DataError(
            f"client {path[-1]}: holds no training rows, expected at least one; leave it out, or let it be unseen"
        )
    owners = np.repeat(training, split.sizes[training])
    batches = []
    for i, at in enumerate(order(np.arange(len(rows)), plan.count(len(rows), draws) * draws, plan.batch_size, *path)):
        batch = batch_of(data, owners[at], rows[at])
        batch["seed"] = torch.from_numpy(np_rng("dropout", i, *path).integers(0, 2**62, len(at)))
        batch["common"] = torch.tensor(number("dropout", i, *path[:-1]))  # one seed that all clients of a block share
        batches.append(batch)
    return batches
