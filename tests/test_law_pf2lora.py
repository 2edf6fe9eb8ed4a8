"""PF2LoRA against independent oracles: the unrolled objective by central differences, a literal transcription with dense
Jacobians, and its reduction to HomLoRA. All in float64."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from fedlora.errors import ConfigError
from fedlora.methods.average import HomLoRA
from fedlora.methods.contract import Context, RoundInfo
from fedlora.methods.pf2lora import PF2LoRA
from fedlora.model.adapted import Adapted
from fedlora.training.batching import stack_batches
from fedlora.training.loss import Loss
from fedlora.training.optimizers import SGD, AdamW
from fedlora.training.tasks.classification import Classification
from fedlora.tree import Key, Params, stack

A = 30.0  # a large lower step, so that second-order terms are far above the error of a finite difference
ONE = torch.ones(1, dtype=torch.float64)


def noisy(p: Params) -> Params:
    g = torch.Generator().manual_seed(1)
    return {k: (v + 0.3 * torch.randn(v.shape, generator=g)).double() for k, v in p.items()}


def setting(**more: Any) -> tuple[PF2LoRA, Loss, dict[str, Params], Params, Params, list[dict[str, Tensor]]]:
    """(method, loss, work of one client, x, y, four batches) on a float64 BERT."""
    model = tiny.adapt(tiny.bert().double())
    loss = Loss(model, Classification(tiny.CLASSES))
    m = PF2LoRA(
        **{
            "rank": 3,
            "alpha": 6.0,
            "rank_personal": 2,
            "alpha_personal": 3.0,
            "lr_personal": A,
            "optimizer": SGD(1.0),
            **more,
        }
    )
    context, data = Context(model.groups, 7), tiny.data()
    from fedlora.methods.contract import Client

    client = Client("c0", 10)
    x = noisy(stack([m.broadcast(context, m.init(context), client)]))
    y = noisy(stack([m.keep(context, client)]))
    rows = data.splits["train"][3]
    batches = [stack_batches([data.examples.collate(rows[i * 4 : i * 4 + 4])]) for i in range(4)]
    for b in batches:
        b["weight"] = b["weight"].double()
    return m, loss, m.begin(context, RoundInfo(0, 1), x, y), x, y, batches


def f(m: PF2LoRA, loss: Loss, x: Params, y: Params, batch: dict[str, Tensor]) -> Tensor:
    """f(x, y; batch) with the two products scaled by alpha / r, written out here."""
    ready = {k: v * (m.alpha / m.rank if k.adapter == "common" else m.alpha_personal / m.rank_personal) if k.part == "B" else v
             for k, v in (x | y).items()}  # fmt: skip
    return loss(ready, batch).sum()


def gradient(m: PF2LoRA, loss: Loss, x: Params, y: Params, batch: dict[str, Tensor], which: str) -> Params:
    p = {k: v.detach().clone().requires_grad_() for k, v in (x if which == "x" else y).items()}
    value = f(m, loss, p if which == "x" else x, p if which == "y" else y, batch)
    return dict(zip(p, torch.autograd.grad(value, list(p.values())), strict=True))


def test_direction_is_the_derivative_of_the_unrolled_objective() -> None:
    """One batch in all four roles: h == d/dx f(x, y - a g_y(x, y)), by central differences."""
    m, loss, work, x, y, batches = setting()
    new, _ = m.step(work, loss, ONE, *[batches[0]] * 4)

    def outer(x: Params) -> float:
        g = gradient(m, loss, x, y, batches[0], "y")
        return float(f(m, loss, x, {k: v - A * g[k] for k, v in y.items()}, batches[0]))

    checked = 0
    for k in [k for k in x if k.part == "A"][:2] + [k for k in x if k.part in ("B", "weight")][:3]:
        for at in [(0, 0, 0), (0, 1, 2)]:
            high, low = ({**x, k: x[k].clone()} for _ in range(2))
            high[k][at] += 1e-5
            low[k][at] -= 1e-5
            slope = (outer(high) - outer(low)) / 2e-5
            assert float((x[k] - new["train"][k])[at]) == pytest.approx(slope, rel=1e-5, abs=1e-9), k
            checked += 1
    assert checked == 10


def test_each_batch_plays_its_role() -> None:
    """Four different batches: pi moves y, xi gives g_x, xi~ gives v, zeta gives J; J v here from the dense Jacobian's
    columns, d g_y / dx by forward differences of every needed entry replaced by one directional central difference."""
    m, loss, work, x, y, (pi, xi, xi_, zeta) = setting()
    new, _ = m.step(work, loss, ONE, pi, xi, xi_, zeta)
    g = gradient(m, loss, x, y, pi, "y")
    y_new = {k: v - A * g[k] for k, v in y.items()}
    v = gradient(m, loss, x, y_new, xi_, "y")
    e = 1e-3
    high, low = (gradient(m, loss, x, {k: y[k] + t * v[k] for k in y}, zeta, "x") for t in (e, -e))
    first = gradient(m, loss, x, y_new, xi, "x")
    for k in x:
        h = first[k] - A * (high[k] - low[k]) / (2 * e)
        torch.testing.assert_close(x[k] - new["train"][k], h, rtol=1e-4, atol=1e-7)
    for k in y:
        torch.testing.assert_close(new["train"][k], y_new[k], rtol=1e-12, atol=1e-12)


class Toy(nn.Module):
    """One linear layer and nothing else: small enough for a dense Jacobian."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_algorithm_1_transcribed_with_dense_jacobians() -> None:
    """Three steps of Algorithm 1 written out by hand with torch.autograd.functional.jacobian, two clients in a block."""
    base = tiny.seeded(Toy).double()
    model = Adapted(base, {"target": ["layer"]})
    m = PF2LoRA(
        rank=2, alpha=2.0, rank_personal=1, alpha_personal=1.0, lr_personal=0.7, head="frozen", optimizer=SGD(0.3)
    )
    context = Context(model.groups, 0)
    loss = Loss(model, Classification(3))
    from fedlora.methods.contract import Client

    clients = [Client("a", 1), Client("b", 1)]
    g = torch.Generator().manual_seed(3)
    down = [noisy(m.broadcast(context, m.init(context), c)) for c in clients]
    kept = [noisy(m.keep(context, c)) for c in clients]
    draw = lambda: {"x": torch.randn(2, 5, 4, generator=g, dtype=torch.float64),  # noqa: E731
                    "labels": torch.randint(0, 3, (2, 5), generator=g), "weight": torch.ones(2, 5, dtype=torch.float64)}  # fmt: skip
    steps = [[draw() for _ in range(4)] for _ in range(3)]
    work = m.begin(context, RoundInfo(0, 1), stack(down), stack(kept))
    for batches in steps:
        work, _ = m.step(work, loss, torch.ones(2, dtype=torch.float64), *batches)

    w0, c0 = base.layer.weight.detach(), base.layer.bias.detach()
    for i in range(2):
        name = lambda a, p: Key(a, "layer", p)  # noqa: E731
        xs = torch.cat([down[i][name("common", "A")].flatten(), down[i][name("common", "B")].flatten()])
        ys = torch.cat([kept[i][name("personal", "A")].flatten(), kept[i][name("personal", "B")].flatten()])

        def objective(xv: Tensor, yv: Tensor, batch: dict[str, Tensor], i: int = i) -> Tensor:
            w = w0 + xv[8:].view(3, 2) @ xv[:8].view(2, 4) + yv[4:].view(3, 1) @ yv[:4].view(1, 4)
            return nn.functional.cross_entropy(batch["x"][i] @ w.T + c0, batch["labels"][i])

        g_x = lambda a, b, batch: torch.autograd.functional.jacobian(lambda t: objective(t, b, batch), a)  # noqa: E731

        def g_y(a: Tensor, b: Tensor, batch: dict[str, Tensor], keep: bool = False, f: Any = objective) -> Tensor:
            return torch.autograd.functional.jacobian(lambda t: f(a, t, batch), b, create_graph=keep)

        for pi, xi, xi_, zeta in steps:
            y_new = ys - 0.7 * g_y(xs, ys, pi)
            # [y x]
            j = torch.autograd.functional.jacobian(lambda t, ys=ys, zeta=zeta, g_y=g_y: g_y(t, ys, zeta, True), xs)
            xs = xs - 0.3 * (g_x(xs, y_new, xi) - 0.7 * j.T @ g_y(xs, y_new, xi_))
            ys = y_new
        mine = work["train"]
        torch.testing.assert_close(torch.cat([mine[name("common", p)][i].flatten() for p in "AB"]), xs)
        torch.testing.assert_close(torch.cat([mine[name("personal", p)][i].flatten() for p in "AB"]), ys)


