"""The baselines against oracles of their own: dense products and SVDs, central differences of MAML's objective, adapters that
PEFT mixes, and the proximal step by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from fedlora.data.batches import LocalWork, train_batches
from fedlora.errors import ConfigError
from fedlora.federation.callbacks import Callback
from fedlora.federation.setting import Sampling
from fedlora.federation.views import served
from fedlora.layers import Layer
from fedlora.methods.average import HomLoRA
from fedlora.methods.contract import Client, Context, Method, RoundInfo, ServerState, Upload
from fedlora.methods.feddpa import FedDPAF, FedDPAT
from fedlora.methods.fedprox import FedProx
from fedlora.methods.flexlora import FlexLoRA
from fedlora.methods.hetlora import HetLoRA
from fedlora.methods.perfedavg import PerFedAvg
from fedlora.methods.pf2lora import PF2LoRA
from fedlora.methods.slora import SLoRA
from fedlora.training.batching import stack_batches
from fedlora.training.loss import Loss
from fedlora.training.optimizers import SGD
from fedlora.training.tasks.classification import Classification
from fedlora.tree import Key, Params, select, stack

ONE = torch.ones(1, dtype=torch.float64)
CONTEXT = Context(
    {"target": [Layer("w", 12, 10, True), Layer("v", 9, 14, True)], "head": [Layer("head", 3, 12, True)]}, 7
)


# FlexLoRA ---------------------------------------------------------------------------------------------------------------
def uploads(ranks: list[int], examples: list[int]) -> list[Upload]:
    g = torch.Generator().manual_seed(0)
    out = []
    for j, (r, n) in enumerate(zip(ranks, examples, strict=True)):
        p: Params = {Key("lora", "", "rank"): torch.tensor(r)}
        for s in CONTEXT.groups["target"]:
            p[Key("lora", s.name, "A")] = torch.randn(r, s.in_, generator=g, dtype=torch.float64)
            p[Key("lora", s.name, "B")] = torch.randn(s.out, r, generator=g, dtype=torch.float64)
        p[Key("head", "head", "weight")] = torch.randn(3, 12, generator=g, dtype=torch.float64)
        out.append(Upload(Client(f"c{j}", n), p))
    return out


def best(dw: Tensor, r: int) -> Tensor:
    u, s, vh = torch.linalg.svd(dw)
    return u[:, :r] @ torch.diag(s[:r]) @ vh[:r]


def start(m: Method) -> ServerState:
    s = m.init(CONTEXT)
    return ServerState(0, {k: v.double() for k, v in s.params.items()}, s.notes)


@pytest.mark.parametrize("split", ["B", "sqrt"])
def test_flexlora_is_the_svd_of_the_dense_mean_product(split: Any) -> None:
    m = FlexLoRA(rank=4, rank_min=2, split=split, plan="explicit", ranks=(("c0", 2), ("c1", 3), ("c2", 4)))
    ups = uploads([2, 3, 4], [5, 1, 2])
    server = m.aggregate(CONTEXT, start(m), iter(ups))
    for s in CONTEXT.groups["target"]:
        a, b = Key("lora", s.name, "A"), Key("lora", s.name, "B")
        dense = sum(u.client.examples / 8 * u.params[b] @ u.params[a] for u in ups)
        torch.testing.assert_close(server.params[b] @ server.params[a], best(dense, 4))
        down = m.broadcast(CONTEXT, server, Client("c0", 5))  # rank 2
        torch.testing.assert_close(down[b] @ down[a], best(dense, 2))
        sides = [torch.linalg.svdvals(server.params[k]) for k in (b, a)]
        if split == "B":
            torch.testing.assert_close(sides[1], torch.ones(4, dtype=torch.float64))
        else:
            torch.testing.assert_close(sides[0], sides[1])
    head = sum(u.client.examples / 8 * u.params[Key("head", "head", "weight")] for u in ups)
    torch.testing.assert_close(server.params[Key("head", "head", "weight")], head)
    assert server.round == 1


def test_flexlora_with_few_components_is_exact_and_stays_trainable() -> None:
    m = FlexLoRA(rank=6, rank_min=2)
    [one] = uploads([2], [3])
    before = start(m)
    server = m.aggregate(CONTEXT, before, iter([one]))
    for s in CONTEXT.groups["target"]:
        a, b = Key("lora", s.name, "A"), Key("lora", s.name, "B")
        torch.testing.assert_close(server.params[b] @ server.params[a], one.params[b] @ one.params[a])
        assert not server.params[b][:, 2:].any()
        torch.testing.assert_close(server.params[a][2:], before.params[a][2:])


def test_flexlora_equals_homlora_when_clients_agree_on_a() -> None:
    """sum p B A = (sum p B) A: averaging products and factors is then the same."""
    ups = uploads([4, 4], [1, 3])
    same = [Upload(u.client, u.params | {k: ups[0].params[k] for k in u.params if k.part == "A"}) for u in ups]
    flex, hom = FlexLoRA(rank=4, rank_min=4), HomLoRA(rank=4)
    x = flex.aggregate(CONTEXT, start(flex), iter(same)).params
    plain = [Upload(u.client, select(u.params, lambda k: k.part != "rank")) for u in same]
    y = hom.aggregate(CONTEXT, start(hom), iter(plain)).params
    for s in CONTEXT.groups["target"]:
        a, b = Key("lora", s.name, "A"), Key("lora", s.name, "B")
        torch.testing.assert_close(x[b] @ x[a], y[b] @ y[a])


# a float64 BERT, as for PF2LoRA's law -------------------------------------------------------------------------------------
def setting(m: Any) -> tuple[Loss, dict[str, Params], Params, list[dict[str, Tensor]]]:
    """(loss, work of one client, its leaves, three batches)."""
    model = tiny.adapt(tiny.bert().double())
    context, data = Context(model.groups, 7), tiny.data()
    client, g = Client("c0", 10), torch.Generator().manual_seed(1)
    noisy = lambda p: {k: (v + 0.3 * torch.randn(v.shape, generator=g)).double() for k, v in p.items()}  # noqa: E731
    down, kept = noisy(stack([m.broadcast(context, m.init(context), client)])), noisy(stack([m.keep(context, client)]))
    rows = data.splits["train"][3]
    batches = [stack_batches([data.examples.collate(rows[i * 4 : i * 4 + 4])]) for i in range(3)]
    for b in batches:
        b["weight"] = b["weight"].double()
    work = m.begin(context, RoundInfo(0, 1), down, kept)
    return Loss(model, Classification(tiny.CLASSES)), work, down | kept, batches


def lora(p: Params, scale: float) -> Params:
    return {k: v * scale if k.part == "B" else v for k, v in p.items()}


def gradient(loss: Loss, p: Params, batch: dict[str, Tensor], scale: float) -> Params:
    q = {k: v.detach().clone().requires_grad_() for k, v in p.items()}
    return dict(zip(q, torch.autograd.grad(loss(lora(q, scale), batch).sum(), list(q.values())), strict=True))


def moved(p: Params, g: Params, a: float) -> Params:
    return {k: v - a * g[k] for k, v in p.items()}


# Per-FedAvg ---------------------------------------------------------------------------------------------------------------
def test_per_fedavg_descends_mamls_objective() -> None:
    """One batch in all three roles: the step is d/dx f(x - a grad f(x)), by central differences along many directions."""
    a = 20.0  # so large that the Hessian's part is far above the error of a difference
    m = PerFedAvg(rank=3, alpha=6.0, lr_personal=a, optimizer=SGD(1.0))
    loss, work, x, [b, *_] = setting(m)
    new, _ = m.step(work, loss, ONE, b, b, b)
    h = {k: v - new["train"][k] for k, v in x.items()}

    def objective(p: Params) -> float:
        return float(loss(lora(moved(p, gradient(loss, p, b, 2.0), a), 2.0), b).sum())

    g = torch.Generator().manual_seed(3)
    e = 1e-5
    for _ in range(4):
        d = {k: torch.randn(v.shape, generator=g, dtype=torch.float64) for k, v in x.items()}
        slope = (objective(moved(x, d, -e)) - objective(moved(x, d, e))) / (2 * e)
        ours = float(sum((h[k] * d[k]).sum() for k in x))
        assert ours == pytest.approx(slope, rel=1e-5, abs=1e-8)
    first = PerFedAvg(rank=3, alpha=6.0, lr_personal=a, optimizer=SGD(1.0), hypergradient="first_order")
    other, _ = first.step(work, loss, ONE, b, b)
    assert max(float((other["train"][k] - new["train"][k]).abs().max()) for k in x) > 1e-3


def test_per_fedavg_uses_its_draws_as_the_paper_does() -> None:
    """pi moves, xi gives the gradient there, zeta the Hessian at the start."""
    a = 2.0
    m = PerFedAvg(rank=3, alpha=6.0, lr_personal=a, optimizer=SGD(1.0))
    loss, work, x, (pi, xi, zeta) = setting(m)
    new, _ = m.step(work, loss, ONE, pi, xi, zeta)
    g = gradient(loss, moved(x, gradient(loss, x, pi, 2.0), a), xi, 2.0)
    leaves = {k: v.detach().clone().requires_grad_() for k, v in x.items()}
    grads = torch.autograd.grad(loss(lora(leaves, 2.0), zeta).sum(), list(leaves.values()), create_graph=True)
    inner = sum((u * g[k]).sum() for u, k in zip(grads, leaves, strict=True))
    hg = dict(zip(leaves, torch.autograd.grad(inner, list(leaves.values())), strict=True))
    for k, v in x.items():
        torch.testing.assert_close(new["train"][k], v - (g[k] - a * hg[k]))


def test_per_fedavg_serves_after_one_plain_step(tmp_path: Path) -> None:
    m = PerFedAvg(rank=4, lr_personal=0.1)
    f = tiny.federation(m, tmp_path, sampling=Sampling(rounds=1))
    f.run()
    server = ServerState(*f.store.load_server())
    [mine] = served(f, f.engine(Callback()), server, [3], "personal")
    [batch] = train_batches(f.data, 3, LocalWork(1, None, f.plan.batch_size), 1, f.seed, "tune", 1, f.data.ids[3])
    x = stack([server.params])
    g = gradient(f.loss, x, stack_batches([batch]), 4.0)
    expected = lora(moved(x, g, 0.1), 4.0)
    for k, v in mine.items():
        torch.testing.assert_close(v, expected[k][0], rtol=1e-4, atol=1e-6)


# FedDPA -------------------------------------------------------------------------------------------------------------------
def test_feddpa_t_trains_each_adapter_alone() -> None:
    """The global step is HomLoRA's, the local one is of the local adapter on the base with the head beside it."""
    m = FedDPAT(rank=3, alpha=6.0, optimizer=SGD(0.5), mix=0.3)
    loss, work, x, [b, *_] = setting(m)
    new, _ = m.step(work, loss, ONE, b)
    mine = select(x, lambda k: k.adapter == "local")
    head = select(x, lambda k: k.adapter == "head")
    common = select(x, lambda k: k.adapter == "global")
    g = gradient(loss, common | head, b, 2.0)
    leaves = {k: v.detach().clone().requires_grad_() for k, v in mine.items()}
    value = loss(lora(leaves, 2.0) | head, b).sum()
    g |= dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    for k, v in x.items():
        torch.testing.assert_close(new["train"][k], v - 0.5 * g[k])


