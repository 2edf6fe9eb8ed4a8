"""Ranks that differ by client do not collapse: clients that send back what they received do not move the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from fedlora.data.batches import LocalWork
from fedlora.federation.facts import facts
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.layers import Layer
from fedlora.methods import METHODS
from fedlora.methods.contract import Client, Context, ServerState, Upload
from fedlora.tree import Key, Params

CONTEXT = Context({"target": [Layer("w", 14, 12, True)], "head": [Layer("head", 3, 12, True)]}, 7)
A, B = Key("lora", "w", "A"), Key("lora", "w", "B")
RANKS = {"c0": 2, "c1": 2, "c2": 8}
CURED = [
    ("flexlora", "server"),
    ("flexlora", "holders"),
    ("hetlora", "holders"),
    ("florist", "server"),
    ("florist", "holders"),
]


def method(name: str, padding: str, **more: Any) -> Any:
    fixed = {"gamma": 1.0} if name == "hetlora" else {"tau": 1.0} if name == "florist" else {}
    return METHODS[name](rank=8, plan="explicit", ranks=tuple(RANKS.items()), padding=padding, **fixed | more)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def server_of(m: Any, canonical: bool = True) -> ServerState:
    """Factors of full rank, as an SVD gives them, so that a server which decomposes again finds the same."""
    start = {k: v.double() for k, v in m.init(CONTEXT).params.items()}
    u, s, vh = torch.linalg.svd(draw(14, 12, seed=0))
    sign = u.gather(0, u.abs().argmax(0)[None]).sign()[:, :8] if canonical else 1.0
    b, a = u[:, :8] * s[:8] * sign, vh[:8] * (sign.mT if canonical else 1.0)
    return ServerState(0, start | {A: a, B: b}, {"ranks": {}})


def echo(m: Any, server: ServerState, cohort: Any = RANKS) -> ServerState:
    ups = [Upload(Client(c, 1 + j), m.broadcast(CONTEXT, server, Client(c, 1 + j))) for j, c in enumerate(cohort)]
    return m.aggregate(CONTEXT, server, iter(ups))  # type: ignore[no-any-return]


def beyond(p: Params, n: int) -> float:
    s = torch.linalg.svdvals(p[B] @ p[A]) ** 2
    return float(s[n:].sum() / s.sum())


@pytest.mark.parametrize(("name", "padding"), CURED)
@pytest.mark.parametrize("cohort", [tuple(RANKS), ("c0", "c1")], ids=["all", "weak"])
def test_clients_that_send_back_what_they_received_do_not_move_the_server(name: str, padding: str, cohort: Any) -> None:
    """In a cohort of weak clients too, where nobody holds the last components."""
    m = method(name, padding)
    before = server_of(m)
    after = echo(m, before, cohort)
    for k in (A, B):
        torch.testing.assert_close(after.params[k], before.params[k], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["flexlora", "hetlora"])
def test_the_papers_rules_forget_what_weak_clients_do_not_hold(name: str) -> None:
    """This is what the meter is for; the numbers are of clients that learn nothing, for ten rounds."""
    m = method(name, "zero" if name == "flexlora" else "keep")
    server = server_of(m)
    first = beyond(server.params, 2)
    for _ in range(10):
        server = echo(m, server)
        shares = m.record(server)["spectrum"]
        assert sum(shares[2:]) == pytest.approx(beyond(server.params, 2), abs=1e-5)
    assert first > 0.3 and beyond(server.params, 2) < 0.02


@pytest.mark.parametrize(("name", "padding"), CURED)
def test_equal_ranks_are_the_papers_rule_bit_for_bit(name: str, padding: str) -> None:
    plain = "keep" if name == "hetlora" else "zero"
    got = []
    for p in (padding, plain):
        m = METHODS[name](rank=4, plan="same", padding=p)
        start = ServerState(0, m.init(CONTEXT).params, {"ranks": {}})
        ups = []
        for j in range(3):
            down = m.broadcast(CONTEXT, start, Client(f"c{j}", 1 + j))
            ups.append(
                Upload(
                    Client(f"c{j}", 1 + j),
                    {k: v + draw(*v.shape, seed=j).float() if v.is_floating_point() else v for k, v in down.items()},
                )
            )
        got.append(m.aggregate(CONTEXT, start, iter(ups)).params)
    tiny.close(*got, 0.0)


def trained(m: Any, server: ServerState) -> list[Upload]:
    out = []
    for j, c in enumerate(RANKS):
        down = m.broadcast(CONTEXT, server, Client(c, 1 + j))
        out.append(
            Upload(
                Client(c, 1 + j),
                {k: v + 0.3 * draw(*v.shape, seed=j) if v.is_floating_point() else v for k, v in down.items()},
            )
        )
    return out


def best(dw: Tensor, r: int) -> Tensor:
    u, s, vh = torch.linalg.svd(dw)
    return u[:, :r] @ torch.diag(s[:r]) @ vh[:r]


def test_differences_of_products_are_those_of_dense_matrices() -> None:
    m = method("flexlora", "server")
    server = server_of(m)
    ups = trained(m, server)
    dense = server.params[B] @ server.params[A]
    for j, u in enumerate(ups):
        r = RANKS[u.client.id]
        dense = dense + (1 + j) / 6 * (u.params[B] @ u.params[A] - server.params[B][:, :r] @ server.params[A][:r])
    new = m.aggregate(CONTEXT, server, iter(ups)).params
    torch.testing.assert_close(new[B] @ new[A], best(dense, 8))


def test_raflora_is_a_mean_of_blocks_over_their_holders() -> None:
    """Blocks between the clients' ranks, (0, 2] and (2, 8], each with weights of the clients that have it, then an SVD."""
    m = method("flexlora", "holders")
    server = server_of(m)
    ups = trained(m, server)
    dense = torch.zeros(14, 12, dtype=torch.float64)
    for low, high in ((0, 2), (2, 8)):
        have = [(j, u) for j, u in enumerate(ups) if RANKS[u.client.id] >= high]
        mass = sum(1 + j for j, _ in have)
        dense = dense + sum((1 + j) / mass * u.params[B][:, low:high] @ u.params[A][low:high] for j, u in have)
    new = m.aggregate(CONTEXT, server, iter(ups)).params
    torch.testing.assert_close(new[B] @ new[A], best(dense, 8))


