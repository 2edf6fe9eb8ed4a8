"""RoLoRA and FedSVD: the half that a round freezes, what is exact, and FedSVD's factors against a dense SVD."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_law_baselines import ONE, lora

from fedlora.data.batches import LocalWork
from fedlora.errors import ConfigError
from fedlora.federation.callbacks import Callback
from fedlora.federation.run import Federation
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.layers import Layer
from fedlora.methods import METHODS
from fedlora.methods.contract import Client, Context, Method, RoundInfo, ServerState, Upload
from fedlora.training.batching import stack_batches
from fedlora.training.loss import Loss
from fedlora.training.optimizers import SGD, AdamW
from fedlora.training.tasks.classification import Classification
from fedlora.tree import Key, Params, select, stack

SHORT: dict[str, Any] = {
    "plan": LocalWork(steps=2, batch_size=4),
    "evaluation": Evaluation(every=9, views=("personal",)),
}
CONTEXT = Context({"target": [Layer("w", 12, 10, True), Layer("v", 9, 14, True)]}, 7)


def course(m: Method, folder: Path, rounds: int) -> tuple[list[Params], list[float | None], Federation]:
    """(the server's leaves before and after each round, the exactness meter of each round)."""
    f = tiny.federation(m, folder, **SHORT | {"sampling": Sampling(rounds=rounds)})
    states = []
    engine, server = f.engine(Callback()), m.init(f.context)
    for _ in range(rounds):
        states.append(server.params)
        server, _ = engine.round(server, rounds, [f.client(i) for i in range(4)])
    states.append(server.params)
    f.run()
    lines = map(json.loads, (f.store.root / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return states, [x["exactness"] and x["exactness"]["product_error"] for x in lines if x["kind"] == "train"], f


@pytest.mark.parametrize(("period", "first", "turns"), [(1, "B", "BABA"), (2, "A", "AABB")])
def test_halves_take_turns_and_the_other_one_stays_to_the_bit(
    period: int, first: Any, turns: str, tmp_path: Path
) -> None:
    m = METHODS["rolora"](rank=2, period=period, first=first, optimizer=SGD(0.5))
    states, _, _ = course(m, tmp_path, 4)
    for t, part in enumerate(turns):
        moved = {k.part for k in states[t] if k.adapter == "lora" and not torch.equal(states[t][k], states[t + 1][k])}
        # While B is zero, A has no gradient, and moves by the rounding of a mean at most.
        grows = part == "B" or "B" in turns[:t]
        assert moved == {part} if grows else moved <= {part}


@pytest.mark.parametrize("name", ["rolora", "fedsvd"])
def test_the_meter_reads_zero_where_fedits_does_not(name: str, tmp_path: Path) -> None:
    ours = course(METHODS[name](rank=2, optimizer=AdamW(1e-2)), tmp_path / "a", 4)[1]
    fedit = course(METHODS["homlora"](rank=2, optimizer=AdamW(1e-2)), tmp_path / "b", 4)[1]
    assert len(ours) == 4 and all(x is not None and x < 1e-6 for x in ours)
    assert all(x is not None and x > 1e-3 for x in fedit)


@pytest.mark.parametrize("round", [0, 1])
def test_a_step_of_rolora_is_plain_descent_on_one_half(round: int) -> None:
    """Gradient of the live half and the head by autograd in float64, with the other half held."""
    m = METHODS["rolora"](rank=3, alpha=6.0, optimizer=SGD(0.5))
    model = tiny.adapt(tiny.bert().double())
    context, data, g = Context(model.groups, 7), tiny.data(), torch.Generator().manual_seed(1)
    x = stack([m.init(context).params])
    x = {k: (v + 0.3 * torch.randn(v.shape, generator=g)).double() for k, v in x.items()}
    b = stack_batches([data.examples.collate(data.splits["train"][3][:4])])
    b["weight"] = b["weight"].double()
    loss = Loss(model, Classification(tiny.CLASSES))
    new, _ = m.step(m.begin(context, RoundInfo(round, 4), x, {}), loss, ONE, b)
    up, kept = m.finish(new)
    live = {k: v.clone().requires_grad_() for k, v in x.items() if k.part != "BA"[1 - round]}
    grads = torch.autograd.grad(loss(lora(x | live, 2.0), b).sum(), list(live.values()))
    assert up.keys() == live.keys() and not kept
    for k, d in zip(live, grads, strict=True):
        torch.testing.assert_close(up[k], x[k] - 0.5 * d)


def test_rolora_carries_doras_size_with_b(tmp_path: Path) -> None:
    states, _, _ = course(METHODS["rolora"](rank=2, adapter="dora", optimizer=SGD(0.5)), tmp_path, 2)
    moved = [
        {k.part for k in a if k.adapter == "lora" and not torch.equal(a[k], b[k])}
        for a, b in itertools.pairwise(states)
    ]
    assert moved == [{"B", "m"}, {"A"}]


# FedSVD -----------------------------------------------------------------------------------------------------------------
def uploads(m: Method, n: int, seed: int) -> tuple[ServerState, list[Upload]]:
    """A float64 server whose B has rank n, and three uploads."""
    g = torch.Generator().manual_seed(seed)
    server = {k: v.double() for k, v in m.init(CONTEXT).params.items()}
    ups = []
    for j, examples in enumerate((5, 1, 2)):
        p = {k: torch.randn(v.shape, generator=g, dtype=torch.float64) for k, v in server.items() if k.part == "B"}
        for v in p.values():
            v[:, n:] = 0
        ups.append(Upload(Client(f"c{j}", examples), p))
    return ServerState(0, server), ups


@pytest.mark.parametrize("n", [4, 2])
def test_fedsvd_is_the_svd_of_the_dense_product(n: int) -> None:
    """With a B of full rank and of a smaller one, from Kaiming's A and from an orthonormal one."""
    m = METHODS["fedsvd"](rank=4)
    server, ups = uploads(m, n, 0)
    for seed in (1, 2):
        new = m.aggregate(CONTEXT, server, iter(ups))
        for s in CONTEXT.groups["target"]:
            a, b = Key("lora", s.name, "A"), Key("lora", s.name, "B")
            dense = sum(u.client.examples / 8 * u.params[b] for u in ups) @ server.params[a]
            torch.testing.assert_close(new.params[b] @ new.params[a], dense)
            torch.testing.assert_close(new.params[a] @ new.params[a].mT, torch.eye(4, dtype=torch.float64))
            spectrum = torch.linalg.svdvals(dense)[:4]
            torch.testing.assert_close(new.params[b].norm(dim=0), spectrum)
            torch.testing.assert_close(new.params[b].mT @ new.params[b], torch.diag(spectrum**2))
            top = new.params[b].gather(0, new.params[b].abs().argmax(0)[None])
            assert bool((top[:, :n] > 0).all())
        server, ups = new, uploads(m, n, seed)[1]


def test_fedsvd_refactors_when_it_is_due(tmp_path: Path) -> None:
    states, _, _ = course(METHODS["fedsvd"](rank=2, svd_period=2, svd_warmup=1, optimizer=SGD(0.5)), tmp_path, 4)
    moved = [any(k.part == "A" and not torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(states)]
    assert moved == [False, False, True, False]


def test_without_refactoring_fedsvd_is_ffa(tmp_path: Path) -> None:
    common = {"rank": 2, "optimizer": SGD(0.5)}
    a, _, _ = course(METHODS["fedsvd"](**common, svd_period=0), tmp_path / "a", 3)
    b, _, _ = course(METHODS["ffa"](**common), tmp_path / "b", 3)
    tiny.close(select(a[-1], lambda k: k.part != "A"), b[-1], 1e-7)
    c, _, _ = course(METHODS["fedsvd"](**common), tmp_path / "c", 3)
    assert any(not torch.allclose(c[-1][k], v) for k, v in b[-1].items() if k.adapter == "head")


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("rolora", {"period": 0}, "method.period"),
        ("rolora", {"moments": "keep"}, "method.moments"),
        ("rolora", {"adapter": "bitfit"}, "tells two halves apart"),
        ("fedsvd", {"adapter": "dora"}, "FedSVD decomposes a low-rank product"),
        ("fedsvd", {"svd_period": -1}, "method.svd_period"),
    ],
)
def test_refused(name: str, fields: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        METHODS[name](**fields)
