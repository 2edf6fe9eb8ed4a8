"""Optimizers at the server against the paper's algorithm in plain loops of numpy, and against torch's own momentum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from fedlora.errors import ConfigError
from fedlora.federation.channel import Channel
from fedlora.federation.guards import GUARDS
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods import METHODS
from fedlora.methods.contract import Client, Context, ServerState, Upload
from fedlora.tree import Key, Params

A, B, HEAD = Key("lora", "l", "A"), Key("lora", "l", "B"), Key("head", "h", "weight")
CONTEXT = Context({}, 0)
WEIGHTS = {"a": 3, "b": 1}


def leaves(seed: int) -> Params:
    g = torch.Generator().manual_seed(seed)
    shapes = {A: (2, 5), B: (4, 2), HEAD: (3, 4)}
    return {k: torch.randn(*s, generator=g, dtype=torch.float64) for k, s in shapes.items()}


def rounds(guard: Any, n: int = 4) -> tuple[list[Params], list[Params]]:
    """(the server after each round, the plain mean of each round), with clients that go where they like."""
    channel, server = Channel("fp32", None, (guard,)), ServerState(0, leaves(0))
    servers, means = [server.params], []
    for t in range(n):
        ups = [Upload(Client(c, w), leaves(10 * t + w)) for c, w in WEIGHTS.items()]
        means.append({k: (3 * ups[0].params[k] + ups[1].params[k]) / 4 for k in server.params})
        server = channel.aggregate(METHODS["homlora"](), CONTEXT, server, ups)
        servers.append(server.params)
    return servers, means


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedyogi"])
@pytest.mark.parametrize("ratio", [1.0, 8.0])
def test_algorithm_2_entry_by_entry(name: str, ratio: float) -> None:
    lr, b1, b2, tau = 0.3, 0.8, 0.95, 0.05
    more = {} if name == "fedadagrad" else {"beta_2": b2}
    servers, means = rounds(GUARDS[name](lr=lr, beta_1=b1, tau=tau, lr_ratio=ratio, **more))
    for k in (A, B, HEAD):
        x, mean = servers[0][k].numpy().ravel().tolist(), [m[k].numpy().ravel() for m in means]
        for i in range(len(x)):
            m, v, at = 0.0, tau * tau, x[i]
            for t in range(len(means)):
                d = mean[t][i] - at
                m = b1 * m + (1 - b1) * d
                if name == "fedadagrad":
                    v = v + d * d
                elif name == "fedadam":
                    v = b2 * v + (1 - b2) * d * d
                else:
                    v = v - (1 - b2) * d * d * np.sign(v - d * d)
                at = at + (ratio if k == B else 1) * lr * m / (np.sqrt(v) + tau)
                assert servers[t + 1][k].numpy().ravel()[i] == pytest.approx(at, rel=1e-9, abs=1e-12)


def test_fedavgm_is_torchs_momentum_along_the_mean_change() -> None:
    servers, means = rounds(GUARDS["fedavgm"](lr=0.7, momentum=0.6))
    for k in (A, B, HEAD):
        x = torch.nn.Parameter(servers[0][k].clone())
        optimizer = torch.optim.SGD([x], lr=0.7, momentum=0.6)
        for t, mean in enumerate(means):
            x.grad = (x - mean[k]).detach()
            optimizer.step()
            torch.testing.assert_close(x.detach(), servers[t + 1][k])


def test_without_momentum_fedavgm_is_the_mean() -> None:
    servers, means = rounds(GUARDS["fedavgm"](lr=1.0, momentum=0.0))
    for server, mean in zip(servers[1:], means, strict=True):
        tiny.close(server, mean, 1e-12)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_a_leaf_that_nobody_moved_stays_and_so_does_its_state(name: str) -> None:
    """Momentum must not move a half that a round freezes, nor may a pause let it decay."""
    guard = GUARDS[name]()
    old = ServerState(0, leaves(0))
    first, state = guard.settle(ServerState(1, leaves(1)), old, {})
    still, after = guard.settle(ServerState(2, leaves(2) | {A: first.params[A]}), first, state)
    assert torch.equal(still.params[A], first.params[A]) and not torch.equal(still.params[B], first.params[B])
    for k, v in state.items():
        assert torch.equal(after[k], v) == (k.part == "A")


def test_the_optimizer_is_used_and_what_a_personal_leaf_does_is_its_clients_business(tmp_path: Path) -> None:
    """Two runs that differ only at the server upload different things in the next round; B of FedSA is never touched."""
    few = {"evaluation": Evaluation(every=9, views=("personal",)), "sampling": Sampling(rounds=2)}
    runs = {}
    for name in ("plain", "fedadam"):
        guards = (GUARDS[name](),) if name in GUARDS else ()
        f = tiny.federation(
            METHODS["fedsa"](rank=2), tmp_path / name, **few | {"sampling": Sampling(rounds=2, guards=guards)}
        )
        f.run()
        loaded = f.store.load_server()
        assert loaded is not None
        runs[name] = ServerState.restored(*loaded), f.store.load_client("c3", 2)
    assert {k.part for k in runs["fedadam"][0].guards} == {"A", "weight", "bias"}
    assert any(not torch.equal(v, runs["plain"][1][k]) for k, v in runs["fedadam"][1].items())


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("fedadam", {"lr": 0.0}, "lr: got 0.0"),
        ("fedadam", {"beta_2": 1.0}, "beta_2: got 1.0"),
        ("fedyogi", {"beta_1": -0.1}, "beta_1"),
        ("fedadagrad", {"tau": 0.0}, "tau"),
        ("fedavgm", {"momentum": 1.0}, "momentum"),
        ("fedavgm", {"lr_ratio": 0.0}, "lr_ratio"),
    ],
)
def test_refused(name: str, fields: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GUARDS[name](**fields)
