"""Evaluation in blocks: many clients' models on their own rows at once, sorted by length, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..data.batches import batch_of
from ..data.federated import FederatedData
from ..model.adapted import Adapted
from ..training.batching import even, fitted, padded_right, stack_batches
from ..training.loss import losses_of
from ..training.metrics import Predictions
from ..training.task import Task
from ..tree import Params, stack


@dataclass(eq=False)
class _Job:
    """One model and the rows it is asked about, longest first so that little is padding."""

    params: Params
    owners: np.ndarray  # int64 [m] client of each row
    rows: np.ndarray  # int64 [m]
    losses: np.ndarray  # float64 [m], and so on
    counts: np.ndarray
    said: np.ndarray | None = None  # [m ...] what the task's `answers` gave, and the labels; -100 beyond a row's end
    labels: np.ndarray | None = None
    done: int = 0


def predict(
    model: Adapted,
    task: Task,
    data: FederatedData,
    params: Sequence[Params],
    clients: Sequence[int],
    rows: Sequence[np.ndarray],
    batch_size: int = 64,
    block: int = 8,
) -> list[Predictions]:
    """Predictions of model params[j] on rows[j] as client clients[j] labels them, for every j.

    Clients that serve the very same deltas (one object) are evaluated as one. params are model-ready, no client axis.
    batch_size: rows in a forward pass, of all models together.
    """
    same: dict[int, list[int]] = {}
    for j, p in enumerate(params):
        same.setdefault(id(p), []).append(j)
    groups = sorted(same.values(), key=lambda g: -sum(len(rows[j]) for j in g))
    out: dict[int, Predictions] = {}
    for i in range(0, len(groups), block):
        part = groups[i : i + block]
        orders = []
        jobs = []
        for g in part:
            owners = np.repeat([clients[j] for j in g], [len(rows[j]) for j in g])
            asked = np.concatenate([rows[j] for j in g])
            order = np.argsort(-data.examples.lengths(asked), kind="stable")
            empty = np.zeros((2, len(asked)))
            orders.append(order)
            jobs.append(_Job(params[g[0]], owners[order], asked[order], *empty))
        _answer(model, task, data, jobs, batch_size)
        for g, job, order in zip(part, jobs, orders, strict=True):
            back = np.argsort(order)
            ends = np.cumsum([len(rows[j]) for j in g])
            for j, end in zip(g, ends, strict=True):
                out[j] = _predictions(data, job, back[end - len(rows[j]) : end], rows[j])
    return [out[j] for j in range(len(params))]


def _predictions(data: FederatedData, job: _Job, at: np.ndarray, rows: np.ndarray) -> Predictions:
    chars, words = (getattr(data.examples, n, None) for n in ("chars", "words"))
    said, labels = (None if v is None else v[at] for v in (job.said, job.labels))
    return Predictions(
        job.losses[at], job.counts[at], said, labels, None if chars is None else chars[rows],
        None if words is None else words.at(rows),
    )  # fmt: skip


def _answer(model: Adapted, task: Task, data: FederatedData, jobs: Sequence[_Job], size: int) -> None:
    """Fill in the jobs. Models that are through leave the block, so that nobody computes for nothing."""
    alive: list[_Job] = []
    stacked: Params = {}
    while left := [job for job in jobs if job.done < len(job.rows)]:
        if left != alive:
            alive = left
            stacked = {k: v.to(model.device) for k, v in stack([job.params for job in alive]).items()}
        n = max(1, size // len(alive))
        cuts = [slice(job.done, min(job.done + n, len(job.rows))) for job in alive]
        batch = stack_batches([batch_of(data, job.owners[c], job.rows[c]) for job, c in zip(alive, cuts, strict=True)])
        if padded_right(batch):
            batch = fitted(batch, even(batch["attention_mask"].shape[2], model), task.leaves)
            if model.packs(batch):
                batch["lengths"] = (batch["attention_mask"].sum(2) * (batch["weight"] > 0)).clamp_min(1)
        moved = {name: v.to(model.device) for name, v in batch.items()}
        with torch.inference_mode():
            each, y = losses_of(model, task, stacked, moved)
            flat, k = moved["labels"].flatten(0, 1), len(alive)
            losses = each.double().cpu().numpy()
            counts = task.row_counts(flat).view(k, -1).double().cpu().numpy()
            said = task.answers(y.flatten(0, 1), flat)
        told = None if said is None else said.unflatten(0, (k, -1)).cpu().numpy()
        for i, (job, c) in enumerate(zip(alive, cuts, strict=True)):
            m = c.stop - c.start
            job.losses[c], job.counts[c] = losses[i, :m], counts[i, :m]
            if told is not None:
                job.said = _kept(job.said, len(job.rows), c, told[i, :m])
                job.labels = _kept(job.labels, len(job.rows), c, batch["labels"][i, :m].numpy())
            job.done = c.stop


def _kept(old: np.ndarray | None, rows: int, at: slice, new: np.ndarray) -> np.ndarray:
    """`old` with the rows `at` filled in. The first rows are the longest, so later ones fit."""
    if old is None:
        old = np.full((rows, *new.shape[1:]), -100 if new.ndim > 1 and new.dtype.kind == "i" else 0, new.dtype)
    old[at][tuple(slice(0, n) for n in new.shape)] = new
    return old
