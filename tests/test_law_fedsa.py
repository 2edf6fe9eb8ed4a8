"""FedSA-LoRA and the averaging family: who owns what, and the traps of simulators that share a module object."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from fedlora.data.federated import FederatedData
from fedlora.evaluation.analyses import product_error
from fedlora.evaluation.predictions import predict
from fedlora.federation import wire
from fedlora.federation.callbacks import Callback
from fedlora.federation.setting import Sampling
from fedlora.federation.views import served
from fedlora.methods.average import FedSALoRA, FFALoRA, HomLoRA
from fedlora.methods.contract import Client, Context, ServerState, Upload
from fedlora.training.optimizers import SGD, AdamW
from fedlora.tree import Key, Params, stack, unstack


def test_only_a_is_on_the_wire(tmp_path: Path) -> None:
    m = FedSALoRA(rank=4, head="personal", optimizer=AdamW(1e-2))
    f = tiny.federation(m, tmp_path)
    server = m.init(f.context)
    seen: list[Upload] = []
    f.engine(Callback()).round(server, 1, f.cohort(0), seen.append)
    for u in seen:
        text = wire.encode(u.params)
        assert b"/A" in text and b"/B" not in text and b"head" not in text
    assert {k.part for k in m.broadcast(f.context, server, f.client(0))} == {"A"}


def test_the_average_is_the_average_of_all_clients() -> None:
    """Three clients that hold 1, 2, 3 of sizes 1, 1, 2: 2.25 by examples, 2 uniformly; not the first client's 1."""
    k = Key("lora", "s", "A")
    uploads = [Upload(Client(str(i), n), {k: torch.full((2, 2), float(i + 1))}) for i, n in enumerate((1, 1, 2))]
    for weights, want in (("examples", 2.25), ("uniform", 2.0)):
        for m in (HomLoRA(weights=weights), FedSALoRA(weights=weights)):
            got = m.aggregate(Context({}, 0), ServerState(0, {k: torch.zeros(2, 2)}), iter(uploads))
            assert torch.equal(got.params[k], torch.full((2, 2), want))
            assert got.round == 1


def test_personal_leaves_differ_and_the_unsampled_keep_theirs(tmp_path: Path) -> None:
    """After round 1 with everybody, a round without c3 leaves c3's personal leaves bit for bit."""
    m = FedSALoRA(rank=4, head="personal", optimizer=AdamW(1e-2))
    f = tiny.federation(m, tmp_path)
    engine = f.engine(Callback())
    everybody = f.cohort(0)
    server, _ = engine.round(m.init(f.context), 2, everybody)
    before = {c.id: f.store.load_client(c.id, 1) for c in everybody}
    for a, b in itertools.pairwise(everybody):
        for k in before[a.id]:
            assert not torch.equal(before[a.id][k], before[b.id][k]), k
    server, _ = engine.round(server, 2, everybody[:3])
    after = {c.id: f.store.load_client(c.id, 2) for c in everybody}
    tiny.close(after["c3"], before["c3"], 0.0)
    assert any(not torch.equal(after["c0"][k], before["c0"][k]) for k in after["c0"])


def test_a_clients_start_is_its_own_end(tmp_path: Path) -> None:
    """Round 2 alone, from the stored leaves, by a fresh federation == round 2 of the running one: no hidden hand-over."""
    m = FedSALoRA(rank=4, head="personal", optimizer=SGD(0.1))
    f = tiny.federation(m, tmp_path / "a", block=1)
    engine = f.engine(Callback())
    server, _ = engine.round(m.init(f.context), 2, f.cohort(0))
    kept = {c.id: f.store.load_client(c.id, 1) for c in f.cohort(0)}
    engine.round(server, 2, f.cohort(1))
    alone = tiny.federation(m, tmp_path / "b", block=1)
    alone.store.save_client("c2", 0, kept["c2"])
    alone.engine(Callback()).round(server, 2, [f.client(2)])
    tiny.close(alone.store.load_client("c2", 2), f.store.load_client("c2", 2), 0.0)


def test_one_class_clients_disagree_early(tmp_path: Path) -> None:
    """Clients that hold one class each, personal heads: after one round each predicts its own class."""
    base = tiny.data(3)
    by_class = [np.flatnonzero(base.examples.labels == c) for c in range(tiny.CLASSES)]
    splits = {
        name: tiny.rows([r[cut] for r in by_class])
        for name, cut in (("train", slice(0, 20)), ("test", slice(20, None)))
    }
    data = FederatedData(base.examples, ["x", "y", "z"], splits, base.label_names, None, 0)
    m = FedSALoRA(rank=4, head="personal", optimizer=SGD(0.5))
    f = tiny.federation(m, tmp_path, data=data, sampling=Sampling(rounds=1))
    f.run()
    engine, server = f.engine(Callback()), ServerState(*f.store.load_server())
    params = served(f, engine, server, [0, 1, 2], "personal")
    everything = [splits["test"].rows] * 3
    said = predict(f.model, f.task, data, params, [0, 1, 2], everything)
    assert [set(p.values.tolist()) for p in said] == [{0}, {1}, {2}]


