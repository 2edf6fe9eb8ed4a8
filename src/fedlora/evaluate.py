"""Evaluation in blocks: many clients' models on their own rows at once, sorted by length, without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .data.batches import batch_of
from .data.federated import FederatedData
from .metrics import Predictions
from .model import Adapted
from .tasks import Task, stack_batches
from .tree import Params, stack


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
    """
    out: list[Predictions | None] = [None] * len(params)
    same: dict[int, list[int]] = {}
    for j, p in enumerate(params):
        same.setdefault(id(p), []).append(j)
    groups = sorted(same.values(), key=lambda g: -sum(len(rows[j]) for j in g))
    for i in range(0, len(groups), block):
        part = groups[i : i + block]
        jobs = [[(j, r) for j in g for r in rows[j]] for g in part]
        found = _predict_block(
            model, task, data, [params[g[0]] for g in part], clients, jobs, max(1, batch_size // len(part))
        )
        for g, (losses, counts, values, labels) in zip(part, found, strict=True):
            at = 0
            for j in g:
                n = len(rows[j])
                cut = slice(at, at + n)
                at += n
                chars = getattr(data.examples, "chars", None)
                out[j] = Predictions(
                    losses[cut],
                    counts[cut],
                    None if values is None else values[cut],
                    None if labels is None else labels[cut],
                    None if chars is None else chars[rows[j]],
                )
    return [p for p in out if p is not None]


def _predict_block(
    model: Adapted,
    task: Task,
    data: FederatedData,
    params: Sequence[Params],
    clients: Sequence[int],
    jobs: Sequence[Sequence[tuple[int, int]]],
    size: int,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]]:
    """jobs[g]: (client slot, row) pairs of group g. Long rows first and together, so that little is padding."""
    stacked = {k: v.to(model.device) for k, v in stack(params).items()}
    order = [np.argsort(-data.examples.lengths(np.array([r for _, r in g], np.int64)), kind="stable") for g in jobs]
    k, most = len(jobs), max(len(g) for g in jobs)
    losses, counts = np.zeros((k, most)), np.zeros((k, most))
    values: np.ndarray | None = None
    labels: np.ndarray | None = None
    for start in range(0, most, size):
        picks = [o[start : start + size] for o in order]
        batches = []
        for g, pick in zip(jobs, picks, strict=True):
            repeated = g[:1] or [(0, 0)]  # what a client that is done computes, for nothing
            chosen = [g[x] for x in pick] if len(pick) else repeated
            owners = np.array([clients[j] for j, _ in chosen])
            batches.append(batch_of(data, owners, np.array([r for _, r in chosen], np.int64)))
        batch = stack_batches(batches)
        moved = {n: v.to(model.device) for n, v in batch.items()}
        with torch.inference_mode():
            y = model.forward(stacked, moved).flatten(0, 1)
            flat = moved["labels"].flatten(0, 1)
            loss = task.row_losses(y, flat).view(k, -1).double().cpu().numpy()
            count = task.row_counts(flat).view(k, -1).double().cpu().numpy()
            said = None
            if task.kind == "classification":
                said = y.argmax(-1).view(k, -1).cpu().numpy()
            elif task.kind == "regression":
                said = y.view(len(flat), -1)[:, 0].double().view(k, -1).cpu().numpy()
        for i, pick in enumerate(picks):
            losses[i, pick], counts[i, pick] = loss[i, : len(pick)], count[i, : len(pick)]
            if said is not None:
                if values is None or labels is None:
                    values, labels = (
                        np.zeros((k, most), said.dtype),
                        np.zeros((k, most), moved["labels"].cpu().numpy().dtype),
                    )
                values[i, pick] = said[i, : len(pick)]
                labels[i, pick] = batch["labels"][i, : len(pick)].numpy()
    for i, job in enumerate(jobs):
        n = len(job)
        yield (
            losses[i, :n],
            counts[i, :n],
            None if values is None else values[i, :n],
            None if labels is None else labels[i, :n],
        )