def test_finite_difference_is_close_to_exact_and_first_order_drops_the_term() -> None:
    found = {}
    for kind in ("exact", "finite_difference", "first_order"):
        m, loss, work, x, _, batches = setting(hypergradient=kind)
        new, _ = m.step(work, loss, ONE, *batches)
        found[kind] = torch.cat([(x[k] - new["train"][k]).flatten() for k in x])
    gap = (found["finite_difference"] - found["exact"]).norm() / (found["first_order"] - found["exact"]).norm()
    assert gap < 1e-3
    assert (found["first_order"] - found["exact"]).norm() > 0.01 * found["exact"].norm()


@pytest.mark.parametrize("head", ["shared", "personal"])
def test_without_personal_rank_it_is_homlora(head: Any, tmp_path: Path) -> None:
    """r~ = 0: the same leaves, bit for bit, under other names."""
    settings = {"rank": 4, "alpha": 8.0, "weights": "uniform", "head": head, "optimizer": AdamW(1e-2)}

    class Renamed(HomLoRA):  # the start of A depends on the adapter's name
        label = "common"

    a = tiny.federation(PF2LoRA(rank_personal=0, **settings), tmp_path / "a")
    b = tiny.federation(Renamed(**settings), tmp_path / "b")
    a.run()
    b.run()
    tiny.close(a.store.load_server()[1], b.store.load_server()[1], 0.0)


def test_shared_batches_draw_one_and_independent_four() -> None:
    assert (PF2LoRA().draws, PF2LoRA(batches="shared").draws, PF2LoRA(rank_personal=0).draws) == (4, 1, 1)


def test_bad_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank_personal: got 8, expected 0 to rank - 1 = 7"):
        PF2LoRA(rank=8, rank_personal=8)
    with pytest.raises(ConfigError, match="two low-rank products"):
        dataclasses.replace(PF2LoRA(), adapter="vera")
