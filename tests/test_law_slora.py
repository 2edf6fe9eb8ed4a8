"""The laws of SLoRA and of its baselines, against dense copies of the model trained with torch's optimizers.

Kills: decay that leaks outside the mask; a mask redrawn per round or per party; a hand-over that moves the model under
base="keep"; a factorisation that forgets the scale; indices on the wire; a bottleneck at the wrong place.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from fedlora.checkpoints.merge import merge
from fedlora.data.batches import LocalWork
from fedlora.errors import ConfigError, ModelError
from fedlora.federation import wire
from fedlora.federation.engine import Schedule, train_block
from fedlora.federation.run import Federation
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods import METHODS
from fedlora.methods.contract import Client, RoundInfo, ServerState
from fedlora.training.optimizers import AdamW
from fedlora.tree import Key, Params, stack, unstack

SFT, SLORA = METHODS["sft"], METHODS["slora"]


def local(f: Federation, k: int, round: int = 0, server: ServerState | None = None) -> Any:
    """One client's local training of one round."""
    m, c, info = f.method, f.client(k), RoundInfo(round, 10)
    server = server or m.init(f.context)
    down, kept = m.broadcast(f.context, server, c), m.keep(f.context, c)
    [done] = train_block(
        m, f.context, f.loss, info, [down], [kept], [f.batches(c, info, m.draws)], f.schedule, serve=True
    )
    return done


def logits(f: Federation, deltas: Params) -> Tensor:
    batch = f.data.examples.collate(np.arange(8))
    with torch.no_grad():
        return f.model.forward(stack([deltas]), {n: v[None] for n, v in batch.items()})[0]


# the mask ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["target", "all"])
def test_weights_outside_the_mask_never_move(layers: str, tmp_path: Path) -> None:
    """Bit for bit, with weight decay on; inside it, they do; the density is the stated one, layer by layer."""
    f = tiny.federation(
        SFT(density=0.1, layers=layers, optimizer=AdamW(1e-2, weight_decay=0.5)), tmp_path, plan=LocalWork(8, None, 5)
    )
    done = local(f, 3)
    before = dict(tiny.bert().named_parameters())
    after = dict(merge(tiny.bert(), done.served).named_parameters())
    index = f.method.fixed(f.context)  # type: ignore[attr-defined]
    names = {f"{s.name}.weight" for s in f.method.layers_of(f.context)}  # type: ignore[attr-defined]
    assert len(names) == (4 if layers == "target" else 13)
    for name, was in before.items():
        moved = (after[name] != was).flatten()
        if name in names:
            inside = torch.zeros(was.numel(), dtype=torch.bool)
            inside[index[Key("sparse", name.removesuffix(".weight"), "index")]] = True
            assert int(inside.sum()) == round(0.1 * was.numel())
            assert not bool(moved[~inside].any()), name
            assert bool(moved[inside].any()), name
        elif not name.startswith("classifier"):
            assert not bool(moved.any()), name


def test_densities_by_layer(tmp_path: Path) -> None:
    """Some layers denser than the rest, in both stages of a run and in what travels; names are read as in rank_pattern."""
    m = SLORA(rank=3, density=0.1, density_pattern=(("query", 0.5), (r"layer\.0\..*value", 1.0)), sparse_rounds=2)
    f, server = stage_one(m, tmp_path)
    want = {"query": 0.5, "value": 0.1}
    for s in f.context.layers("target"):
        density = 1.0 if ".0." in s.name and s.name.endswith("value") else want[s.name.rsplit(".", 1)[-1]]
        n = round(density * 16 * 16)
        assert len(server.params[Key("sparse", s.name, "values")]) == n
        assert len(f.method.fixed(f.context)[Key("sparse", s.name, "index")].unique()) == n  # type: ignore[attr-defined]
    handed = m.hand_over(f.context, server)
    assert all(handed.params[Key("lora", s.name, "A")].shape == (3, 16) for s in f.context.layers("target"))
    with pytest.raises(ConfigError, match=r"density_pattern: got 'query: 2.0', expected densities in \(0, 1\]"):
        SFT(density_pattern=(("query", 2.0),))
    with pytest.raises(ModelError, match=r"density_pattern: 'q_proj' matches none of the 4 target layers"):
        SFT(density_pattern=(("q_proj", 0.5),)).init(f.context)


