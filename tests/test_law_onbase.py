"""Methods that change the base, against dense float64 matrices: FLoRA's stack, FedEx-LoRA's residual, FRLoRA's restarts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from fedlora.data.batches import LocalWork
from fedlora.errors import ConfigError
from fedlora.federation.callbacks import Callback
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.federation.views import served
from fedlora.layers import Layer
from fedlora.methods import METHODS
from fedlora.methods.contract import Client, Context, Method, RoundInfo, ServerState, Upload
from fedlora.methods.onbase import grown
from fedlora.training.optimizers import AdamW
from fedlora.tree import Key, Params, stack

SHORT: dict[str, Any] = {
    "plan": LocalWork(steps=2, batch_size=4),
    "evaluation": Evaluation(every=9, views=("personal",)),
}
HEAD = Key("head", "head", "weight")


def context(size: int = 40) -> Context:
    """Square layers, where a residual that is transposed still fits."""

    def layer(name: str) -> Layer:
        module = nn.Linear(size, size)
        with torch.no_grad():
            module.weight.copy_(torch.randn(size, size, generator=torch.Generator().manual_seed(len(name))))
        return Layer(name, size, size, True, module=module)

    return Context({"target": [layer("w"), layer("vv")], "head": [Layer("head", 3, 12, True)]}, 7)


def uploads(m: Method, c: Context, ranks: list[int], seed: int) -> list[Upload]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for j, r in enumerate(ranks):
        p: Params = {HEAD: torch.randn(3, 12, generator=g, dtype=torch.float64)}
        for s in c.groups["target"]:
            names = ("dA", "dB") if m.name == "frlora" else ("A", "B")
            p[Key("lora", s.name, names[0])] = torch.randn(r, s.in_, generator=g, dtype=torch.float64)
            p[Key("lora", s.name, names[1])] = torch.randn(s.out, r, generator=g, dtype=torch.float64)
        out.append(Upload(Client(f"c{j}", (5, 1, 2)[j]), p))
    return out


def start(m: Method, c: Context) -> ServerState:
    s = m.init(c)
    return ServerState(0, {k: v.double() if v.is_floating_point() else v for k, v in s.params.items()}, s.notes)


def dense(p: Params, layer: str) -> Tensor:
    """The base's change at a layer."""
    whole = Key("base", layer, "weight")
    if whole in p:
        return p[whole]
    a = Key("base", layer, "A")
    return p[a._replace(part="B")] @ p[a] if a in p else torch.zeros(40, 40, dtype=torch.float64)


def mean_product(ups: list[Upload], layer: str) -> Tensor:
    total = sum(u.client.examples for u in ups)
    return sum(
        u.client.examples / total * u.params[Key("lora", layer, "B")] @ u.params[Key("lora", layer, "A")] for u in ups
    )  # type: ignore[return-value]


def factored(p: Params, layer: str) -> bool:
    return Key("base", layer, "A") in p


def test_flora_adds_the_mean_product_whatever_the_ranks() -> None:
    """Over four rounds, in which the stack becomes a dense matrix; the head is a mean."""
    m, c = METHODS["flora"](rank=4, alpha=8.0, plan="explicit", ranks=(("c0", 2), ("c1", 3), ("c2", 4))), context()
    server, want = start(m, c), {s.name: torch.zeros(40, 40, dtype=torch.float64) for s in c.groups["target"]}
    seen = []
    for t in range(4):
        ups = uploads(m, c, [2, 3, 4], t)
        server = m.aggregate(c, server, iter(ups))
        for at in want:
            want[at] += 2.0 * mean_product(ups, at)
            torch.testing.assert_close(dense(server.params, at), want[at])
        seen.append(factored(server.params, "w"))
        torch.testing.assert_close(server.params[HEAD], sum(u.client.examples / 8 * u.params[HEAD] for u in ups))
    assert seen == [True, True, False, False]  # 9 a round: 9 (40 + 40) numbers and twice that are fewer than 40 x 40
    assert not any(k.adapter == "lora" for k in server.params)


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_fedex_is_the_mean_product_by_mean_and_residual(weights: Any) -> None:
    m, c = METHODS["fedex"](rank=4, alpha=8.0, weights=weights), context()
    server = start(m, c)
    for t in range(2):
        before, ups = server, uploads(m, c, [4, 4, 4], t)
        server = m.aggregate(c, server, iter(ups))
        p = [5 / 8, 1 / 8, 2 / 8] if weights == "examples" else [1 / 3] * 3
        for s in c.groups["target"]:
            a, b = Key("lora", s.name, "A"), Key("lora", s.name, "B")
            mean_a, mean_b = (sum(w * u.params[k] for w, u in zip(p, ups, strict=True)) for k in (a, b))
            torch.testing.assert_close(server.params[a], mean_a)
            torch.testing.assert_close(server.params[b], mean_b)
            exact = sum(w * u.params[b] @ u.params[a] for w, u in zip(p, ups, strict=True))
            gained = dense(server.params, s.name) - dense(before.params, s.name)
            torch.testing.assert_close(gained + 2.0 * server.params[b] @ server.params[a], 2.0 * exact)
            assert len(server.params[Key("base", s.name, "A")]) == 8 * (t + 1)  # (K - 1) r a round