def test_rbla_is_a_mean_of_components_over_their_holders() -> None:
    """Row by row of A and column by column of B, with HetLoRA's weights ||B_k A_k||."""
    m = method("hetlora", "holders")
    server = server_of(m)
    ups = trained(m, server)
    sizes = [float((u.params[B] @ u.params[A]).norm()) for u in ups]
    new = m.aggregate(CONTEXT, server, iter(ups)).params
    for i in range(8):
        have = [(w, u) for w, u in zip(sizes, ups, strict=True) if RANKS[u.client.id] > i]
        mass = sum(w for w, _ in have)
        torch.testing.assert_close(new[A][i], sum(w / mass * u.params[A][i] for w, u in have))
        torch.testing.assert_close(new[B][:, i], sum(w / mass * u.params[B][:, i] for w, u in have))


def test_check_warns_and_a_run_records_the_spectrum(tmp_path: Path) -> None:
    short: dict[str, Any] = {
        "plan": LocalWork(steps=2, batch_size=4), "evaluation": Evaluation(every=9, views=("personal",)), "sampling": Sampling(rounds=2),
    }  # fmt: skip
    said = {}
    for name, padding in (("flexlora", "zero"), ("hetlora", "keep"), *CURED):
        m = METHODS[name](rank=4, rank_min=2, padding=padding)
        f = tiny.federation(m, tmp_path / name / padding, **short)
        said[name, padding] = facts(f, 4).caution
        same = tiny.federation(METHODS[name](rank=4, plan="same", padding=padding), tmp_path / "x", **short)
        assert facts(same, 4).caution == ""
    assert {at for at, why in said.items() if why} == {("flexlora", "zero"), ("hetlora", "keep")}
    assert "ranks from 2 to 4" in said["flexlora", "zero"] and "beyond rank 2 shrinks" in said["hetlora", "keep"]
    f.run()
    lines = [json.loads(x) for x in (f.store.root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in (x for x in lines if x["kind"] == "train"):
        assert sum(line["spectrum"]) == pytest.approx(1.0, abs=1e-5) and len(line["spectrum"]) == 4