def test_feddpa_serves_the_mixture_of_dense_products() -> None:
    m = FedDPAT(rank=3, alpha=6.0, mix=0.3)
    _, work, x, _ = setting(m)
    ready = m.served(work)
    for k in [k for k in ready if k.part == "B" and k.adapter == "global"]:
        both = sum(
            ready[k._replace(adapter=n)][0] @ ready[k._replace(adapter=n, part="A")][0] for n in ("global", "local")
        )
        want = sum(
            w * 2.0 * x[k._replace(adapter=n)][0] @ x[k._replace(adapter=n, part="A")][0]
            for n, w in (("global", 0.7), ("local", 0.3))
        )
        torch.testing.assert_close(both, want)


def test_feddpa_f_tunes_a_copy_of_the_global_adapter(tmp_path: Path) -> None:
    """mix = 0 serves the global model untouched, mix = 1 what local fine-tuning of the adapter alone gives."""
    found = {}
    for mix in (0.0, 0.5, 1.0):
        m = FedDPAF(rank=4, tune=2, mix=mix, optimizer=SGD(0.3))
        f = tiny.federation(m, tmp_path / str(mix), sampling=Sampling(rounds=1))
        f.run()
        server = ServerState(*f.store.load_server())
        found[mix] = served(f, f.engine(Callback()), server, [3], "personal")[0], server.params
    key = next(k for k in found[1.0][1] if k.part == "B")

    def delta(mix: float) -> Tensor:
        p = found[mix][0]
        names = {k.adapter for k in p} - {"head"}
        return sum(p[key._replace(adapter=n)] @ p[key._replace(adapter=n, part="A")] for n in names)

    held = found[0.5][1]
    product = 4.0 * held[key] @ held[key._replace(part="A")]
    torch.testing.assert_close(delta(0.0), product)
    assert not torch.allclose(delta(1.0), product)
    torch.testing.assert_close(delta(0.5), (delta(0.0) + delta(1.0)) / 2)
    heads = [k for k in held if k.adapter == "head"]
    assert heads and all(torch.equal(found[1.0][0][k], held[k]) for k in heads)


