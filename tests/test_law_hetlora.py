"""HetLoRA against dense products, a hand-worked pruning example and its reductions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from fedlora.errors import ConfigError
from fedlora.layers import Layer
from fedlora.methods import ranks
from fedlora.methods.average import HomLoRA
from fedlora.methods.contract import Client, Context, RoundInfo, ServerState, Upload
from fedlora.methods.hetlora import HetLoRA
from fedlora.training.optimizers import SGD, AdamW
from fedlora.tree import Key, Params, stack

LAYERS = (Layer("p", 6, 5), Layer("q", 4, 7))
CONTEXT = Context({"target": LAYERS, "head": ()}, 3)
A, B, RANK = "A", "B", Key("lora", "", "rank")


def random_upload(m: HetLoRA, server: ServerState, id: str, seed: int) -> Upload:
    g = torch.Generator().manual_seed(seed)
    down = m.broadcast(CONTEXT, server, Client(id, 1))
    return Upload(
        Client(id, 1), {k: torch.randn(v.shape, generator=g) if v.is_floating_point() else v for k, v in down.items()}
    )


@pytest.mark.parametrize("norms", ["model", "site"])
@pytest.mark.parametrize("share", ["both", "first"])
def test_aggregation_by_dense_products(norms: Any, share: Any) -> None:
    """p_k = ||B_k A_k||_F / sum, over the whole model or per layer, from the dense products; factors zero-padded; nothing
    of the code under test. The head has no product: p_k of the whole model. Where B stays at home the norms travel."""
    plan = (("a", 2), ("b", 4), ("c", 3))
    m = HetLoRA(rank=4, rank_min=1, plan="explicit", ranks=plan, norms=norms, share=share)
    context = Context({"target": LAYERS, "head": (Layer("head", 3, 2),)}, 3)
    g = torch.Generator().manual_seed(0)
    server = m.init(context)
    trained: list[Params] = []
    uploads = []
    for id, r in plan:
        clients = [Client(id, 1)]
        down = m.broadcast(context, server, clients[0])
        work = m.begin(context, RoundInfo(0, 1), stack([down]), stack([m.keep(context, clients[0])]))
        p = {k: torch.randn(v.shape, generator=g) for k, v in work["train"].items()}
        up, _ = m.finish(work | {"train": p})
        trained.append({k: v[0] for k, v in p.items()})
        assert trained[-1][Key("lora", "p", A)].shape[0] == r
        uploads.append(Upload(clients[0], {k: v[0] for k, v in up.items()}))
    new = m.aggregate(context, server, uploads).params

    def p_k(layers: tuple[Layer, ...]) -> Tensor:
        dense = [[u[Key("lora", s.name, B)] @ u[Key("lora", s.name, A)] for s in layers] for u in trained]
        size = torch.stack([sum((d.square().sum() for d in ds), torch.zeros(())).sqrt() for ds in dense])
        return size / size.sum()

    whole = p_k(LAYERS)
    assert (whole - p_k(LAYERS[:1])).abs().max() > 0.01
    for s in LAYERS:
        for part, shape in ((A, (4, s.in_)), (B, (s.out, 4)))[: 1 if share == "first" else 2]:
            want = torch.zeros(shape)
            for w, u in zip(whole if norms == "model" else p_k((s,)), trained, strict=True):
                v = u[Key("lora", s.name, part)]
                want[tuple(slice(n) for n in v.shape)] += w * v
            torch.testing.assert_close(new[Key("lora", s.name, part)], want)
    weight = Key("head", "head", "weight")
    torch.testing.assert_close(new[weight], sum(w * u[weight] for w, u in zip(whole, trained, strict=True)))
    assert not any(k.part == "norm" for k in new)


def test_weights_of_nothing_are_equal() -> None:
    """A layer where no client has learned anything yet (B = 0) is averaged with equal weights, beside one that has."""
    m = HetLoRA(rank=4, rank_min=4, norms="site")
    server = m.init(CONTEXT)
    uploads = [random_upload(m, server, id, i) for i, id in enumerate("ab")]
    for u in uploads:
        u.params[Key("lora", "p", B)].zero_()
    new = m.aggregate(CONTEXT, server, uploads).params
    a = Key("lora", "p", A)
    torch.testing.assert_close(new[a], (uploads[0].params[a] + uploads[1].params[a]) / 2)
    q = Key("lora", "q", A)
    first, second = (float((u.params[Key("lora", "q", B)] @ u.params[q]).norm()) for u in uploads)
    assert abs(first - second) > 1
    want = (first * uploads[0].params[q] + second * uploads[1].params[q]) / (first + second)
    torch.testing.assert_close(new[q], want)


@pytest.mark.parametrize("norms", ["model", "site"])
def test_tails_over_the_model_or_by_site(norms: Any) -> None:
    """r = 2, gamma 0.5, so g = 1. Tails ||B|| ||A||: layer p 3 * 4, layer q 5 * 12; sum 72, over the model sqrt(34 * 160)."""
    m = HetLoRA(rank=2, rank_min=1, gamma=0.5, norms=norms)
    p = {k: torch.zeros(1, *v.shape) for k, v in m.init(CONTEXT).params.items()}
    for layer, b, a in (("p", 3.0, 4.0), ("q", 5.0, 12.0)):
        p[Key("lora", layer, B)][0, 0, 1], p[Key("lora", layer, A)][0, 1, 0] = b, a
    work = m.begin(CONTEXT, RoundInfo(1, 1), p | {RANK: torch.tensor([2])}, {})
    total = float(torch.stack(list(m.tails(work, work["train"]).values())).sum())
    assert total == pytest.approx(72 if norms == "site" else (34 * 160) ** 0.5)


def test_equal_ranks_and_norms_reduce_to_fedavg(tmp_path: Path) -> None:
    """Two uploads of one norm: the mean with equal weights, whatever the sizes of their data."""
    m = HetLoRA(rank=4, rank_min=4, gamma=1.0)
    server = m.init(CONTEXT)
    u = random_upload(m, server, "a", 1)
    flipped = {k: -v if k.part == A else v for k, v in u.params.items()}  # the same norm, another product
    other = Upload(Client("b", 1000), flipped)
    got = m.aggregate(CONTEXT, server, [u, other]).params
    want = HomLoRA(rank=4, weights="uniform").aggregate(CONTEXT, server, [u, other]).params
    for k in got:
        torch.testing.assert_close(got[k], want[k])


def test_pruning_by_hand() -> None:
    """r = 4, gamma 0.5, so g = 2. Tail at receipt: ||B[:, 2:]|| ||A[2:]|| = 2 * 3 = 6 for all three clients. After
    'training': 1 * 3 = 3 (prune to 2), 2 * 3 = 6 (equal: stay), 4 * 3 = 12 (stay). r_min = 3 would stop at 3."""
    for low, pruned in ((1, 2), (3, 3)):
        m = HetLoRA(rank=4, rank_min=low, gamma=0.5)

        def leaves(sizes: list[float]) -> Params:
            a, b = torch.zeros(3, 4, 5), torch.zeros(3, 6, 4)
            a[:, 2, 0], a[:, 0, 1] = 3.0, 9.0
            for i, x in enumerate(sizes):
                b[i, 0, 3], b[i, 0, 0] = x, 7.0
            return {Key("lora", "p", A): a, Key("lora", "p", B): b}

        received = leaves([2.0, 2.0, 2.0]) | {RANK: torch.tensor([4, 4, 4])}
        context = Context({"target": LAYERS[:1], "head": ()}, 0)
        work = m.begin(context, RoundInfo(1, 2), received, {})
        up, _ = m.finish(work | {"train": leaves([1.0, 2.0, 4.0])})
        assert up[RANK].tolist() == [pruned, 4, 4]


def test_round_one_never_prunes_and_later_rounds_do(tmp_path: Path) -> None:
    m = HetLoRA(rank=8, rank_min=1, gamma=0.5, lam=50.0, plan="explicit", ranks=(("*", 8),), optimizer=SGD(0.05))
    f = tiny.federation(m, tmp_path)
    engine = f.engine(__import__("fedlora.federation.callbacks", fromlist=["Callback"]).Callback())
    server, seen = m.init(f.context), []
    for r in range(3):
        server, _ = engine.round(server, 3, f.cohort(r))
        seen.append(sorted(x[""] for x in server.notes["ranks"].values()))
    assert seen[0] == [8, 8, 8, 8]
    assert seen[2] < seen[0]
    assert seen[2][0] >= 1
    down = m.broadcast(f.context, server, f.client(0))
    assert {v.shape[0] for k, v in down.items() if k.part == A} == {int(down[RANK])}


def test_penalty_and_its_gradient() -> None:
    """lambda ||B tail|| ||A tail|| over the whole model, by autograd on the dense formula; at B = 0 it is finite."""
    m = HetLoRA(rank=4, rank_min=1, gamma=0.5, lam=0.3)
    g = torch.Generator().manual_seed(0)
    shapes = {k: v.shape for k, v in m.init(CONTEXT).params.items()}
    received = {k: torch.randn(2, *s, generator=g) for k, s in shapes.items()} | {RANK: torch.tensor([4, 2])}
    received[Key("lora", "p", A)][1, 2:] = 0  # client 1 has rank 2: what lies beyond is padding
    received[Key("lora", "p", B)][1, :, 2:] = 0
    received[Key("lora", "q", A)][1, 2:] = 0
    received[Key("lora", "q", B)][1, :, 2:] = 0
    work = m.begin(CONTEXT, RoundInfo(0, 1), received, {})
    zeros = {k: torch.zeros_like(v) for k, v in work["train"].items()}
    got = m.penalised(work, zeros)
    for client, cut in ((0, 2), (1, 1)):
        p = {k: v[client].clone().requires_grad_() for k, v in work["train"].items()}
        b = sum((p[Key("lora", s.name, B)][:, cut:] ** 2).sum() for s in LAYERS).sqrt()
        a = sum((p[Key("lora", s.name, A)][cut:] ** 2).sum() for s in LAYERS).sqrt()
        (0.3 * a * b).backward()
        for k, v in p.items():
            torch.testing.assert_close(got[k][client], v.grad)
    at_zero = {k: torch.zeros_like(v) if k.part == B else v for k, v in received.items()}
    assert all(
        torch.isfinite(v).all() for v in m.penalised(m.begin(CONTEXT, RoundInfo(0, 1), at_zero, {}), zeros).values()
    )


@pytest.mark.parametrize("padding", ["keep", "zero"])
def test_dead_components(padding: Any) -> None:
    """A component that no cohort member holds keeps its server value; literal zero-padding loses it."""
    m = HetLoRA(rank=4, rank_min=1, plan="explicit", ranks=(("*", 2),), padding=padding)
    server = m.init(CONTEXT)
    new = m.aggregate(CONTEXT, server, [random_upload(m, server, id, i) for i, id in enumerate("ab")]).params
    for s in LAYERS:
        a = Key("lora", s.name, A)
        assert torch.equal(new[a][2:], server.params[a][2:]) == (padding == "keep")
        assert new[a][2:].abs().max() == (server.params[a][2:].abs().max() if padding == "keep" else 0)
        assert not torch.equal(new[a][:2], server.params[a][:2])


def test_rank_plans() -> None:
    ids = [f"c{i}" for i in range(2000)]
    flat = Counter(ranks.uniform(2, 5, 0, id) for id in ids)
    assert set(flat) == {2, 3, 4, 5} and min(flat.values()) > 400
    steep = Counter(ranks.power_law(1, 8, 2.0, 0, id) for id in ids)
    assert set(steep) <= set(range(1, 9)) and steep[1] / steep[2] == pytest.approx(4, rel=0.25)
    assert [ranks.from_budget(b, 22, 10, 1, 8) for b in (0, 40 + 88 * 3, 40 + 88 * 3.9, 1e9)] == [1, 3, 3, 8]


@pytest.mark.parametrize(
    ("settings", "a_rank", "head"),
    [  # bytes of fp32 by hand: layers 6 x 5 and 4 x 7, head 3 x 2 with its biases
        ({"plan": "budget"}, 4 * (6 + 5 + 4 + 7), 4 * 9),
        ({"plan": "budget", "head": "personal"}, 4 * (6 + 5 + 4 + 7), 0),
        ({"plan": "budget", "share": "first"}, 4 * (5 + 7), 4 * 9),  # A alone travels
        ({"plan": "memory", "optimizer": AdamW()}, 4 * 4 * (6 + 5 + 4 + 7), 4 * 4 * 9),
        ({"plan": "memory", "optimizer": SGD()}, 2 * 4 * (6 + 5 + 4 + 7), 2 * 4 * 9),
        ({"plan": "memory", "optimizer": SGD(momentum=0.9), "share": "first"}, 3 * 4 * (6 + 5 + 4 + 7), 3 * 4 * 9),
        ({"plan": "memory", "optimizer": SGD(), "head": "frozen"}, 2 * 4 * (6 + 5 + 4 + 7), 0),
    ],
)
def test_ranks_from_bytes(settings: Any, a_rank: int, head: int) -> None:
    """The rank is the largest whose message, or whose values, gradients and moments, fit."""
    context = Context({"target": LAYERS, "head": (Layer("head", 3, 2),)}, 3)
    m = HetLoRA(
        rank=8, rank_min=1, ranks=(("a", head + a_rank * 5), ("b", head + a_rank * 5 - 1), ("*", 0)), **settings
    )
    assert [m.first_rank(context, Client(id, 1)) for id in "abc"] == [5, 4, 1]


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"HetLoRA: rank 12 of client 'c3' exceeds rank_max=8; raise method.rank"):
        HetLoRA(rank=8, plan="explicit", ranks=(("c3", 12),))
    with pytest.raises(ConfigError, match=r"rank_min: got 9, expected 1 to rank_max=8"):
        HetLoRA(rank=8, rank_min=9)
    with pytest.raises(ConfigError, match=r"gamma: got 0"):
        HetLoRA(gamma=0)
    with pytest.raises(ConfigError, match=r"nothing for client 'z'"):
        HetLoRA(plan="explicit", ranks=(("a", 4),)).first_rank(CONTEXT, Client("z", 1))


def test_padding_stays_zero_through_training(tmp_path: Path) -> None:
    """On a client zero-padding is exact: zeros in both factors have zero gradient, so a block trains as one."""
    m = HetLoRA(rank=8, rank_min=2, plan="explicit", ranks=(("c0", 2), ("*", 8)), lam=0.1, optimizer=AdamW(1e-2))
    f = tiny.federation(m, tmp_path)
    clients = [f.client(k) for k in range(4)]
    down = [m.broadcast(f.context, m.init(f.context), c) for c in clients]
    work = m.begin(f.context, RoundInfo(0, 1), stack(down), {})
    from fedlora.training.batching import stack_batches

    for t in range(3):
        batch = stack_batches([f.batches(c, RoundInfo(0, 1), 1)[t % 2] for c in clients])
        work, _ = m.step(work, f.loss, torch.ones(4, dtype=torch.float64), batch)

    def padding(k: Key, v: Tensor) -> Tensor:
        return v[0, 2:] if k.part == A else v[0, :, 2:]

    assert all(padding(k, v).abs().max() == 0 for k, v in work["train"].items() if k.part in (A, B))