def test_both_sides_draw_the_same_mask() -> None:
    """In processes of their own, in every round; another seed draws another one."""
    code = (
        "import sys, hashlib, torch\nfrom fedlora.methods import METHODS\nfrom fedlora.methods.contract import Context\nfrom fedlora.layers import Layer\n"
        "context = Context({'target': (Layer('a', 30, 20), Layer('b', 30, 20))}, int(sys.argv[1]))\n"
        "p = METHODS['sft'](density=0.2).fixed(context)\n"
        "print([hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in sorted(p.items())])"
    )
    said = [
        subprocess.run([sys.executable, "-c", code, s], capture_output=True, text=True, check=True).stdout
        for s in ("0", "0", "1")
    ]
    assert said[0] == said[1] != said[2]
    first, second = eval(said[0])
    assert first != second  # layers of one shape have masks of their own


def test_values_alone_travel(tmp_path: Path) -> None:
    """Four bytes a trained entry, the head, and framing that does not grow with the density."""
    sizes = {}
    for density in (0.1, 0.5):
        f = tiny.federation(SLORA(rank=2, density=density, sparse_rounds=5), tmp_path / str(density))
        done = local(f, 1)
        t = wire.measure(done.upload, wire.encode(done.upload, {"round": 0}))
        assert t.adapter == 4 * 4 * round(density * 16 * 16)
        assert t.head == 4 * (3 * 16 + 3)
        sizes[density] = t.framing
    assert abs(sizes[0.5] - sizes[0.1]) <= 64