def test_fedex_by_svd_is_the_best_residual_of_its_rank() -> None:
    m, c = METHODS["fedex"](rank=4, alpha=8.0, residual="svd", residual_rank=3), context()
    ups = uploads(m, c, [4, 4, 4], 0)
    server = m.aggregate(c, start(m, c), iter(ups))
    for s in c.groups["target"]:
        a, b = Key("lora", s.name, "A"), Key("lora", s.name, "B")
        u, d, vh = torch.linalg.svd(2.0 * (mean_product(ups, s.name) - server.params[b] @ server.params[a]))
        torch.testing.assert_close(dense(server.params, s.name), u[:, :3] @ torch.diag(d[:3]) @ vh[:3])


@pytest.mark.parametrize("exact", [False, True])
def test_frlora_is_the_papers_box_on_dense_weights(exact: bool) -> None:
    """W <- W0 - s B0 A0, then W <- W + s (Bm Am - B0 A0) a round; what is served between rounds is W with (A0, B0) on top."""
    m, c = METHODS["frlora"](rank=4, alpha=8.0, exact=exact), context()
    server = start(m, c)
    first, weights = {}, {}
    for s in c.groups["target"]:
        w0 = s.weight().detach().double()
        u, d, vh = torch.linalg.svd(w0)
        root = (d[:4] / 2.0).sqrt()
        first[s.name] = u[:, :4] * root, root[:, None] * vh[:4]
        weights[s.name] = w0 - 2.0 * first[s.name][0] @ first[s.name][1]
    for t in range(3):
        ups = uploads(m, c, [4, 4, 4], t)
        server = m.aggregate(c, server, iter(ups))
        for s in c.groups["target"]:
            b0, a0 = first[s.name]
            # An SVD is unique up to signs; the clients' changes were drawn for ours.
            ours = m.fixed(c)[Key("lora", s.name, "B0")].double()
            sign = (ours * b0).sum(0).sign()
            b0, a0 = b0 * sign, a0 * sign[:, None]
            each = [
                (
                    u.client.examples / 8,
                    b0 + u.params[Key("lora", s.name, "dB")],
                    a0 + u.params[Key("lora", s.name, "dA")],
                )
                for u in ups
            ]
            mean_b, mean_a = sum(w * b for w, b, _ in each), sum(w * a for w, _, a in each)
            made = sum(w * b @ a for w, b, a in each) if exact else mean_b @ mean_a
            weights[s.name] = weights[s.name] + 2.0 * (made - b0 @ a0)
            want = weights[s.name] + 2.0 * b0 @ a0 - s.weight().detach().double()
            torch.testing.assert_close(
                dense(server.params, s.name), want, rtol=1e-4, atol=1e-4
            )  # B0 and A0 are in fp32
            if not exact and factored(server.params, s.name):
                assert len(server.params[Key("base", s.name, "A")]) == (t + 2) * 4  # (t + 1) r after t rounds


def test_a_product_that_is_added_stays_whatever_it_is_kept_as() -> None:
    g = torch.Generator().manual_seed(0)
    p: Params = {}
    want = torch.zeros(6, 8, dtype=torch.float64)
    for n in (1, 2, 3, 1):
        b, a = torch.randn(6, n, generator=g, dtype=torch.float64), torch.randn(n, 8, generator=g, dtype=torch.float64)
        p, want = grown(p, "l", b, a), want + b @ a
        got = p.get(Key("base", "l", "weight"))
        torch.testing.assert_close(p[Key("base", "l", "B")] @ p[Key("base", "l", "A")] if got is None else got, want)
        assert sum(v.numel() for v in p.values()) <= 48


# runs -------------------------------------------------------------------------------------------------------------------
def run(m: Method, folder: Path, rounds: int = 3, **more: Any) -> Any:
    f = tiny.federation(m, folder, **SHORT | {"sampling": Sampling(rounds=rounds)} | more)
    f.run()
    return f


