"""The mean loss of every client of a block, with its derivatives: what a method descends.

A task (task.py) gives the loss of every row and how many terms it sums; the client's loss is the ratio of their weighted
sums. Rows of a block that only pad have weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import grad

from ..model.adapted import Adapted, Batch
from ..tree import Key, Params
from .batching import pieces
from .task import Task


def losses_of(model: Adapted, task: Task, p: Params, batch: Batch) -> tuple[Tensor, Tensor]:
    """(the summed loss of each row [K b], the model's output [K b ...]; a language model's output has no tokens where losses alone
    could be had)."""
    flat = batch["labels"].flatten(0, 1)
    words, losses = task.words(flat), None
    if words is None:
        y = model.forward(p, batch)
    else:
        losses, y = model.scored(p, batch, words)
    return task.row_losses(y.flatten(0, 1), flat).view(y.shape[:2]) if losses is None else losses, y


class Loss:
    """The pure function a method descends: (model-ready deltas, batch) -> mean loss of each client [K].

    Pure although there is dropout: the masks are a function of the batch's own seed, so the same batch is the same
    function however often it is called. `parts` > 1 accumulates gradients over row groups: less memory, same gradient.
    """

    def __init__(self, model: Adapted, task: Task, parts: int = 1):
        self.model, self.task, self.parts = model, task, parts

    def beside(self, frozen: Params) -> Loss:
        """The same loss with model-ready deltas `frozen` always bound."""
        return _Beside(self, frozen)

    def __call__(self, p: Params, batch: Batch) -> Tensor:
        with self.model.training(batch):
            return self._share(p, batch, self._count(batch))

    def _count(self, batch: Batch) -> Tensor:
        counts = self.task.row_counts(batch["labels"].flatten(0, 1)).view(batch["weight"].shape)
        return (counts * batch["weight"]).sum(1).clamp_min(1e-12)

    def _share(self, p: Params, batch: Batch, total: Tensor) -> Tensor:
        """This batch's part of a mean over `total` terms, [K]."""
        each, _ = losses_of(self.model, self.task, p, batch)
        return (each * batch["weight"]).sum(1) / total

    def pieces(self, batch: Batch) -> list[Batch]:
        """Row groups of a batch whose gradients are summed: for accumulation, and so that little of a group is padding."""
        return pieces(self.model, batch, self.parts, self.task.leaves)

    def gradient(self, ready: Callable[[Params], Params], p: Params, batch: Batch) -> tuple[Tensor, Params]:
        """Value [K] and gradient of loss(ready(p), batch) with respect to the leaves p.

        Clients of a block do not interact, so the gradient of the sum holds every client's own gradient.
        """

        def first(value: Tensor, leaves: Params) -> Sequence[Tensor]:
            return grad(value.sum(), list(leaves.values()), materialize_grads=True)

        value, g = self._summed(first, ready, p, batch)
        return value, dict(zip(p, g, strict=True))

    def hessian_vector(
        self, ready: Callable[[Params], Params], p: Params, v: Params, batch: Batch, rows: Iterable[Key] | None = None
    ) -> Params:
        """H v of every client, exact: d/dp <g, v>, where g is the gradient with respect to the leaves that v has.

        rows: the leaves p to differentiate by, default all; with v on other leaves it is a mixed block of H. Linear in the
        batch's rows like a gradient, so it is summed over the same pieces.
        """
        wanted = list(p if rows is None else rows)

        def second(value: Tensor, leaves: Params) -> Sequence[Tensor]:
            g = grad(value.sum(), [leaves[k] for k in v], create_graph=True)
            inner = torch.stack([(a * b).sum() for a, b in zip(g, v.values(), strict=True)]).sum()
            return grad(inner, [leaves[k] for k in wanted], materialize_grads=True)

        return dict(zip(wanted, self._summed(second, ready, p, batch)[1], strict=True))

    def _summed(
        self,
        differentiate: Callable[[Tensor, Params], Sequence[Tensor]],
        ready: Callable[[Params], Params],
        p: Params,
        batch: Batch,
    ) -> tuple[Tensor, list[Tensor]]:
        """Value [K] and the derivatives of loss(ready(p), batch), a piece of the batch at a time."""
        leaves = {k: v.detach().requires_grad_() for k, v in p.items()}
        total = self._count(batch)
        value, sums = torch.zeros_like(total), None
        for piece in self.pieces(batch):
            with torch.enable_grad(), self.model.training(piece):  # even if the caller has switched gradients off
                part = self._share(ready(leaves), piece, total)
                found = list(differentiate(part, leaves))
            value = value + part.detach()
            sums = found if sums is None else list(torch._foreach_add(sums, found))
        assert sums is not None
        return value, sums


class _Beside(Loss):
    """A loss with frozen deltas beside the ones it is given."""

    def __init__(self, inner: Loss, frozen: Params):
        super().__init__(inner.model, inner.task, inner.parts)
        self.frozen = frozen

    def _share(self, p: Params, batch: Batch, total: Tensor) -> Tensor:
        return super()._share(p | self.frozen, batch, total)
