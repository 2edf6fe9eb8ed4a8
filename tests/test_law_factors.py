"""Servers that treat factors better than their means, against dense float64 matrices: LoRA-FAIR, FedRot-LoRA, FLoRIST, Fed-SB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.optimize import minimize
from torch import Tensor, nn

from fedlora.data.batches import LocalWork
from fedlora.errors import ConfigError
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.layers import Layer
from fedlora.methods import METHODS
from fedlora.methods.contract import Client, Context, Method, RoundInfo, ServerState, Upload
from fedlora.tree import Key, Params, stack

SHORT: dict[str, Any] = {
    "plan": LocalWork(steps=2, batch_size=4),
    "evaluation": Evaluation(every=9, views=("personal",)),
}
CONTEXT = Context({"target": [Layer("w", 14, 12, True)], "head": [Layer("head", 3, 12, True)]}, 7)
A, B, RANK = Key("lora", "w", "A"), Key("lora", "w", "B"), Key("lora", "", "rank")
SHARES = (5 / 8, 1 / 8, 2 / 8)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drifted(n: int = 3, rank: int = 4, drift: float = 0.7) -> tuple[Params, list[Upload]]:
    """A server's factors, and clients that have drifted from them."""
    server = {A: draw(rank, 12, seed=0), B: draw(14, rank, seed=1)}
    ups = [
        Upload(
            Client(f"c{j}", (5, 1, 2)[j]),
            {k: v + drift * draw(*v.shape, seed=10 * j + len(k.part + str(v.shape))) for k, v in server.items()},
        )
        for j in range(n)
    ]
    return server, ups


def ideal(ups: list[Upload]) -> Tensor:
    return sum(p * u.params[B] @ u.params[A] for p, u in zip(SHARES, ups, strict=True))  # type: ignore[return-value]


def mean(ups: list[Upload], k: Key) -> Tensor:
    return sum(p * u.params[k] for p, u in zip(SHARES, ups, strict=True))  # type: ignore[return-value]


# LoRA-FAIR --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["B", "A"])
@pytest.mark.parametrize("lam", [0.0, 0.01, 0.3])
def test_ridge_is_where_the_dense_objective_is_flat(side: Any, lam: float) -> None:
    m = METHODS["lora-fair"](rank=4, lam=lam, side=side)
    server, ups = drifted()
    new = m.aggregate(CONTEXT, ServerState(0, server), iter(ups)).params
    still, moved = (A, B) if side == "B" else (B, A)
    torch.testing.assert_close(new[still], mean(ups, still))
    d = (new[moved] - mean(ups, moved)).requires_grad_()
    g = mean(ups, still) @ mean(ups, still).mT if side == "B" else mean(ups, still).mT @ mean(ups, still)
    x = mean(ups, moved) + d
    made = x @ mean(ups, A) if side == "B" else mean(ups, B) @ x
    ((ideal(ups) - made).square().sum() + lam * g.trace() / 4 * d.square().sum()).backward()
    assert float(d.grad.abs().max()) < 1e-9
    error = lambda b, a: float((ideal(ups) - b @ a).norm())  # noqa: E731
    assert error(new[B], new[A]) < error(mean(ups, B), mean(ups, A))


def test_cosine_is_where_an_optimizer_on_dense_matrices_ends() -> None:
    m = METHODS["lora-fair"](rank=4, objective="cosine", lam=0.01, server_steps=4000, server_lr=0.003)
    server, ups = drifted()
    new = m.aggregate(CONTEXT, ServerState(0, server), iter(ups)).params
    w, b, a = ideal(ups), mean(ups, B), mean(ups, A)

    def objective(flat: Any) -> tuple[float, Any]:
        d = torch.tensor(flat).view(14, 4).requires_grad_()
        v = (b + d) @ a
        value = (
            1 - (w * v).sum() / (w.norm() * v.norm()) + 0.01 * (d.norm() if float(d.detach().norm()) else d.sum() * 0)
        )
        value.backward()
        return value.item(), d.grad.flatten().numpy()

    best = minimize(
        objective,
        (0.01 * draw(14, 4, seed=5)).flatten().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000},
    )
    ours = objective((new[B] - b).flatten().numpy())[0]
    assert ours == pytest.approx(best.fun, abs=2e-3)
    assert objective(0 * best.x)[0] - ours > 10 * abs(ours - best.fun)


