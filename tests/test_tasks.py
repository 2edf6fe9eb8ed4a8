"""Losses of a block, and the grouping of its rows by length: the same gradient, less padding.

Kills: a group cut below its longest row; groups averaged; labels that stay behind when rows are sorted.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from fedlora.methods import METHODS
from fedlora.seeds import np_rng
from fedlora.training import batching
from fedlora.training.batching import SIZES, cut, even, fitted, stack_batches
from fedlora.training.loss import Loss
from fedlora.training.tasks.classification import Classification


def brute(longest: list[int], clients: int, overhead: int, most: int) -> int:
    """The least cost over all ways to cut."""
    n = len(longest)
    costs = []
    for inner in itertools.chain.from_iterable(itertools.combinations(range(1, n), k) for k in range(n)):
        ends = [0, *inner, n]
        if all(b - a <= most for a, b in itertools.pairwise(ends)):
            costs.append(sum(clients * (b - a) * longest[a] + overhead for a, b in itertools.pairwise(ends)))
    return min(costs)


@pytest.mark.parametrize("seed", range(12))
def test_cuts_are_the_cheapest(seed: int) -> None:
    r = np_rng("cuts", seed)
    n = int(r.integers(1, 10))
    longest = sorted(r.integers(1, 60, n).tolist(), reverse=True)
    clients, overhead, most = int(r.integers(1, 5)), int(r.choice([0, 10, 100, 10_000])), int(r.integers(1, n + 1))
    cuts = cut(longest, clients, overhead, most)
    assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])]
    assert cuts[-1][1] == n
    assert all(b - a <= most for a, b in cuts)
    assert sum(clients * (b - a) * longest[a] + overhead for a, b in cuts) == brute(longest, clients, overhead, most)


def setting(causal: bool, dropout: float = 0.1) -> tuple[Any, Any, Any]:
    """(loss, deltas, batch) of three clients with ragged rows, dropout on."""
    base = tiny.seeded(tiny.causal_families()["llama"]) if causal else tiny.bert(dropout=dropout)
    f = tiny.federation(METHODS["homlora"](rank=2), Path("unused"), base, causal=causal)
    examples = tiny.tokens(labels=not causal, longest=12)
    batches = []
    for i, n in enumerate((6, 4, 5)):
        batch = examples.collate(np.arange(10 * i, 10 * i + n))
        batch["seed"] = torch.arange(n) + 100 * i
        batch["common"] = torch.tensor(3)
        batches.append(batch)
    g = torch.Generator().manual_seed(0)
    start = f.method.init(f.context).params
    p = {k: torch.randn(3, *v.shape, generator=g) * 0.3 for k, v in start.items()}
    return f.loss, p, stack_batches(batches)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("overhead", [0, 3])
def test_groups_give_the_gradient_of_the_whole(
    causal: bool, parts: int, overhead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut wherever a token is saved, and into groups of unlike rows, against autograd through one padded forward pass."""
    loss, p, batch = setting(causal)
    loss.parts = parts
    monkeypatch.setattr(batching, "OVERHEAD", {"cpu": overhead})
    pieces = loss.pieces(batch)
    assert len(pieces) >= 2
    assert sum(x["input_ids"].numel() for x in pieces) < batch["input_ids"].numel()
    with torch.no_grad():  # as where a caller serves: methods that tune before they serve take gradients there
        value, grads = loss.gradient(lambda q: q, p, batch)
    leaves = {k: v.clone().requires_grad_() for k, v in p.items()}
    whole = loss(leaves, batch)
    want = torch.autograd.grad(whole.sum(), list(leaves.values()), materialize_grads=True)
    torch.testing.assert_close(value, whole.detach(), rtol=1e-5, atol=1e-6)
    for (k, got), w in zip(grads.items(), want, strict=True):
        torch.testing.assert_close(got, w, rtol=2e-4, atol=1e-6, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("parts", [1, 3])
def test_groups_give_the_second_derivatives_of_the_whole(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """H v and its mixed block, a group at a time, against double differentiation through one padded forward pass."""
    loss, p, batch = setting(False)
    loss.parts = parts
    monkeypatch.setattr(batching, "OVERHEAD", {"cpu": 0})
    assert len(loss.pieces(batch)) >= 2
    generator = torch.Generator().manual_seed(5)
    v = {k: torch.randn(x.shape, generator=generator) for k, x in p.items()}
    part = [k for k in p if k.part == "B"]
    for of, rows in ((list(p), list(p)), (part, [k for k in p if k not in part])):
        leaves = {k: x.clone().requires_grad_() for k, x in p.items()}
        g = torch.autograd.grad(loss(leaves, batch).sum(), [leaves[k] for k in of], create_graph=True)
        inner = torch.stack([(a * v[k]).sum() for a, k in zip(g, of, strict=True)]).sum()
        want = torch.autograd.grad(inner, [leaves[k] for k in rows], materialize_grads=True)
        got = loss.hessian_vector(lambda q: q, p, {k: v[k] for k in of}, batch, rows)
        assert list(got) == rows
        for k, w in zip(rows, want, strict=True):
            torch.testing.assert_close(got[k], w, rtol=2e-3, atol=1e-5, msg=lambda m, k=k: f"{k}: {m}")
        assert sum(float(w.abs().sum()) for w in want) > 0.1


def test_no_piece_loses_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, _, batch = setting(False)
    monkeypatch.setattr(batching, "OVERHEAD", {"cpu": 0})
    real = batch["attention_mask"].sum(2) * (batch["weight"] > 0)
    seen = sum((x["attention_mask"].sum(2) * (x["weight"] > 0)).sum() for x in loss.pieces(batch))
    assert int(seen) == int(real.sum())
    for x in loss.pieces(batch):
        assert bool((x["attention_mask"].sum((0, 1)) > 0).all())  # no column of padding alone


@pytest.mark.parametrize("change", ["left", "own"])
def test_what_is_not_padded_on_the_right_stays_whole(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left padding, and a user's own array beside the tokens: trimming would cut content."""
    loss, _, batch = setting(False)
    monkeypatch.setattr(batching, "OVERHEAD", {"cpu": 0})
    if change == "left":
        batch = batch | {n: batch[n].flip(2) for n in ("input_ids", "attention_mask")}
    else:
        batch = batch | {"picture": torch.zeros(3, 6, batch["input_ids"].shape[2])}
    assert loss.pieces(batch) == [batch]


def test_a_padding_row_has_no_weight() -> None:
    loss, p, batch = setting(False, dropout=0.0)
    odd = {n: v.clone() for n, v in batch.items()}
    odd["labels"][1, 4:] = (odd["labels"][1, 4:] + 1) % 3  # rows 4 and 5 of client 1 only pad
    assert torch.equal(loss(p, batch), loss(p, odd))
    odd["labels"][1, 3] = (odd["labels"][1, 3] + 1) % 3
    assert not torch.equal(loss(p, batch), loss(p, odd))


def test_half_precision_meets_few_shapes() -> None:
    """Each new shape is compiled anew in bf16, so lengths are multiples of 8 and numbers of rows come from a short list."""
    model = tiny.adapt(tiny.bert().bfloat16())
    loss = Loss(model, Classification(tiny.CLASSES))
    r = np_rng("shapes")
    for _ in range(20):
        batches = [
            tiny.tokens(longest=30, seed=int(r.integers(9))).collate(r.choice(100, 13, replace=False)) for _ in range(3)
        ]
        pieces = loss.pieces(stack_batches(batches))
        assert all(p["input_ids"].shape[2] % 8 == 0 and p["input_ids"].shape[1] in SIZES for p in pieces)
        tokens = sum(int(p["attention_mask"].sum()) for p in pieces)
        assert tokens == sum(int(b["attention_mask"].sum()) for b in batches)
    assert even(13, model) == 16
    model.base.config.max_position_embeddings = 17
    assert even(13, model) == 13  # a longer row would have no positions
    assert even(13, tiny.adapt(tiny.bert())) == 13


def test_padding_to_an_even_length_changes_nothing() -> None:
    loss, p, batch = setting(False)
    wide = fitted(batch, 16)
    assert wide["input_ids"].shape[2] == 16 > batch["input_ids"].shape[2]
    _, a = loss.gradient(lambda q: q, p, batch)
    _, b = loss.gradient(lambda q: q, p, wide)
    tiny.close(a, b)
    causal, q, rows = setting(True)
    _, a = causal.gradient(lambda q: q, q, rows)
    _, b = causal.gradient(lambda q: q, q, fitted(rows, 24))
    tiny.close(a, b)
