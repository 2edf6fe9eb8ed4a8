"""What a model is trained for: the loss of every example and the weight it has in its client's mean.

A task turns (output, batch) into per-row (sum of losses, number of things counted); the client's loss is the ratio of
their weighted sums. Rows of a block that only pad have weight 0. Metrics of predictions are in metrics.py.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad

from .kernels import width
from .model import Adapted, Batch
from .tree import Key, Params


class Task(ABC):
    """Frozen description of a task; `kind` is its name in recipes."""

    kind: ClassVar[str]

    @abstractmethod
    def row_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Summed loss of each row, [N]; output [N ...] in any float dtype, labels [N ...]."""

    def row_counts(self, labels: Tensor) -> Tensor:
        """How many terms the loss of each row sums, [N]."""
        return torch.ones(len(labels), device=labels.device)


def full(output: Tensor) -> Tensor:
    """Half precision to fp32 before a softmax or a square; fp32 and fp64 stay."""
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy over `classes`; labels [N] int64."""

    kind: ClassVar[str] = "classification"
    classes: int = 2

    def row_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(full(output), labels, reduction="none")


@dataclass(frozen=True)
class Regression(Task):
    """Squared error; labels [N] float."""

    kind: ClassVar[str] = "regression"

    def row_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        return (full(output).view(len(labels), -1)[:, 0] - labels.to(output)).square()


@dataclass(frozen=True)
class CausalLM(Task):
    """Cross-entropy of the next token, mean over scored tokens; labels [N L], -100 where there is no loss."""

    kind: ClassVar[str] = "causal-lm"

    def row_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        n, length, vocabulary = output.shape
        target = labels[:, 1:].reshape(-1)
        scores = full(output[:, :-1]).reshape(-1, vocabulary)
        return F.cross_entropy(scores, target, reduction="none", ignore_index=-100).view(n, length - 1).sum(1)

    def row_counts(self, labels: Tensor) -> Tensor:
        return (labels[:, 1:] != -100).sum(1).float()


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """One batch [K b ...] from one [b ...] per client, each padded to the widest and longest of the block.

    Padding tokens are masked; padding rows repeat a client's first row with weight 0, so no row is fully masked.
    """
    b = max(len(x["labels"]) for x in batches)
    out: Batch = {}
    for name in batches[0]:
        leaves = [x[name] for x in batches]
        if leaves[0].ndim >= 2 and len({v.shape[1:] for v in leaves}) > 1:
            width = max(v.shape[1] for v in leaves)
            fill = -100 if name == "labels" else 0
            leaves = [F.pad(v, (*[0, 0] * (v.ndim - 2), 0, width - v.shape[1]), value=fill) for v in leaves]
        if leaves[0].ndim:
            leaves = [v if len(v) == b else torch.cat([v, v[:1].expand(b - len(v), *v.shape[1:])]) for v in leaves]
        out[name] = torch.stack(leaves)
    rows = torch.tensor([len(x["labels"]) for x in batches])
    out["weight"] = (torch.arange(b)[None] < rows[:, None]).float()
    return out


TOKENWISE = {"input_ids", "attention_mask", "token_type_ids", "labels"}  # leaves [K b L]
OVERHEAD = {"cpu": 128}  # what a further forward and backward costs, in padded tokens
LAUNCHES = 16_384  # the same on an accelerator, where many small kernels cost more than padding
HALF = {"cpu": 8}  # how many times as much in half precision: tokens are faster, and oneDNN packs the weights anew
INF = float("inf")
CACHED = {torch.float32: 2048, torch.bfloat16: 4096}  # padded tokens whose activations a CPU's caches still hold, about
COMPILED = 8192  # the same with compiled attention, whose scores need no room there
EVEN = 8  # in half precision lengths are multiples of this, and rows come in SIZES: see `cut`
SIZES = sorted({a * 2**n for a in (1, 3) for n in range(12)})


def cut(
    longest: Sequence[int],
    clients: int,
    overhead: int,
    most: int,
    sizes: Sequence[int] | None = None,
    tokens: float = INF,
) -> list[tuple[int, int]]:
    """Where to cut rows that are sorted by length, so that padded tokens + overhead of every piece are fewest.

    longest[j]: tokens of the longest j-th row; most: rows in a piece; sizes: allowed numbers of rows, None for any; tokens:
    padded tokens in a piece of more than one row. Returns (first, end) of each piece.
    """
    allowed = [n for n in sizes or range(1, most + 1) if n <= most]
    best: list[tuple[int, int]] = [(0, 0)]  # (cost, start of the last piece) of the first j rows
    for j in range(1, len(longest) + 1):
        starts = [j - n for n in allowed if n <= j and (n == 1 or clients * n * longest[j - n] <= tokens)]
        best.append(min((best[i][0] + clients * (j - i) * longest[i] + overhead, i) for i in starts))
    cuts, j = [], len(longest)
    while j:
        cuts.append((best[j][1], j))
        j = best[j][1]
    return cuts[::-1]


def padded_right(batch: Batch) -> bool:
    """Whether the batch holds token rows that are padded on the right and nothing else of that length."""
    mask = batch.get("attention_mask")
    if mask is None or mask.ndim != 3 or any(v.ndim > 2 and n not in TOKENWISE for n, v in batch.items()):
        return False
    return bool((mask[..., 1:] <= mask[..., :-1]).all())


def _rows(batch: Batch, i: int, j: int) -> Batch:
    return {n: v[:, i:j] if v.ndim > 1 else v for n, v in batch.items()}


def fitted(batch: Batch, length: int) -> Batch:
    """Token rows cut or padded to `length`."""

    def fit(name: str, v: Tensor) -> Tensor:
        more = length - v.shape[2]
        return v[:, :, :length] if more <= 0 else F.pad(v, (0, more), value=-100 if name == "labels" else 0)

    return {n: fit(n, v) if v.ndim > 2 else v for n, v in batch.items()}


def packed(batch: Batch, lengths: Tensor, parts: int) -> list[Batch]:
    """Groups of rows that are sorted by length, alike in their tokens, for a model that computes them without padding.

    lengths [K b] of the rows; a client's rows that only pad count as one token.
    """
    pieces = []
    for i in range(min(parts, lengths.shape[1])):
        if not lengths[:, i].any():
            break  # only padding is left
        rows = {n: v[:, i::parts] if v.ndim > 1 else v for n, v in batch.items()}
        piece = fitted(rows, int(lengths[:, i].max()))
        pieces.append(piece | {"lengths": lengths[:, i::parts].clamp_min(1)})
    return pieces


def even(length: int, model: Adapted) -> int:
    """The length that rows of `length` tokens are computed at.

    Half-precision products are compiled anew for every shape on a CPU (milliseconds each, far more than the product) and
    like multiples of 8 on a GPU, so shapes are few there; fp32 takes rows as they are.
    """
    if not model.half:
        return length
    wide = -(-length // EVEN) * EVEN
    return wide if wide <= model.longest else length


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
        y = self.model.forward(p, batch).flatten(0, 1)
        each = self.task.row_losses(y, batch["labels"].flatten(0, 1)).view(batch["weight"].shape)
        return (each * batch["weight"]).sum(1) / total

    def pieces(self, batch: Batch) -> list[Batch]:
        """Row groups of a batch whose gradients are summed: for accumulation, and so that little of a group is padding."""
        k, b = batch["weight"].shape
        most = -(-b // self.parts)
        if not padded_right(batch):
            return [_rows(batch, i, i + most) for i in range(0, b, most)] if self.parts > 1 else [batch]
        lengths = batch["attention_mask"].sum(2) * (batch["weight"] > 0)  # [K b]
        order = lengths.argsort(dim=1, descending=True, stable=True)
        batch = {
            n: v[torch.arange(k, device=v.device)[:, None], order.to(v.device)] if v.ndim > 1 else v
            for n, v in batch.items()
        }
        lengths = lengths.gather(1, order)
        longest = lengths.amax(0).tolist()  # of the j-th longest rows
        device = batch["weight"].device.type
        tokens = CACHED.get(self.model.dtype, INF) if device == "cpu" else INF
        tokens = COMPILED if self.model.compiled else tokens
        if self.model.packs(batch):
            return packed(batch, lengths, max(self.parts, math.ceil(k * width(lengths) / tokens)))
        overhead = OVERHEAD.get(device, LAUNCHES) * (HALF.get(device, 2) if self.model.half else 1)
        wide = [even(n, self.model) for n in longest]
        cuts = cut(wide, k, overhead, most, SIZES if self.model.half else None, tokens)
        return [fitted(_rows(batch, i, j), wide[i]) for i, j in cuts if longest[i] > 0]

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
            with torch.enable_grad(), self.model.training(piece):  # also for a caller who serves under no_grad
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