def test_sparse_training_is_masked_dense_training(tmp_path: Path) -> None:
    """torch.optim.AdamW on a dense copy whose gradient is masked, its decay applied to the change and not to the weight."""
    f = tiny.federation(SFT(density=0.2, head="frozen", optimizer=AdamW(1e-2)), tmp_path, plan=LocalWork(5, None, 6))
    done = local(f, 2)
    base = tiny.bert()
    index = f.method.fixed(f.context)  # type: ignore[attr-defined]
    layers = {k.layer: v for k, v in index.items()}
    modules = dict(base.named_modules())
    weights = {s: modules[s].weight for s in layers}
    base.requires_grad_(False)
    for w in weights.values():
        w.requires_grad_(True)
    start = {s: w.detach().clone() for s, w in weights.items()}
    optimizer = torch.optim.AdamW(list(weights.values()), 1e-2, weight_decay=0.0)
    for batch in f.batches(f.client(2), RoundInfo(0, 10), 1):
        out = base(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        optimizer.zero_grad()
        nn.functional.cross_entropy(out, batch["labels"]).backward()
        for s, w in weights.items():
            mask = torch.zeros(w.numel()).index_fill_(0, layers[s], 1.0).view_as(w)
            assert w.grad is not None
            w.grad *= mask
        optimizer.step()
    for s, w in weights.items():
        want = (w.detach() - start[s]).flatten()[layers[s]]
        torch.testing.assert_close(done.upload[Key("sparse", s, "values")], want, rtol=2e-3, atol=2e-5)


# the hand-over ----------------------------------------------------------------------------------------------------------


def stage_one(method: Any, folder: Path) -> tuple[Federation, ServerState]:
    """A server after stage 1 with random values, so that nothing is small."""
    f = tiny.federation(method, folder)
    server = f.method.init(f.context)
    g = torch.Generator().manual_seed(1)
    params = {k: torch.randn(v.shape, generator=g) * 0.2 for k, v in server.params.items()}
    return f, ServerState(method.sparse_rounds, params, {"losses": [1.0]})


def served(f: Federation, server: ServerState) -> Params:
    c = f.client(0)
    down, kept = f.method.broadcast(f.context, server, c), f.method.keep(f.context, c)
    return unstack(f.method.personal(f.context, stack([down]), stack([kept])), 1)[0]


@pytest.mark.parametrize("second", ["homlora", "pf2lora"])
def test_keep_leaves_every_logit_unchanged(second: str, tmp_path: Path) -> None:
    f, server = stage_one(
        SLORA(rank=3, alpha=12, density=0.3, sparse_rounds=2, base="keep", second=METHODS[second]()), tmp_path
    )
    new = f.method.advance(f.context, server)
    assert any(k.part == "A" for k in new.params)
    torch.testing.assert_close(logits(f, served(f, new)), logits(f, served(f, server)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", ["sqrt", "B"])
@pytest.mark.parametrize("adapter", ["lora", "rslora"])
def test_reset_is_the_truncated_svd(split: str, adapter: str, tmp_path: Path) -> None:
    """scale * B A is the best rank-r approximation (numpy, float64); the energy in the notes is what it captures."""
    f, server = stage_one(SLORA(rank=3, alpha=12, density=0.3, sparse_rounds=2, split=split, adapter=adapter), tmp_path)
    new = f.method.advance(f.context, server)
    index = f.method.stages[0].fixed(f.context)  # type: ignore[attr-defined]
    scale = 12 / 3 if adapter == "lora" else 12 / 3**0.5
    for s in f.context.layers("target"):
        dense = np.zeros(s.out * s.in_)
        dense[index[Key("sparse", s.name, "index")].numpy()] = server.params[Key("sparse", s.name, "values")].numpy()
        u, d, vt = np.linalg.svd(dense.reshape(s.out, s.in_))
        a, b = (new.params[Key("lora", s.name, p)].double().numpy() for p in ("A", "B"))
        np.testing.assert_allclose(scale * b @ a, (u[:, :3] * d[:3]) @ vt[:3], atol=1e-5)
        assert new.notes["handover"]["energy"][s.name] == pytest.approx((d[:3] ** 2).sum() / (d**2).sum(), rel=1e-4)
        if split == "B":
            np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-5)
        else:
            np.testing.assert_allclose((a**2).sum(1), (b**2).sum(0), rtol=1e-4)
    again = f.method.advance(f.context, server)
    assert all(torch.equal(new.params[k], again.params[k]) for k in new.params)


@pytest.mark.parametrize("every", [1, 3])
def test_loss_before_and_after_is_recorded(every: int, tmp_path: Path) -> None:
    """Also where the round before the hand-over is not one that is evaluated; then it is no round to choose from."""
    method = SLORA(rank=2, density=0.3, sparse_rounds=2, optimizer=AdamW(2e-2))
    f = tiny.federation(method, tmp_path, sampling=Sampling(rounds=4), evaluation=Evaluation(every))
    f.run()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    [hand] = [x for x in lines if x["kind"] == "handover"]
    assert hand["round"] == 2
    assert set(hand["energy"]) == {s.name for s in f.context.layers("target")}
    after = [x for x in lines if x.get("stage") == "handover"]
    assert {(x["view"], x["split"]) for x in after} == {
        (v, s) for v in ("personal", "global") for s in ("validation", "test")
    }
    marked = "before" if every == 3 else None
    before = [x for x in lines if x["kind"] == "eval" and x["round"] == 2 and x.get("stage") == marked]
    assert len(before) == 4
    assert before[0]["mean"]["loss"] != after[0]["mean"]["loss"]


def test_plateau_by_hand() -> None:
    """patience 2, tolerance 10 %: 1.0 0.8 0.75 0.74: best of the last two 0.74 > 0.8 * 0.9 = 0.72, so stage 1 ends there."""
    m = SLORA(stage="plateau", patience=2, tolerance=0.1, sparse_rounds=50)

    def due(*losses: float) -> bool:
        return m.due(ServerState(len(losses), {}, {"losses": list(losses)}))

    assert not due(1.0)
    assert not due(1.0, 0.8)
    assert not due(1.0, 0.8, 0.75)  # 0.75 <= 1.0 * 0.9
    assert due(1.0, 0.8, 0.75, 0.74)
    assert not due(1.0, 0.8, 0.75, 0.6)
    assert SLORA(sparse_rounds=3).due(ServerState(3, {}, {"losses": [3.0, 2.0, 1.0]}))
    assert not SLORA(sparse_rounds=3).due(ServerState(2, {}, {"losses": [1.0, 1.0]}))
    assert m.due(ServerState(50, {}, {"losses": [1 / (i + 1) for i in range(50)]}))


# the classic ways -------------------------------------------------------------------------------------------------------


def torch_steps(f: Federation, model: nn.Module, trained: list[nn.Parameter], lr: float) -> None:
    """The oracle: AdamW without decay on `trained`."""
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    for batch in f.batches(f.client(2), RoundInfo(0, 10), 1):
        out = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        optimizer.zero_grad()
        nn.functional.cross_entropy(out, batch["labels"]).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["fft", "bitfit"])
def test_training_in_place(name: str, tmp_path: Path) -> None:
    """FFT is AdamW on every parameter, BitFit on every bias and the head."""
    f = tiny.federation(METHODS[name](optimizer=AdamW(2e-3)), tmp_path, plan=LocalWork(4, None, 6))
    done = local(f, 2)
    model = tiny.bert().train()
    chosen = [
        p for n, p in model.named_parameters() if name == "fft" or n.endswith("bias") or n.startswith("classifier")
    ]
    torch_steps(f, model, chosen, 2e-3)
    mine, start = (
        {n: p.detach() for n, p in m.named_parameters()} for m in (merge(tiny.bert(), done.served), tiny.bert())
    )
    theirs = {n: p.detach() for n, p in model.named_parameters()}
    # A weight whose gradient is all but zero gets a step of the rate or of nothing, as Adam divides by its size.
    for n, p in theirs.items():
        far = ((mine[n] - p).abs() > 1e-4).float().mean()
        assert float(far) < 0.02, n
    moved = torch.cat([(p - start[n]).flatten() for n, p in theirs.items()])
    ours = torch.cat([(mine[n] - start[n]).flatten() for n in theirs])
    assert float(torch.cosine_similarity(moved, ours, dim=0)) > 0.999


class Bottleneck(nn.Module):
    """A layer and behind it an adapter as in the paper: h + U relu(D h + d) + u."""

    def __init__(self, inner: nn.Module, p: Params, layer: str):
        super().__init__()
        self.inner = inner
        take = lambda part: nn.Parameter(p[Key("bottleneck", layer, part)].clone())  # noqa: E731
        self.down, self.up, self.d, self.u = take("down"), take("up"), take("down_bias"), take("up_bias")

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return h + torch.relu(h @ self.down.T + self.d) @ self.up.T + self.u


@pytest.mark.parametrize(
    ("name", "places"), [("houlsby", ["attention.output.dense", "output.dense"]), ("pfeiffer", ["output.dense"])]
)
def test_bottlenecks_stand_where_the_papers_put_them(name: str, places: list[str], tmp_path: Path) -> None:
    """After the projection that ends the attention and the feed-forward, before the residual is added."""
    f = tiny.federation(
        METHODS[name](rank=4, head="frozen", optimizer=AdamW(5e-3)), tmp_path, plan=LocalWork(4, None, 6)
    )
    done = local(f, 2)
    start = f.method.init(f.context).params
    model = tiny.bert()
    model.requires_grad_(False)
    adapters = {}
    for i in range(2):
        for place in places:
            layer = f"bert.encoder.layer.{i}.{place}"
            parent = model.get_submodule(layer.rpartition(".")[0])
            adapters[layer] = parent.dense = Bottleneck(parent.dense, start, layer)
    assert {k.layer for k in start if k.adapter == "bottleneck"} == set(adapters)
    torch_steps(f, model, [p for a in adapters.values() for n, p in a.named_parameters() if "inner" not in n], 5e-3)
    for layer, a in adapters.items():
        for part, want in (("down", a.down), ("up", a.up), ("down_bias", a.d), ("up_bias", a.u)):
            torch.testing.assert_close(done.upload[Key("bottleneck", layer, part)], want.detach(), rtol=2e-3, atol=5e-5)


def test_the_client_learns_the_stage_from_what_arrives(tmp_path: Path) -> None:
    """Nothing but the message says which stage it is: a client that missed rounds is right as well."""
    f, server = stage_one(SLORA(rank=2, density=0.3, sparse_rounds=2), tmp_path)
    new = f.method.advance(f.context, server)
    first = {k.adapter for k in local(f, 1, 0, server).upload}
    second = {k.adapter for k in local(f, 1, 7, new).upload}
    assert first == {"sparse", "head"}
    assert second == {"lora", "head"}
    assert f.method.broadcast(f.context, new, Client("late", 3)).keys() == new.params.keys()
    assert isinstance(f.schedule, Schedule)
