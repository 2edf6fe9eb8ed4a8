"""Named tensors: means, stacking, ranks, factors. Kills: a mean that returns the first client; weights not normalised."""

from __future__ import annotations

import random

import pytest
import torch

from fedlora.seeds import number, rng
from fedlora.tree import Key, Params, cut_rank, factor, mean, norm, pad_rank, stack, unstack, where

A, B, R = Key("lora", "x", "A"), Key("lora", "x", "B"), Key("lora", "", "rank")


def leaves(rank: int, seed: int) -> Params:
    g = rng("tree", seed)
    return {A: torch.randn(rank, 5, generator=g), B: torch.randn(4, rank, generator=g)}


def test_mean_against_the_formula() -> None:
    ps, w = [leaves(3, i) for i in range(4)], [1.0, 5.0, 2.0, 0.5]
    got = mean(zip(ps, w, strict=True))
    for k in (A, B):
        want = sum(wi * p[k].double() for p, wi in zip(ps, w, strict=True)) / sum(w)
        torch.testing.assert_close(got[k].double(), want, rtol=1e-6, atol=1e-7)


def test_mean_streams_and_leaves_its_input_alone() -> None:
    p = leaves(2, 0)
    before = {k: v.clone() for k, v in p.items()}
    mean((p, 1.0) for _ in range(3))
    assert all(torch.equal(p[k], before[k]) for k in p)


def test_stack_orders_leaves_by_name() -> None:
    """Whatever order a file gave them in: sums over leaves must not depend on it."""
    names = [Key(a, s, p) for a in ("lora", "head") for s in ("b", "a", "c") for p in ("B", "A")]
    orders = [random.Random(i).sample(names, len(names)) for i in range(5)]
    assert {tuple(stack([{k: torch.zeros(2, 2) for k in o}])) for o in orders} == {tuple(sorted(names))}


def test_ragged_ranks_come_back() -> None:
    ps = [leaves(r, r) | {R: torch.tensor(r)} for r in (1, 4, 2)]
    both = stack(ps)
    assert both[A].shape == (3, 4, 5)
    torch.testing.assert_close(both[B] @ both[A], torch.stack([p[B] @ p[A] for p in ps]))
    for p, q in zip(ps, unstack(both, 3), strict=True):
        assert all(torch.equal(p[k], q[k]) for k in p)


def test_pad_and_cut() -> None:
    p = leaves(3, 0)
    assert torch.equal(cut_rank(A, pad_rank(A, p[A], 7), 3), p[A])
    assert torch.equal(pad_rank(B, p[B], 7)[:, 3:], torch.zeros(4, 4))


@pytest.mark.parametrize("split", ["sqrt", "B"])
def test_factor_is_the_best_of_its_rank(split: str) -> None:
    """Eckart and Young: the error is what the dropped singular values say (numpy in float64); signs are fixed."""
    import numpy as np

    w = torch.randn(7, 9, generator=rng("factor"))
    b, a = factor(w, 3, split)
    s = np.linalg.svd(w.double().numpy(), compute_uv=False)
    assert float((w - b @ a).norm()) == pytest.approx(float((s[3:] ** 2).sum() ** 0.5), rel=1e-5)
    b2, a2 = factor(w.clone(), 3, split)
    assert torch.equal(b, b2)
    assert torch.equal(a, a2)
    left = b / b.norm(dim=0)
    assert bool((left.gather(0, left.abs().argmax(0)[None]) > 0).all())
    if split == "B":
        torch.testing.assert_close(a @ a.mT, torch.eye(3), rtol=0, atol=1e-5)


def test_waiting_clients_keep_what_they_had() -> None:
    old, new = {"g": {A: torch.zeros(3, 2)}}, {"g": {A: torch.ones(3, 2)}}
    assert where(torch.tensor([True, False, True]), new, old)["g"][A].tolist() == [[1, 1], [0, 0], [1, 1]]


def test_norm_has_a_gradient_at_zero() -> None:
    v = torch.zeros(2, 3, 4, requires_grad=True)
    norm(v).sum().backward()
    assert v.grad is not None
    assert torch.equal(v.grad, torch.zeros_like(v))


def test_keys_and_seeds() -> None:
    assert Key.parse(str(A)) == A
    with pytest.raises(ValueError, match="has 2 parts, expected adapter/layer/part"):
        Key.parse("a/b")
    assert number(1, "a") != number("1", "a") != number(1, "a", 0)
    assert 0 <= number("x") < 2**63
    assert rng(1, 2).initial_seed() == rng(1, 2).initial_seed() != rng(2, 1).initial_seed()
