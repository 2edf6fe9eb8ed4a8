"""Ditto, SCAFFOLD and FedRep against their algorithms as plain loops in float64, and their reductions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fedlora.data.batches import LocalWork
from fedlora.errors import ConfigError
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods import METHODS
from fedlora.methods.contract import Client, Context, Method, RoundInfo, ServerState, Upload
from fedlora.training.batching import stack_batches
from fedlora.training.loss import Loss
from fedlora.training.optimizers import SGD, AdamW
from fedlora.training.tasks.classification import Classification
from fedlora.tree import Key, Params, select, stack, unstack

ONE = torch.ones(1, dtype=torch.float64)
SHORT: dict[str, Any] = {
    "plan": LocalWork(steps=2, batch_size=4),
    "evaluation": Evaluation(every=9, views=("personal",)),
    "sampling": Sampling(rounds=3),
}


def double(p: Params, noise: int | None = None) -> Params:
    g = torch.Generator().manual_seed(noise or 0)
    return {k: (v + 0.3 * torch.randn(v.shape, generator=g) if noise is not None else v).double() for k, v in p.items()}


class Bench:
    """A float64 BERT, three clients' batches, and the gradient of plain LoRA with scale 2."""

    def __init__(self) -> None:
        self.model = tiny.adapt(tiny.bert().double())
        self.context, data = Context(self.model.groups, 7), tiny.data()
        self.loss = Loss(self.model, Classification(tiny.CLASSES))
        self.batches = []
        for c in (1, 2, 3):
            rows = data.splits["train"][c]
            each = [stack_batches([data.examples.collate(rows[i * 3 : i * 3 + 3])]) for i in range(2)]
            for b in each:
                b["weight"] = b["weight"].double()
            self.batches.append(each)

    def gradient(self, p: Params, batch: Any) -> Params:
        leaves = {k: v.clone().requires_grad_() for k, v in p.items()}
        ready = {k: (v * 2.0 if k.part == "B" else v)[None] for k, v in leaves.items()}
        return dict(zip(leaves, torch.autograd.grad(self.loss(ready, batch).sum(), list(leaves.values())), strict=True))

    def train(self, m: Method, server: ServerState, kept: Params, client: int, round: int) -> tuple[Params, Params]:
        down = m.broadcast(self.context, server, Client(f"c{client}", 1))
        work = m.begin(self.context, RoundInfo(round, 3), stack([down]), stack([kept]))
        for b in self.batches[client]:
            work, _ = m.step(work, self.loss, ONE, b)
        up, mine = m.finish(work)
        return unstack(up, 1)[0], unstack(mine, 1)[0]


def test_scaffold_is_its_algorithm_over_three_rounds() -> None:
    """Clients 0, 1 and 2 with uniform weights; client 2 takes part in round 2 alone."""
    m, bench, lr = METHODS["scaffold"](rank=2, alpha=4.0, weights="uniform", optimizer=SGD(0.3)), Bench(), 0.3
    server = m.init(bench.context)
    server = ServerState(0, double(server.params, 1), server.notes)
    server.params.update({k: torch.zeros_like(v) for k, v in server.params.items() if k.adapter == "control"})
    kept = [double(m.keep(bench.context, Client(f"c{i}", 1))) for i in range(3)]
    x = select(server.params, lambda k: k.adapter != "control")
    c = {k: torch.zeros_like(v) for k, v in x.items()}
    own = [dict(c) for _ in range(3)]
    met: set[int] = set()
    for t, cohort in enumerate([(0, 1), (0, 1, 2), (0, 1)]):
        ups, ys = [], []
        for i in cohort:
            up, kept[i] = bench.train(m, server, kept[i], i, t)
            ups.append(Upload(Client(f"c{i}", 1), up))
            y = dict(x)
            for b in bench.batches[i]:
                g = bench.gradient(y, b)
                y = {k: v - lr * (g[k] - own[i][k] + c[k]) for k, v in y.items()}
            own[i] = {k: own[i][k] - c[k] + (x[k] - y[k]) / (2 * lr) for k in x}
            ys.append(y)
        met |= set(cohort)
        server = m.aggregate(bench.context, server, iter(ups))
        x = {k: sum(y[k] for y in ys) / len(ys) for k in x}
        c = {k: sum(own[i][k] for i in met) / len(met) for k in x}  # those that were never asked do not count
        for k in x:
            torch.testing.assert_close(server.params[k], x[k])
            torch.testing.assert_close(server.params[Key("control", k.layer, f"c{k.part}")], c[k])


def run(m: Method, folder: Path) -> Any:
    f = tiny.federation(m, folder, **SHORT)
    f.run()
    return f


def test_the_first_round_of_scaffold_is_homloras_and_the_second_is_not(tmp_path: Path) -> None:
    states = {}
    for name in ("scaffold", "homlora"):
        for rounds in (1, 2):
            f = tiny.federation(
                METHODS[name](rank=2, optimizer=SGD(0.5)),
                tmp_path / f"{name}{rounds}",
                **SHORT | {"sampling": Sampling(rounds=rounds)},
            )
            f.run()
            states[name, rounds] = select(f.store.load_server()[1], lambda k: k.adapter != "control")
    tiny.close(states["scaffold", 1], states["homlora", 1], 0.0)
    assert any(not torch.equal(v, states["homlora", 2][k]) for k, v in states["scaffold", 2].items())