def meters(f: Any) -> list[float | None]:
    lines = map(json.loads, (f.store.root / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [x["exactness"] and x["exactness"]["product_error"] for x in lines if x["kind"] == "train"]


def test_the_meter_reads_zero_where_the_method_is_exact(tmp_path: Path) -> None:
    opt = {"rank": 1, "optimizer": AdamW(1e-2)}
    for name, fields in (("flora", {}), ("fedex", {})):
        found = meters(run(METHODS[name](**opt, **fields), tmp_path / name, 1))
        assert found[0] is not None and found[0] < 1e-5, name
    for name, fields in (("homlora", {}), ("fedex", {"residual": "svd", "residual_rank": 1})):
        found = meters(run(METHODS[name](**opt, **fields), tmp_path / f"{name}-loose", 1))
        assert found[0] is not None and found[0] > 1e-4, name


def test_clients_compute_on_the_merged_base(tmp_path: Path) -> None:
    """Logits of what a client serves == those of the base whose own weights hold the mean product."""
    for name in ("flora", "fedex", "frlora"):
        f = run(METHODS[name](rank=2, optimizer=AdamW(1e-2)), tmp_path / name, 2)
        loaded = f.store.load_server()
        server = ServerState.restored(*loaded)
        [mine] = served(f, f.engine(Callback()), server, [0], "personal")
        batch = {n: v[None] for n, v in f.data.examples.collate(f.data.splits["train"][0]).items()}
        got = f.model.forward(stack([mine]), batch)
        base = tiny.bert()
        modules = dict(base.named_modules())
        with torch.no_grad():
            for s in f.context.groups["target"]:
                a = Key("base", s.name, "A")
                change = server.params.get(Key("base", s.name, "weight"))
                change = server.params[a._replace(part="B")] @ server.params[a] if change is None else change
                assert float(change.abs().max()) > 1e-5
                modules[s.name].weight += change
                if name == "fedex":
                    b = Key("lora", s.name, "B")
                    modules[s.name].weight += 8.0 * server.params[b] @ server.params[b._replace(part="A")]
        head = {k: v for k, v in mine.items() if k.adapter == "head"}
        want = tiny.adapt(base).forward(stack([head]), batch)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_with_one_client_fedex_is_homlora(tmp_path: Path) -> None:
    one = {"sampling": Sampling(rounds=3, clients_per_round=1, cohort="fixed")}
    a, b = (run(METHODS[n](rank=2), tmp_path / n, **one) for n in ("fedex", "homlora"))
    tiny.close(a.store.load_server()[1], b.store.load_server()[1], 0.0)


def test_flora_draws_anew_for_each_client_and_round(tmp_path: Path) -> None:
    m = METHODS["flora"](rank=2)
    f = tiny.federation(m, tmp_path)
    server, drawn = m.init(f.context), []
    for round in (0, 1):
        down = stack([m.broadcast(f.context, server, f.client(i)) for i in (0, 1)])
        work = m.begin(f.context, RoundInfo(round, 2), down, {})
        a = next(v for k, v in work["train"].items() if k.part == "A")
        drawn += [a[0], a[1]]
        assert all(not v.any() for k, v in work["train"].items() if k.part == "B")
        again = m.begin(f.context, RoundInfo(round, 2), down, {})
        tiny.close(again["train"], work["train"], 0.0)
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))
    values = torch.stack(drawn) * 16**0.5  # uniform in [-1, 1), as LoRA's start
    assert float(values.abs().max()) < 1 and abs(float(values.mean())) < 0.2 and abs(float(values.var()) - 1 / 3) < 0.1


@pytest.mark.parametrize("name", ["flora", "fedex", "frlora"])
def test_a_client_that_missed_rounds_has_the_base_of_one_that_did_not(name: str, tmp_path: Path) -> None:
    """And the message that brings it there is counted: it grows until a dense matrix is smaller."""
    f = run(METHODS[name](rank=2, optimizer=AdamW(1e-2)), tmp_path, 3, sampling=Sampling(rounds=3, clients_per_round=2))
    server = ServerState.restored(*f.store.load_server())
    base = [
        {k: v for k, v in f.method.broadcast(f.context, server, f.client(i)).items() if k.adapter == "base"}
        for i in range(4)
    ]
    assert base[0] and all(torch.equal(base[0][k], b[k]) for b in base for k in base[0])
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    down = [sum(x["bytes"]["down"].values()) for x in lines if x["kind"] == "train"]
    assert down[0] < down[1] <= down[2]


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("flora", {"moments": "keep"}, "adapters are new in each round"),
        ("flora", {"adapter": "dora"}, "adds low-rank products to the base"),
        ("frlora", {"adapter": "lora"}, "principal components"),
        ("fedex", {"residual_rank": 0}, "method.residual_rank"),
    ],
)
def test_refused(name: str, fields: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        METHODS[name](**fields)
