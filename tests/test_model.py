"""The model: deltas against dense matrices, architectures, PEFT's own layers with torch's own optimizers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from fedlora import adapters, kernels
from fedlora.errors import ModelError
from fedlora.federation.engine import Schedule, train_block
from fedlora.methods import METHODS
from fedlora.methods.contract import RoundInfo
from fedlora.model.adapted import Adapted
from fedlora.model.dropout import keep_mask
from fedlora.model.targets import matching
from fedlora.training.batching import stack_batches
from fedlora.training.loss import Loss
from fedlora.training.optimizers import SGD, AdamW
from fedlora.training.tasks.classification import Classification
from fedlora.tree import Key, stack

K, B, L, I, O, R = 3, 2, 4, 5, 6, 2  # noqa: E741


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


FORMS: dict[str, tuple[dict[str, Tensor], Any]] = {
    "low rank": ({"A": draw(K, R, I), "B": draw(K, O, R)}, lambda p, k: (p["B"][k] @ p["A"][k], 0)),
    "vera": (
        {"A": draw(R, I).expand(K, R, I), "B": draw(O, R).expand(K, O, R), "d": draw(K, R), "b": draw(K, O)},
        lambda p, k: (torch.diag(p["b"][k]) @ p["B"][k] @ torch.diag(p["d"][k]) @ p["A"][k], 0),
    ),
    "dense": ({"weight": draw(K, O, I), "bias": draw(K, O)}, lambda p, k: (p["weight"][k], p["bias"][k])),
    "bias": ({"bias": draw(K, O)}, lambda p, k: (torch.zeros(O, I, dtype=torch.float64), p["bias"][k])),
}


@pytest.mark.parametrize("name", FORMS)
def test_delta_is_its_dense_matrix(name: str) -> None:
    parts, dense = FORMS[name]
    x, y = draw(K * B, L, I), draw(K * B, L, O)
    got = adapters.apply(x, y, parts).unflatten(0, (K, B))
    for k in range(K):
        w, c = dense(parts, k)
        torch.testing.assert_close(got[k], y.unflatten(0, (K, B))[k] + x.unflatten(0, (K, B))[k] @ w.T + c)


@pytest.mark.parametrize("bias", [True, False])
def test_dora_is_its_dense_matrix(bias: bool) -> None:
    """Rows of W0 + B A scaled to norm |W0| + m; the base's bias is not scaled. Without B and m: the base, in every bit."""
    layer = nn.Linear(I, O, bias=bias, dtype=torch.float64)
    x = draw(K * B, L, I)
    y = layer(x).detach()
    p = {"A": draw(K, R, I), "B": draw(K, O, R), "m": draw(K, O) / 4}
    got = adapters.apply(x, y, p, layer).unflatten(0, (K, B))
    for k in range(K):
        v = layer.weight + p["B"][k] @ p["A"][k]
        w = v / v.norm(dim=1, keepdim=True) * (layer.weight.norm(dim=1) + p["m"][k])[:, None]
        torch.testing.assert_close(got[k], nn.functional.linear(x.unflatten(0, (K, B))[k], w, layer.bias))
    start = adapters.apply(x, y, {"A": p["A"], "B": 0 * p["B"], "m": 0 * p["m"]}, layer)
    assert torch.equal(start, y)


