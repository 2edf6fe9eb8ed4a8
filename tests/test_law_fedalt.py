"""FedALT: the rest of the world by plain means, and the router token by token, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from fedlora.adapters.routed import Routed
from fedlora.data.batches import LocalWork
from fedlora.errors import ConfigError
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.layers import Layer
from fedlora.methods import METHODS
from fedlora.methods.contract import Client, Context, ServerState, Upload
from fedlora.tree import Key, Params

CONTEXT = Context({"target": [Layer("w", 14, 12, True)], "head": [Layer("head", 3, 12, True)]}, 7)


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sent(seed: int) -> Params:
    return {
        Key("sent", "w", "A"): draw(4, 12, seed=seed),
        Key("sent", "w", "B"): draw(14, 4, seed=100 + seed),
        Key("head", "head", "weight"): draw(3, 12, seed=200 + seed),
    }


def test_the_rest_of_the_world_is_the_mean_of_the_others_last_uploads() -> None:
    """Clients a, b and c in round 1, b alone in round 2; d has never been there."""
    m = METHODS["fedalt"](rank=4)
    server = m.init(CONTEXT)
    start = m.broadcast(CONTEXT, server, Client("a", 1))
    assert not start[Key("lora", "w", "B_rest")].any() and start[Key("lora", "w", "A_rest")].any()
    last = {}
    for t, cohort in enumerate(("abc", "b")):
        ups = []
        for c in cohort:
            last[c] = sent(10 * t + ord(c))
            ups.append(Upload(Client(c, ord(c)), last[c]))
        server = m.aggregate(CONTEXT, server, iter(ups))
        for c in "abcd":
            down = m.broadcast(CONTEXT, server, Client(c, 1))
            assert not any(k.adapter.startswith("client") or k.adapter == "sent" for k in down)
            for part in ("A", "B"):
                others = [last[o][Key("sent", "w", part)] for o in "abc" if o != c]
                torch.testing.assert_close(down[Key("lora", "w", f"{part}_rest")], sum(others) / len(others))
        total = sum(ord(c) for c in cohort)
        head = Key("head", "head", "weight")
        torch.testing.assert_close(server.params[head], sum(ord(c) / total * last[c][head] for c in cohort))


def test_the_router_weighs_each_token_of_each_client() -> None:
    form = Routed(4, 8.0)
    shapes = {"A": (4, 12), "B": (14, 4), "A_rest": (4, 12), "B_rest": (14, 4), "gate": (2, 12)}
    p = {Key("lora", "w", n): draw(3, *s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    x, y = draw(6, 5, 12, seed=9), draw(6, 5, 14, seed=10)  # three clients of two rows of five tokens
    got = form.apply(x, y, {k.part: v for k, v in form.view(p).items()}, None)
    part = lambda n, k: p[Key("lora", "w", n)][k]  # noqa: E731
    for row in range(6):
        k = row // 2
        for t in range(5):
            v = x[row, t]
            e = (part("gate", k) @ v).exp()
            own, rest = part("B", k) @ (part("A", k) @ v), part("B_rest", k) @ (part("A_rest", k) @ v)
            torch.testing.assert_close(got[row, t], y[row, t] + 2.0 * (e[0] * own + e[1] * rest) / e.sum())


def test_a_client_that_has_never_trained_is_served_half_of_the_mean() -> None:
    m = METHODS["fedalt"](rank=4)
    server = m.aggregate(CONTEXT, ServerState(0, {}, {"clients": {}}), iter([Upload(Client("a", 1), sent(1))]))
    down, kept = m.broadcast(CONTEXT, server, Client("z", 1)), m.fresh(CONTEXT, Client("z", 1))
    parts = {k.part: v.double()[None] for k, v in m.form.view(down | kept).items() if k.adapter == "lora"}
    x = draw(2, 12, seed=3)
    got = Routed.apply(x, torch.zeros(2, 14, dtype=torch.float64), parts, None)
    torch.testing.assert_close(
        got, 0.5 * 4.0 * x @ sent(1)[Key("sent", "w", "A")].mT @ sent(1)[Key("sent", "w", "B")].mT
    )


def test_nobody_overwrites_a_clients_own_adapter(tmp_path: Path) -> None:
    """What a client kept after its last round is what the server remembers of it, to the bit; the rest moves others."""
    f = tiny.federation(
        METHODS["fedalt"](rank=2), tmp_path, plan=LocalWork(steps=2, batch_size=4),
        evaluation=Evaluation(every=9, views=("personal",)), sampling=Sampling(rounds=3, clients_per_round=3),
    )  # fmt: skip
    f.run()
    loaded = f.store.load_server()
    server = ServerState.restored(*loaded)
    for id, n in server.notes["clients"].items():
        kept = f.store.load_client(id, 3)
        for k, v in server.params.items():
            if k.adapter == f"client{n}":
                assert torch.equal(kept[k._replace(adapter="lora")], v)


def test_refused() -> None:
    with pytest.raises(ConfigError, match="routes between two low-rank products"):
        METHODS["fedalt"](adapter="dora")
