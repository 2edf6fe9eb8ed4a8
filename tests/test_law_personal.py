"""Layers that stay at their client, whoever shares the others (FedBN)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_law_drift import Bench, double

import fedlora as fl
from fedlora.errors import ConfigError, ModelError
from fedlora.federation.setting import Sampling
from fedlora.methods import METHODS
from fedlora.methods.contract import Client, ServerState, Upload
from fedlora.training.optimizers import SGD
from fedlora.tree import select

MINE = r".*layer\.0\..*"  # of BERT's two layers, the first one


def test_fedbn_by_hand_over_three_rounds() -> None:
    """Two clients, plain descent in float64: the shared layers are averaged, the personal ones go on from where they were."""
    m, bench, lr = (
        METHODS["homlora"](rank=2, alpha=4.0, weights="uniform", optimizer=SGD(0.3), personal_layers=(MINE,)),
        Bench(),
        0.3,
    )
    whole = METHODS["homlora"](rank=2, alpha=4.0).init(bench.context).params
    server = m.init(bench.context)
    assert server.params.keys() == {k for k in whole if ".layer.0." not in k.layer} < whole.keys()
    server = ServerState(0, double(server.params, 1), server.notes)
    kept = [double(m.keep(bench.context, Client(f"c{i}", 1))) for i in range(2)]
    shared = dict(server.params)
    own = [dict(k) for k in kept]
    assert own[0].keys() == whole.keys() - shared.keys()
    for t in range(3):
        ups, ys = [], []
        for i in range(2):
            up, kept[i] = bench.train(m, server, kept[i], i, t)
            assert up.keys() == shared.keys()
            ups.append(Upload(Client(f"c{i}", 1), up))
            y = shared | own[i]
            for b in bench.batches[i]:
                g = bench.gradient(y, b)
                y = {k: v - lr * g[k] for k, v in y.items()}
            own[i] = {k: y[k] for k in own[i]}
            ys.append(y)
        server = m.aggregate(bench.context, server, iter(ups))
        shared = {k: (ys[0][k] + ys[1][k]) / 2 for k in shared}
        for k, v in shared.items():
            torch.testing.assert_close(server.params[k], v)
        for i in range(2):
            for k, v in own[i].items():
                torch.testing.assert_close(kept[i][k], v)
    assert any(not torch.allclose(v, own[1][k]) for k, v in own[0].items())


@pytest.mark.parametrize(
    "name", ["homlora", "fft", *(pytest.param(n, marks=pytest.mark.slow) for n in ("fedsa", "pf2lora", "bitfit"))]
)
def test_what_leaves_and_what_stays(name: str, tmp_path: Path) -> None:
    """A block is its clients one by one; a run that crashes goes on; and nothing of a personal layer reaches the server."""
    mine = {"fft": "LayerNorm", "bitfit": "LayerNorm"}.get(name, MINE)
    more: dict[str, Any] = {"rank_personal": 1} if name == "pf2lora" else {}
    made = METHODS[name](personal_layers=(mine,), **({"rank": 2} if name not in ("fft", "bitfit") else {}), **more)
    found = []
    for block in (1, 4):
        f = tiny.federation(made, tmp_path / f"{block}", block=block)
        f.run()
        found.append(f.store.load_server()[1])
    tiny.close(*found)
    stays = made._stays
    assert found[0] and not any(stays(k.layer) for k in found[0] if k.adapter != "head")
    held = [f.store.load_client(id, 3) for id in f.data.ids]
    assert all(any(stays(k.layer) for k in p) for p in held if p)
    again = tiny.federation(made, tmp_path / "crash", block=4)
    with pytest.raises(KeyboardInterrupt):
        again.run(tiny.Crash(again))
    tiny.federation(made, tmp_path / "crash", block=4).run()
    tiny.close(again.store.load_server()[1], found[1], 0.0)


def test_one_client_has_nothing_to_average(tmp_path: Path) -> None:
    """With one client it is the method itself: who keeps a leaf makes no difference."""
    whole = []
    for i, layers in enumerate([(), (MINE,)]):
        f = tiny.federation(
            METHODS["homlora"](rank=2, personal_layers=layers),
            tmp_path / str(i),
            data=tiny.data(clients=1),
            sampling=Sampling(rounds=2),
        )
        f.run()
        server = f.store.load_server()[1]
        whole.append(server | select(f.store.load_client("c0", 2) or {}, lambda k: "~" not in k.adapter))
    tiny.close(*whole, 1e-6)


@pytest.mark.parametrize("name", ["flexlora", "hetlora", "flora", "local", "fedrot"])
def test_servers_that_are_no_mean_of_leaves_refuse(name: str) -> None:
    with pytest.raises(ConfigError, match=r"method\.personal_layers"):
        METHODS[name](personal_layers=(MINE,))


@pytest.mark.parametrize(("layers", "says"), [(("nowhere",), "matches none of the"), ((".*",), "so nothing is shared")])
def test_names_that_do_not_fit(layers: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=says):
        tiny.federation(fl.HomLoRA(rank=2, personal_layers=layers), tmp_path).run()
    with pytest.raises(ConfigError, match="personal_layers"):
        fl.HomLoRA(rank=2, personal_layers=("(",))