# FedProx ------------------------------------------------------------------------------------------------------------------
def test_fedprox_adds_the_pull_to_what_was_received() -> None:
    m, plain = FedProx(rank=3, alpha=6.0, mu=0.7, optimizer=SGD(0.5)), HomLoRA(rank=3, alpha=6.0, optimizer=SGD(0.5))
    loss, work, x, [b, c, _] = setting(m)
    one, _ = m.step(work, loss, ONE, b)
    by_hand, _ = plain.step({k: v for k, v in work.items() if k != "received"}, loss, ONE, b)
    for k in x:
        torch.testing.assert_close(one["train"][k], by_hand["train"][k])  # no pull where it starts
    two, _ = m.step(one, loss, ONE, c)
    g = gradient(loss, one["train"], c, 2.0)
    for k, v in one["train"].items():
        torch.testing.assert_close(two["train"][k], v - 0.5 * (g[k] + 0.7 * (v - x[k])))


def test_fedprox_leaves_a_personal_head_alone() -> None:
    m = FedProx(rank=3, mu=0.7, head="personal")
    _, work, *_ = setting(m)
    assert {k.adapter for k in work["received"]} == {"lora"}


def test_a_pull_of_zero_is_homlora(tmp_path: Path) -> None:
    a = tiny.federation(FedProx(rank=4, mu=0.0), tmp_path / "a")
    b = tiny.federation(HomLoRA(rank=4), tmp_path / "b")
    a.run()
    b.run()
    tiny.close(a.store.load_server()[1], b.store.load_server()[1], 0.0)