def test_ditto_is_its_algorithm() -> None:
    m, bench = METHODS["ditto"](rank=2, alpha=4.0, lam=0.7, optimizer=SGD(0.3)), Bench()
    server = ServerState(0, double(m.init(bench.context).params, 1))
    kept = double(m.keep(bench.context, Client("c0", 1)), 2)
    up, mine = bench.train(m, server, kept, 0, 0)
    x = dict(server.params)
    v = {k._replace(adapter=k.adapter.removeprefix("own-")): w for k, w in kept.items()}
    for b in bench.batches[0]:
        gx, gv = bench.gradient(x, b), bench.gradient(v, b)
        x = {k: w - 0.3 * gx[k] for k, w in x.items()}
        v = {k: w - 0.3 * (gv[k] + 0.7 * (w - server.params[k])) for k, w in v.items()}
    for k in x:
        torch.testing.assert_close(up[k], x[k])
        torch.testing.assert_close(mine[k._replace(adapter=f"own-{k.adapter}")], v[k])


def test_dittos_two_models_are_homlora_and_without_a_pull_local_only(tmp_path: Path) -> None:
    fields = {"rank": 2, "optimizer": SGD(0.5)}
    ditto, hom, local = (
        run(METHODS[n](**fields, **more), tmp_path / n)
        for n, more in (("ditto", {"lam": 0.0}), ("homlora", {}), ("local", {}))
    )
    tiny.close(ditto.store.load_server()[1], hom.store.load_server()[1], 0.0)
    for c in ditto.data.ids:
        own = {k._replace(adapter=k.adapter.removeprefix("own-")): v for k, v in ditto.store.load_client(c, 3).items()}
        tiny.close(own, local.store.load_client(c, 3), 0.0)


def test_ditto_serves_its_own_model_and_the_shared_one_to_strangers() -> None:
    m, bench = METHODS["ditto"](rank=2, alpha=4.0), Bench()
    down, kept = double(m.init(bench.context).params, 1), double(m.keep(bench.context, Client("c0", 1)), 2)
    mine = m.personal(bench.context, stack([down]), stack([kept]))
    shared = m.personal(bench.context, stack([down]), stack([m.fresh(bench.context, Client("c0", 1))]))
    for k, v in down.items():
        scale = 2.0 if k.part == "B" else 1.0
        torch.testing.assert_close(mine[k][0], scale * kept[k._replace(adapter=f"own-{k.adapter}")])
        torch.testing.assert_close(shared[k][0], scale * v)


@pytest.mark.parametrize("optimizer", [SGD(0.3), AdamW(0.02)], ids=["sgd", "adamw"])
def test_fedrep_trains_the_head_and_then_the_body(optimizer: Any) -> None:
    """Two steps of the head with the body fixed, then two of the body, each phase with an optimizer of torch's of its own."""
    m, bench = METHODS["fedrep"](rank=2, alpha=4.0, head_steps=2, optimizer=optimizer), Bench()
    server = ServerState(0, double(m.init(bench.context).params, 1))
    kept = double(m.keep(bench.context, Client("c0", 1)), 2)
    bench.batches[0] = bench.batches[0] * 2
    up, mine = bench.train(m, server, kept, 0, 0)
    x = {k: torch.nn.Parameter(v.clone()) for k, v in (server.params | kept).items()}
    for phase in (0, 1):
        live = [k for k in x if (k.adapter == "head") == (phase == 0)]
        of = torch.optim.SGD if isinstance(optimizer, SGD) else torch.optim.AdamW
        theirs = of([x[k] for k in live], lr=optimizer.lr, weight_decay=0.0)
        for b in bench.batches[0][2 * phase : 2 * phase + 2]:
            g = bench.gradient({k: v.detach() for k, v in x.items()}, b)
            for k in live:
                x[k].grad = g[k]
            theirs.step()
    assert {k.adapter for k in up} == {"lora"} and {k.adapter for k in mine} == {"head"}
    for k, v in (up | mine).items():
        torch.testing.assert_close(v, x[k].detach(), rtol=1e-6, atol=1e-8)


def test_a_round_in_which_fedreps_body_would_never_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.steps: got 2, expected at least 6, for FedRep"):
        tiny.federation(METHODS["fedrep"](rank=2), tmp_path, **SHORT)


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("ditto", {"lam": -1.0}, "method.lam"),
        ("fedrep", {"head": "shared"}, "heads stay with their clients"),
        ("fedrep", {"moments": "keep"}, "method.moments"),
        ("fedrep", {"head_steps": -1}, "method.head_steps"),
        ("scaffold", {"optimizer": SGD(0.1, momentum=0.9)}, "sgd without momentum"),
        ("scaffold", {"optimizer": AdamW()}, "got 'adamw', expected sgd"),
    ],
)
def test_refused(name: str, fields: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        METHODS[name](**fields)