def test_sparse_delta_is_its_dense_matrix() -> None:
    index = torch.tensor([0, 7, 29])
    values = draw(K, 3)
    x, y = draw(K * B, L, I), draw(K * B, L, O)
    got = adapters.apply(x, y, {"values": values, "index": index.expand(K, 3)}).unflatten(0, (K, B))
    for k in range(K):
        w = torch.zeros(O, I, dtype=torch.float64)
        for n, at in enumerate(index.tolist()):
            w[at // I, at % I] = values[k, n]
        torch.testing.assert_close(got[k], y.unflatten(0, (K, B))[k] + x.unflatten(0, (K, B))[k] @ w.T)


def test_parts_that_form_no_delta_are_refused() -> None:
    with pytest.raises(ValueError, match="form no delta"):
        adapters.apply(draw(1, 5), draw(1, 6), {"rank": draw(1)})


@pytest.mark.parametrize("family", tiny.families())
def test_every_architecture_trains_in_a_block_as_alone(family: str, tmp_path: Path) -> None:
    """fp32 tolerance; every target layer is reached. DeBERTa-v3 shares a projection over examples: its block is 1."""
    build = tiny.families()[family]
    ran = []
    for block in (1, "auto"):
        f = tiny.federation(
            METHODS["fedsa"](rank=4, optimizer=SGD(0.1)), tmp_path / str(block), tiny.seeded(build), block=block
        )
        assert f.block_size() == (1 if block == 1 or family == "deberta-v3" else 32)
        f.run()
        ran.append(f.store.load_server()[1])
    tiny.close(*ran)
    assert any(k.part == "A" and v.abs().max() > 0 for k, v in ran[0].items())


@pytest.mark.parametrize("family", tiny.causal_families())
def test_every_causal_model_trains_in_a_block_as_alone(family: str, tmp_path: Path) -> None:
    ran = []
    for block in (1, 4):
        base = tiny.seeded(tiny.causal_families()[family])
        f = tiny.federation(
            METHODS["fedsa"](rank=4, optimizer=SGD(0.1)), tmp_path / str(block), base, block=block, causal=True
        )
        f.run()
        ran.append(f.store.load_server()[1])
    tiny.close(*ran)


def test_a_block_of_deberta_v3_is_refused_by_name(tmp_path: Path) -> None:
    f = tiny.federation(METHODS["homlora"](rank=2), tmp_path, tiny.seeded(tiny.families()["deberta-v3"]), block=4)
    with pytest.raises(
        ModelError, match=r"query_proj' works on a tensor that all examples share .* set run.block to 1"
    ):
        f.run()


PEFT_CASES = [
    ("bert", AdamW(1e-2, weight_decay=0.1), 1.0),
    ("gpt2", SGD(0.1), None),
    ("roberta", SGD(0.1, momentum=0.9, weight_decay=0.01), None),
    ("llama", AdamW(1e-2), 0.1),
]


@pytest.mark.parametrize(("family", "optimizer", "clip"), PEFT_CASES)
@pytest.mark.parametrize("adapter", ["lora", "rslora", "dora"])
def test_local_training_equals_peft(
    family: str, optimizer: Any, clip: float | None, adapter: str, tmp_path: Path
) -> None:
    """PEFT's LoRA layers + torch.optim + clip_grad_norm_ + autograd on nn.Parameters: same start, same batches."""
    from peft import LoraConfig, inject_adapter_in_model

    if adapter == "dora":  # its m is the magnitude's change: decay would pull to the base's norms, theirs to zero
        optimizer = dataclasses.replace(optimizer, weight_decay=0.0)
    # a head's leaf is a delta on the base head, so decay would pull it to the base head, theirs to zero
    head = "frozen" if optimizer.weight_decay else "shared"
    m = METHODS["homlora"](rank=4, alpha=8.0, adapter=adapter, optimizer=optimizer, clip=clip, head=head)
    f = tiny.federation(m, tmp_path, model=tiny.adapt(tiny.seeded(tiny.families()[family]), dropout=False))
    client, info = f.client(2), RoundInfo(0, 1)
    down = m.broadcast(f.context, m.init(f.context), client)
    batches = f.batches(client, info, 1)
    [done] = train_block(m, f.context, f.loss, info, [down], [{}], [batches], Schedule())

    theirs = tiny.seeded(tiny.families()[family]).eval()
    theirs.requires_grad_(False)
    targets = [s.name for s in f.model.groups["target"]]
    conv = family == "gpt2"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_rslora=adapter == "rslora",
                        use_dora=adapter == "dora", fan_in_fan_out=conv)  # fmt: skip
    theirs = inject_adapter_in_model(config, theirs)
    named = dict(theirs.named_parameters())
    part = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}
    mine = {
        k: named[f"{k.layer}.{k.part}" if k.adapter == "head" else f"{k.layer}.{part[k.part]}.default.weight"]
        for k in down
    }
    start = {}
    with torch.no_grad():
        for k, p in mine.items():
            p.requires_grad_()
            start[k] = p.detach().clone() if k.adapter == "head" or k.part == "m" else torch.zeros_like(p)
            p.copy_(down[k] + start[k])
    if isinstance(optimizer, AdamW):
        torch_opt: Any = torch.optim.AdamW(mine.values(), optimizer.lr, weight_decay=optimizer.weight_decay)
    else:
        torch_opt = torch.optim.SGD(
            mine.values(), optimizer.lr, momentum=optimizer.momentum, weight_decay=optimizer.weight_decay
        )
    for batch in batches:
        torch_opt.zero_grad()
        inputs = {n: v for n, v in batch.items() if n in ("input_ids", "attention_mask")}
        nn.functional.cross_entropy(theirs(**inputs).logits, batch["labels"]).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(list(mine.values()), clip)
        torch_opt.step()
    for k, p in mine.items():
        torch.testing.assert_close(
            done.upload[k], p.detach() - start[k], rtol=2e-4, atol=2e-6, msg=lambda m, k=k: f"{k}: {m}"
        )