def test_exactness_meter() -> None:
    """FFA's mean is exact, FedAvg of both factors is not; both against dense products."""
    g = torch.Generator().manual_seed(0)
    a, b = Key("lora", "s", "A"), Key("lora", "s", "B")
    ups = [({a: torch.randn(2, 5, generator=g), b: torch.randn(4, 2, generator=g)}, w) for w in (1.0, 3.0)]
    new = {k: 0.25 * ups[0][0][k] + 0.75 * ups[1][0][k] for k in (a, b)}
    true = 0.25 * ups[0][0][b] @ ups[0][0][a] + 0.75 * ups[1][0][b] @ ups[1][0][a]
    assert product_error(ups, new) == pytest.approx(float((true - new[b] @ new[a]).norm() / true.norm()), rel=1e-5)
    same = [(p | {a: ups[0][0][a]}, w) for p, w in ups]
    assert product_error(same, new | {a: ups[0][0][a]}) < 1e-6
    assert product_error([({b: p[b]}, w) for p, w in ups], {b: new[b]}) is None


def test_ffa_halves_the_traffic(tmp_path: Path) -> None:
    """A is derived from the seed on both sides: only B travels, and both sides have the same A."""
    m, whole = FFALoRA(rank=4, head="frozen"), HomLoRA(rank=4, head="frozen")
    f = tiny.federation(m, tmp_path)
    size = lambda x: wire.measure(p := x.broadcast(f.context, x.init(f.context), f.client(0)), wire.size(p)).adapter  # noqa: E731
    assert size(m) * 2 == size(whole)
    a = m.fixed(f.context)
    assert all(torch.equal(a[k], whole.init(f.context).params[k]) for k in a) and {k.part for k in a} == {"A"}


@pytest.mark.parametrize("adapter", ["vera"])
def test_vera_shares_d_and_keeps_b(adapter: str, tmp_path: Path) -> None:
    m = FedSALoRA(rank=16, adapter="vera", head="frozen", optimizer=AdamW(5e-2))
    f = tiny.federation(m, tmp_path)
    f.run()
    round, server, _ = f.store.load_server()
    assert {k.part for k in server} == {"d"}
    kept = f.store.load_client("c0", round)
    assert {k.part for k in kept} == {"b"} and any(v.abs().max() > 0 for v in kept.values())
    assert {k.part for k in m.fixed(f.context)} == {"A", "B"}


def test_vera_equals_peft(tmp_path: Path) -> None:
    """PEFT's VeRA layer with our projections and vectors gives our logits."""
    from peft import VeraConfig, get_peft_model

    m = FedSALoRA(rank=16, adapter="vera", head="frozen")
    model = tiny.adapt(tiny.bert())
    context = Context(model.groups, 0)
    g = torch.Generator().manual_seed(0)
    p: Params = {k: torch.randn(v.shape, generator=g) for k, v in m.start(context).items()}
    batch = {n: v[None] for n, v in tiny.tokens().collate(np.arange(6)).items()}
    ours = model.forward(m.personal(context, stack([p]), {}), batch)[0]
    layers = [s.name for s in context.layers("target")]
    theirs = get_peft_model(tiny.bert(), VeraConfig(r=16, target_modules=layers, save_projection=True)).base_model.model
    fixed = m.fixed(context)
    with torch.no_grad():
        for name, layer in theirs.named_modules():
            if hasattr(layer, "vera_lambda_d") and name in layers:
                layer.vera_A["default"].copy_(fixed[Key("lora", name, "A")])
                layer.vera_B["default"].copy_(fixed[Key("lora", name, "B")])
                layer.vera_lambda_d["default"].copy_(p[Key("lora", name, "d")])
                layer.vera_lambda_b["default"].copy_(p[Key("lora", name, "b")])
    got = theirs.eval()(input_ids=batch["input_ids"][0], attention_mask=batch["attention_mask"][0]).logits
    torch.testing.assert_close(got, ours, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, model.forward({}, batch)[0])


def test_block_of_personal_models_is_each_alone(tmp_path: Path) -> None:
    """Evaluation in blocks gives every client's own predictions."""
    m = FedSALoRA(rank=4, head="personal", optimizer=AdamW(5e-2))
    f = tiny.federation(m, tmp_path)
    f.run()
    server = ServerState(*f.store.load_server())
    params = served(f, f.engine(Callback()), server, [0, 1, 2, 3], "personal")
    rows = [f.data.splits["test"][k] for k in range(4)]
    together = predict(f.model, f.task, f.data, params, range(4), rows, batch_size=8, block=4)
    for k in range(4):
        batch = {n: v[None] for n, v in f.data.examples.collate(rows[k]).items()}
        y = f.model.forward(stack([params[k]]), batch)[0]
        loss = nn.functional.cross_entropy(y, batch["labels"][0], reduction="none")
        np.testing.assert_allclose(together[k].losses, loss.numpy(), rtol=1e-4, atol=1e-6)
        assert together[k].values.tolist() == y.argmax(-1).tolist()


def test_unstack_undoes_stack() -> None:
    p = {Key("lora", "s", "A"): torch.randn(3, 5), Key("lora", "", "rank"): torch.tensor(3)}
    q = {Key("lora", "s", "A"): torch.randn(1, 5), Key("lora", "", "rank"): torch.tensor(1)}
    for a, b in zip(unstack(stack([p, q]), 2), (p, q), strict=True):
        tiny.close(a, b, 0.0)