# what is refused ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FlexLoRA(adapter="vera"), "FlexLoRA decomposes a low-rank product"),
        (lambda: FedProx(mu=-1.0), "method.mu"),
        (lambda: PerFedAvg(lr_personal=-1.0), "method.lr_personal"),
        (lambda: FedDPAT(mix=2.0), "method.mix"),
        (lambda: FedDPAF(adapter="vera"), "FedDPA mixes two low-rank products"),
        (lambda: HetLoRA(adapter="dora"), "no ranks to truncate"),
        (lambda: HetLoRA(adapter="bitfit"), "no ranks to truncate"),
        (lambda: PF2LoRA(adapter="dora"), "two low-rank products"),
        (lambda: SLoRA(adapter="dora"), "an SVD primes low-rank factors"),
    ],
)
def test_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_tuning_ignores_the_schedule_and_old_moments(tmp_path: Path) -> None:
    """A learning rate that has decayed to nothing must not leave local fine-tuning without effect."""
    from fedlora.federation.engine import Schedule
    from fedlora.methods.average import FineTunedLoRA

    m = FineTunedLoRA(rank=4, tune=2, moments="keep")
    f = tiny.federation(m, tmp_path, sampling=Sampling(rounds=2))
    f.run()
    server, engine = ServerState(*f.store.load_server()), f.engine(Callback())
    a = served(f, engine, server, [0, 1], "personal")
    b = served(dataclasses.replace(f, schedule=Schedule("linear")), engine, server, [0, 1], "personal")
    for p, q in zip(a, b, strict=True):
        tiny.close(p, q, 0.0)
    assert np.isfinite(float(a[0][next(iter(a[0]))].sum()))