def test_optimizers_equal_torch() -> None:
    """20 steps on stacked leaves == torch.optim on each client's leaf, with unequal learning-rate factors."""
    g = torch.Generator().manual_seed(0)
    p0 = {Key("a", "s", "A"): torch.randn(2, 3, 4, generator=g), Key("a", "t", "B"): torch.randn(2, 5, generator=g)}
    grads = [{k: torch.randn(v.shape, generator=g) for k, v in p0.items()} for _ in range(20)]
    for ours in (SGD(0.1), SGD(0.1, 0.9, 0.01), AdamW(0.1), AdamW(0.1, (0.8, 0.95), weight_decay=0.05)):
        p, s = dict(p0), ours.init(p0)
        for x in grads:
            p, s = ours.update(x, s, p, torch.tensor([1.0, 0.5]))
        for client, factor in enumerate((1.0, 0.5)):
            q = {k: v[client].clone().requires_grad_() for k, v in p0.items()}
            if isinstance(ours, AdamW):
                opt: Any = torch.optim.AdamW(q.values(), 0.1 * factor, betas=ours.betas, weight_decay=ours.weight_decay)
            else:
                opt = torch.optim.SGD(q.values(), 0.1 * factor, momentum=ours.momentum, weight_decay=ours.weight_decay)
            for x in grads:
                for k in q:
                    q[k].grad = x[k][client].clone()
                opt.step()
            for k in q:
                torch.testing.assert_close(p[k][client], q[k].detach(), rtol=1e-5, atol=1e-6)


def test_accumulation_and_checkpointing_change_nothing(tmp_path: Path) -> None:
    """Gradient accumulation and recomputation give the plain step's leaves, dropout included."""
    m = METHODS["homlora"](rank=4, optimizer=SGD(0.1))
    runs = []
    for i, (parts, recompute) in enumerate([(1, False), (3, False), (1, True), (2, True)]):
        model = tiny.adapt(tiny.bert(dropout=0.3), checkpointing=recompute)
        f = tiny.federation(m, tmp_path / str(i), model=model, accumulation=parts)
        f.run()
        runs.append(f.store.load_server()[1])
    for other in runs[1:]:
        tiny.close(runs[0], other)


def test_dropout_is_dropout(tmp_path: Path) -> None:
    """Masks: the right rate, unlike between rows and calls, alike under padding; off at evaluation; changes training."""
    seeds = torch.arange(64)
    a = keep_mask(seeds, 1, torch.Size([64, 8, 100]), 0.3)
    assert abs(a.float().mean().item() - 0.7) < 0.005
    flat = a.flatten(1).double() - 0.7
    correlation = (flat @ flat.T) / flat.shape[1] / 0.21 - torch.eye(64)
    assert correlation.abs().max() < 6 / flat.shape[1] ** 0.5
    assert not torch.equal(a, keep_mask(seeds, 2, a.shape, 0.3))
    assert torch.equal(a, keep_mask(seeds, 1, torch.Size([64, 11, 107]), 0.3)[:, :8, :100])
    m = METHODS["homlora"](rank=4, optimizer=SGD(0.1))
    leaves = []
    for i, p in enumerate((0.0, 0.5)):
        f = tiny.federation(m, tmp_path / str(i), tiny.bert(dropout=p))
        f.run()
        leaves.append(f.store.load_server()[1])
    assert any(not torch.equal(leaves[0][k], leaves[1][k]) for k in leaves[0])


def test_bf16_base_keeps_fp32_adapters(tmp_path: Path) -> None:
    exact, half = (tiny.federation(METHODS["homlora"](rank=4, optimizer=SGD(0.1)), tmp_path / d, base)
                   for d, base in (("a", tiny.bert()), ("b", tiny.bert().to(torch.bfloat16))))  # fmt: skip
    exact.run()
    half.run()
    a, b = exact.store.load_server()[1], half.store.load_server()[1]
    assert all(v.dtype == torch.float32 for v in b.values())
    moved = torch.cat([v.flatten() for k, v in a.items() if k.part == "B"])
    other = torch.cat([v.flatten() for k, v in b.items() if k.part == "B"])
    assert torch.cosine_similarity(moved, other, dim=0) > 0.99
    assert not torch.equal(moved, other)


def test_targets_are_named_with_near_misses() -> None:
    base = tiny.bert()
    assert len(matching(base, ["query", "value"])) == 4
    assert len(matching(base, r".*\.(key)")) == 2
    with pytest.raises(ModelError, match=r"'quary' matches no layer .* did you mean 'query'"):
        matching(base, ["quary"])
    with pytest.raises(ModelError, match="matches no layer"):
        matching(base, "nothing.*")
    with pytest.raises(ModelError, match=r"'quer\[y' is not a regular expression: unterminated"):
        matching(base, "quer[y")
    with pytest.raises(ModelError, match=r"is a Dropout, expected Linear"):
        Adapted(base, {"target": ["bert.embeddings.dropout"]})