def test_without_drift_there_is_nothing_to_correct() -> None:
    server, ups = drifted(drift=0.0)
    new = METHODS["lora-fair"](rank=4).aggregate(CONTEXT, ServerState(0, server), iter(ups)).params
    torch.testing.assert_close(new[B], server[B])


# FedRot-LoRA --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("round", [1, 2])
def test_a_turn_is_the_procrustes_rotation_and_keeps_the_product(round: int) -> None:
    """Against SciPy's orthogonal Procrustes; clients whose factors were turned at random come back."""
    m = METHODS["fedrot"](rank=4, lam=1.0)
    server, ups = drifted(drift=0.05)
    turned = []
    for j, u in enumerate(ups):
        r = torch.linalg.qr(draw(4, 4, seed=50 + j)).Q
        r[:, 0] *= torch.linalg.det(r).sign()
        turned.append(Upload(u.client, {A: r.mT @ u.params[A], B: u.params[B] @ r}))
    got = [m.turned(u.params, server, round)[0] for u in turned]
    for u, g in zip(turned, got, strict=True):
        torch.testing.assert_close(g[B] @ g[A], u.params[B] @ u.params[A])
        pair = (u.params[A].mT, server[A].mT) if round == 1 else (u.params[B], server[B])
        q, _ = orthogonal_procrustes(pair[0].numpy(), pair[1].numpy())
        torch.testing.assert_close(g[B], u.params[B] @ torch.from_numpy(q))
    new = m.aggregate(CONTEXT, ServerState(round, server), iter(turned))
    plain = METHODS["homlora"](rank=4).aggregate(CONTEXT, ServerState(round, server), iter(turned)).params
    error = lambda p: float((ideal(turned) - p[B] @ p[A]).norm() / ideal(turned).norm())  # noqa: E731
    assert error(new.params) < 0.05 < 0.3 < error(plain)
    assert m.record(new)["rotation"] > 1


def test_a_turn_has_no_reflection_and_a_soft_one_is_between() -> None:
    from fedlora.methods.fedrot import rotation

    for seed in range(6):
        m = draw(4, 4, seed=seed)
        one, none, half = rotation(m, 1.0), rotation(m, 0.0), rotation(m, 0.5)
        for q in (one, none, half):
            torch.testing.assert_close(q @ q.mT, torch.eye(4, dtype=torch.float64))
            assert float(torch.linalg.det(q)) == pytest.approx(1.0)
        torch.testing.assert_close(none, torch.eye(4, dtype=torch.float64))
        far = [float((q - none).norm()) for q in (half, one)]
        assert 0 < far[0] < far[1]
        # (I + Q) / 2 = Q^(1/2) times a symmetric matrix that commutes with it
        torch.testing.assert_close(half @ half, one)


def run(m: Method, folder: Path, **more: Any) -> Any:
    f = tiny.federation(m, folder, **SHORT | {"sampling": Sampling(rounds=4)} | more)
    f.run()
    return f


def test_the_server_turns_as_clients_would_and_without_a_turn_it_is_homlora(tmp_path: Path) -> None:
    def of(name: str, **fields: Any) -> Params:
        return run(METHODS[name](rank=2, **fields), tmp_path / f"{name}{fields}").store.load_server()[1]

    at_server, at_client = of("fedrot"), of("fedrot", where="client")
    tiny.close(at_server, at_client)
    plain = of("homlora")
    tiny.close(of("fedrot", lam=0.0), plain, 0.0)
    assert any(not torch.allclose(v, plain[k]) for k, v in at_server.items())


# FLoRIST ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("tau", "energy"), [(0.6, "sum"), (0.6, "squares"), (0.9, "sum"), (1.0, "sum")])
@pytest.mark.parametrize("split", ["B", "sqrt"])
def test_florist_keeps_what_the_dense_spectrum_says(tau: float, energy: Any, split: Any) -> None:
    m = METHODS["florist"](rank=10, rank_min=2, tau=tau, energy=energy, split=split)
    ups = [Upload(u.client, u.params | {RANK: torch.tensor(4)}) for u in drifted()[1]]
    start = {k: v.double() for k, v in m.init(CONTEXT).params.items()}
    new = m.aggregate(CONTEXT, ServerState(0, start, {"ranks": {}}), iter(ups)).params
    u, s, vh = torch.linalg.svd(ideal(ups))
    e = s if energy == "sum" else s**2
    q = next((i for i in range(1, 11) if e[:i].sum() >= tau * e.sum() * (1 - 1e-12)), 10)
    assert new[A].shape == (q, 12) and new[B].shape == (14, q)
    torch.testing.assert_close(new[B] @ new[A], u[:, :q] @ torch.diag(s[:q]) @ vh[:q])
    torch.testing.assert_close(new[B].norm(dim=0), s[:q] if split == "B" else s[:q].sqrt())