def test_a_site_that_never_runs_is_refused(tmp_path: Path) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Adapted(Idle(), {"target": ["used", "idle"]})
    with pytest.raises(ModelError, match=r"never reaches 'idle'"):
        model.probe({"x": torch.zeros(1, 2, 3)})


def test_hooks_leave_the_base_as_it_was() -> None:
    base = tiny.bert()
    names = list(base.state_dict())
    x = {"input_ids": torch.arange(6)[None]}
    before = base.eval()(**x).logits
    model = tiny.adapt(base)
    m = METHODS["homlora"](rank=2)
    from fedlora.methods.contract import Context

    p = {k: torch.ones_like(v) for k, v in m.init(Context(model.groups, 0)).params.items()}
    assert not torch.equal(model.forward(stack([p]), {"input_ids": x["input_ids"][None]})[0], before)
    model.close()
    assert torch.equal(base(**x).logits, before)
    assert list(base.state_dict()) == names


def test_loss_of_a_block_is_each_clients_mean() -> None:
    """Padding rows weigh nothing; torch's own cross-entropy per client is the oracle."""
    model = tiny.adapt(tiny.bert())
    examples = tiny.tokens()
    batches = [examples.collate(np.arange(i * 7, i * 7 + n)) for i, n in enumerate((2, 5, 3))]
    got = Loss(model, Classification(tiny.CLASSES))({}, stack_batches(batches))
    for j, b in enumerate(batches):
        logits = model.base(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
        torch.testing.assert_close(got[j], nn.functional.cross_entropy(logits, b["labels"]))


def test_t5_classifies_in_blocks(tmp_path: Path) -> None:
    """Encoder and decoder of T5, whose classifier reads the end-of-sequence token: block equals one by one."""
    import transformers as t

    def make() -> Any:
        config = t.T5Config(
            vocab_size=tiny.VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, num_labels=tiny.CLASSES,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, attn_implementation="eager",
        )  # fmt: skip
        return t.T5ForSequenceClassification(config)

    data = tiny.data()
    data.examples.flat[data.examples.offsets[1:] - 1] = 1
    runs = []
    for block in (1, 4):
        f = tiny.federation(
            METHODS["homlora"](rank=2), tmp_path / str(block), tiny.seeded(make), data=data, block=block
        )
        f.run()
        runs.append(f.store.load_server()[1])
    assert any("EncDecAttention" in k.layer for k in runs[0]) and any(k.adapter == "head" for k in runs[0])
    tiny.close(*runs)


def test_fused_attention_drops_nothing_where_dropout_is_off(tmp_path: Path) -> None:
    """Checkpointing sets the base to training, where it asks for its own rate."""
    runs = []
    for attention, checkpointing in (("eager", False), ("sdpa", True)):
        base = tiny.bert(dropout=0.4)
        base.config._attn_implementation = attention
        model = tiny.adapt(base, dropout=False, checkpointing=checkpointing)
        f = tiny.federation(METHODS["homlora"](rank=2), tmp_path / attention, model=model)
        f.run()
        runs.append(f.store.load_server()[1])
    tiny.close(*runs)


@pytest.mark.parametrize("longest", [4, 7, 9])
def test_short_rows_train_with_dropout_in_fused_attention(longest: int, tmp_path: Path) -> None:
    """Also where no row has as many tokens as attention's kernel is worth for."""
    examples = tiny.tokens(longest=longest)
    runs = []
    for attention in ("eager", "sdpa"):
        base = tiny.bert(dropout=0.2)
        base.config._attn_implementation = attention
        if attention == "sdpa" and not kernels.useful(torch.device("cpu"), torch.float32):
            pytest.skip("needs compiled operators")
        f = tiny.federation(
            METHODS["homlora"](rank=2),
            tmp_path / attention,
            base,
            data=dataclasses.replace(tiny.data(), examples=examples),
        )
        f.run()
        runs.append(f.store.load_server()[1])
    tiny.close(*runs)


def test_dropout_inside_fused_attention_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would draw from torch's global generator, where attention is not ours: no run could be repeated."""
    monkeypatch.setattr(kernels, "useful", lambda device, dtype: False)
    base = tiny.bert(dropout=0.2)
    base.config._attn_implementation = "sdpa"
    f = tiny.federation(METHODS["homlora"](rank=2), tmp_path, base)
    with pytest.raises(ModelError, match="global generator"):
        f.run()
    f.model.close()
    f = tiny.federation(METHODS["homlora"](rank=2), tmp_path / "without", model=tiny.adapt(base, dropout=False))
    f.run()