def test_florists_clients_fill_up_with_the_seeded_start() -> None:
    m = METHODS["florist"](rank=6, rank_min=2, plan="explicit", ranks=(("c0", 2), ("c1", 3), ("c2", 6)))
    start = m.init(CONTEXT).params
    server = ServerState(1, start | {A: draw(3, 12, seed=0).float(), B: draw(14, 3, seed=1).float()}, {"ranks": {}})
    down = [m.broadcast(CONTEXT, server, Client(f"c{j}", 1)) for j in range(3)]
    assert [len(p[A]) for p in down] == [2, 3, 3]
    work = m.begin(CONTEXT, RoundInfo(1, 2), stack(down), {})["train"]
    for j, r in enumerate((2, 3, 6)):
        q = min(r, 3)
        torch.testing.assert_close(work[A][j, :q], server.params[A][:q])
        torch.testing.assert_close(work[A][j, q:r], start[A][q:r])
        assert not work[A][j, r:].any() and not work[B][j, :, q:].any()


# Fed-SB -------------------------------------------------------------------------------------------------------------------
def with_base() -> Context:
    module = nn.Linear(12, 14)
    with torch.no_grad():
        module.weight.copy_(draw(14, 12, seed=3))
    return Context({"target": [Layer("w", 14, 12, True, module=module)], "head": [Layer("head", 3, 12, True)]}, 7)


@pytest.mark.parametrize("adapter", ["lora-xs", "lora-xs-random"])
def test_fed_sb_averages_products_exactly_between_orthonormal_factors(adapter: Any) -> None:
    m, c = METHODS["fedsb"](rank=4, alpha=8.0, adapter=adapter), with_base()
    core = Key("lora", "w", "R")
    fixed = m.fixed(c)
    b0, a0 = fixed[core._replace(part="B0")], fixed[core._replace(part="A0")]
    torch.testing.assert_close(b0.mT @ b0, torch.eye(4), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a0 @ a0.mT, torch.eye(4), rtol=1e-5, atol=1e-6)
    ups = [Upload(Client(f"c{j}", (5, 1, 2)[j]), {core: draw(4, 4, seed=j).float()}) for j in range(3)]
    server = m.aggregate(c, m.init(c), iter(ups))
    ready = [m.personal(c, stack([p]), {}) for p in (*(u.params for u in ups), server.params)]
    products = [2.0 * b0 @ p[core] @ a0 for p in (*(u.params for u in ups), server.params)]
    for p, dense in zip(ready, products, strict=True):
        torch.testing.assert_close(p[B][0] @ p[A][0], dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        products[3], sum(w * x for w, x in zip(SHARES, products[:3], strict=True)), rtol=1e-4, atol=1e-5
    )
    if adapter == "lora-xs":
        u, _, vh = torch.linalg.svd(c.groups["target"][0].weight().detach().double())
        torch.testing.assert_close((b0 @ b0.mT).double(), u[:, :4] @ u[:, :4].mT, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close((a0.mT @ a0).double(), vh[:4].mT @ vh[:4], rtol=1e-4, atol=1e-5)


def test_fed_sbs_messages_are_r_by_r(tmp_path: Path) -> None:
    f = run(METHODS["fedsb"](rank=4, head="frozen"), tmp_path)
    (line, *_) = [
        json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if '"train"' in x
    ]
    layers = len(f.context.groups["target"])
    assert line["bytes"]["up"]["adapter"] == line["bytes"]["down"]["adapter"] == 4 * layers * 4 * 4 * 4


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("lora-fair", {"lam": -1.0}, "method.lam"),
        ("lora-fair", {"server_steps": 0, "server_lr": 0.0}, "method.server_lr"),
        ("lora-fair", {"adapter": "vera"}, "corrects a low-rank product"),
        ("fedrot", {"lam": 2.0}, "method.lam"),
        ("fedrot", {"moments": "keep"}, "axes of the factors turn"),
        ("fedrot", {"adapter": "dora"}, "turns the factors of a product"),
        ("florist", {"tau": 0.0}, "method.tau"),
        ("florist", {"moments": "keep"}, "method.moments"),
        ("fedsb", {"adapter": "lora"}, "trains an r x r core"),
    ],
)
def test_refused(name: str, fields: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        METHODS[name](**fields)
