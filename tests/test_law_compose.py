"""Methods composed: each part still obeys its own paper; what cannot be composed is refused with the reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from fedlora.errors import ConfigError, ModelError
from fedlora.methods import METHODS
from fedlora.methods.average import FedSALoRA, HomLoRA
from fedlora.methods.contract import Client, Context, RoundInfo
from fedlora.methods.hetlora import HetLoRA
from fedlora.methods.pf2hetlora import PF2HetLoRA
from fedlora.methods.pf2lora import PF2LoRA
from fedlora.methods.slora import SLoRA
from fedlora.training.batching import stack_batches
from fedlora.training.loss import Loss
from fedlora.training.optimizers import SGD
from fedlora.training.tasks.classification import Classification
from fedlora.tree import Key, Params, rank, select, stack

ONE = torch.ones(1, dtype=torch.float64)


def setting(m: Any) -> tuple[Loss, dict[str, Params], Params, list[dict[str, torch.Tensor]]]:
    """(loss, work of one client, its leaves, four batches), float64."""
    model = tiny.adapt(tiny.bert().double())
    context, data = Context(model.groups, 7), tiny.data()
    client, g = Client("c0", 10), torch.Generator().manual_seed(1)

    def noisy(p: Params) -> Params:
        return {
            k: v if k.part == "rank" else (v + 0.3 * torch.randn(v.shape, generator=g)).double() for k, v in p.items()
        }

    down, kept = noisy(stack([m.broadcast(context, m.init(context), client)])), noisy(stack([m.keep(context, client)]))
    rows = data.splits["train"][3]
    batches = [stack_batches([data.examples.collate(rows[i * 4 : i * 4 + 4])]) for i in range(4)]
    for b in batches:
        b["weight"] = b["weight"].double()
    work = m.begin(context, RoundInfo(0, 1), down, kept)
    return Loss(model, Classification(tiny.CLASSES)), work, down | kept, batches


COMPOSED: dict[str, Any] = {
    "rank": 8, "alpha": 8.0, "rank_min": 5, "plan": "explicit", "ranks": (("*", 5),), "rank_personal": 2, "optimizer": SGD(0.5),
    "lr_personal": 0.3,
}  # fmt: skip


def test_without_a_penalty_a_step_is_pf2loras_at_the_clients_rank() -> None:
    m = PF2HetLoRA(**COMPOSED, lam=0.0)
    loss, work, x, draws = setting(m)
    new, _ = m.step(work, loss, ONE, *draws)
    plain = PF2LoRA(rank=5, alpha=5.0, rank_personal=2, lr_personal=0.3, optimizer=SGD(0.5))  # scale 1, as 8 / 8
    leaves = select(x, lambda k: k.part != "rank")
    other, _ = plain.step({"train": leaves, "ranks": {}, "moments": {}, "fixed": {}}, loss, ONE, *draws)
    assert rank(next(k for k in leaves if k.part == "A"), next(v for k, v in leaves.items() if k.part == "A")) in (2, 5)
    tiny.close(new["train"], other["train"], 1e-12)


def test_the_penalty_pulls_at_the_common_tail_only() -> None:
    """Its gradient by hand: lam d/dA ||B_t|| ||A_t|| = lam ||B_t|| / ||A_t|| A_t on the tail, over the whole model."""
    m, free = PF2HetLoRA(**COMPOSED, lam=0.7, gamma=0.6), PF2HetLoRA(**COMPOSED, lam=0.0, gamma=0.6)
    loss, work, x, draws = setting(m)
    with_, _ = m.step(work, loss, ONE, *draws)
    without, _ = free.step(work, loss, ONE, *draws)
    g = 3  # floor(0.6 * 5)
    tails = {
        part: torch.stack([(v[0, g:] if part == "A" else v[0, :, g:]).norm() for k, v in x.items() if k.adapter == "common" and k.part == part]).norm()
        for part in ("A", "B")
    }  # fmt: skip
    for k, v in x.items():
        if k.part == "rank":
            continue
        extra = (without["train"][k] - with_["train"][k]) / 0.5
        expected = torch.zeros_like(v)
        if k.adapter == "common" and k.part == "A":
            expected[:, g:] = 0.7 * tails["B"] / tails["A"] * v[:, g:]
        elif k.adapter == "common" and k.part == "B":
            expected[:, :, g:] = 0.7 * tails["A"] / tails["B"] * v[:, :, g:]
        torch.testing.assert_close(extra, expected, rtol=1e-8, atol=1e-10)


def test_without_personal_adapters_it_is_hetlora(tmp_path: Path) -> None:
    common = {"rank": 8, "alpha": 8.0, "rank_min": 2, "gamma": 0.7, "lam": 0.5, "weights": "uniform"}
    a = tiny.federation(PF2HetLoRA(**common, rank_personal=0), tmp_path / "a")
    b = tiny.federation(HetLoRA(**common), tmp_path / "b")
    a.run()
    b.run()
    mine = {k._replace(adapter="lora") if k.adapter == "common" else k: v for k, v in a.store.load_server()[1].items()}
    theirs = b.store.load_server()[1]
    # the seeded start differs by the adapter's name, so what must agree is the course of the ranks, not the leaves
    assert mine.keys() == theirs.keys()
    assert a.store.load_server()[2]["ranks"].keys() == b.store.load_server()[2]["ranks"].keys()


def test_rank_patterns_are_pefts(tmp_path: Path) -> None:
    """Ranks, scales and names as PEFT's LoraConfig reads rank_pattern."""
    from peft import LoraConfig, get_peft_model

    m = HomLoRA(rank=4, alpha=8.0, rank_pattern=(("query", 2), (r"layer\.1\..*value", 3)))
    model = tiny.adapt(tiny.bert())
    context = Context(model.groups, 7)
    peft = get_peft_model(
        tiny.bert(),
        LoraConfig(
            r=4,
            lora_alpha=8,
            rank_pattern=dict(m.rank_pattern),
            target_modules=[s.name for s in context.groups["target"]],
        ),
    )
    layers = {n.removeprefix("base_model.model."): x for n, x in peft.named_modules() if hasattr(x, "lora_A")}
    p = m.init(context).params
    for s in context.groups["target"]:
        a, b = p[Key("lora", s.name, "A")], p[Key("lora", s.name, "B")]
        assert a.shape == layers[s.name].lora_A["default"].weight.shape
        assert b.shape == layers[s.name].lora_B["default"].weight.shape
        scaled = m.form.view({Key("lora", s.name, "B"): torch.ones_like(b)})[Key("lora", s.name, "B")]
        assert float(scaled[0, 0]) == pytest.approx(layers[s.name].scaling["default"])
    f = tiny.federation(m, tmp_path)
    f.run()


def test_personal_rank_patterns(tmp_path: Path) -> None:
    m = PF2LoRA(rank=4, rank_personal=2, rank_pattern=(("query", 3),), rank_pattern_personal=(("query", 1),))
    f = tiny.federation(m, tmp_path)
    f.run()
    kept = f.store.load_client("c1", 3)
    assert {len(v) for k, v in kept.items() if k.part == "A" and k.layer.endswith("query")} == {1}
    assert {len(v) for k, v in kept.items() if k.part == "A" and k.layer.endswith("value")} == {2}
    server = f.store.load_server()[1]
    assert {len(v) for k, v in server.items() if k.part == "A" and k.layer.endswith("query")} == {3}


def test_priming_with_rank_patterns_keeps_every_logit(tmp_path: Path) -> None:
    """base="keep" changes no logit at the hand-over, whatever the ranks of the layers."""
    from fedlora.federation.callbacks import Callback
    from fedlora.federation.views import served
    from fedlora.methods.contract import ServerState

    m = SLoRA(rank=4, density=0.2, sparse_rounds=1, base="keep", rank_pattern=(("query", 2),))
    f = tiny.federation(m, tmp_path)
    engine = f.engine(Callback())
    before, _ = engine.round(m.init(f.context), 3, [f.client(0), f.client(1)])
    after = m.advance(f.context, before)
    assert {k.adapter for k in before.params} != {k.adapter for k in after.params}
    batch = {n: v[None] for n, v in f.data.examples.collate(f.data.splits["train"][0]).items()}
    logits = [
        f.model.forward(stack(served(f, engine, ServerState(1, s.params, s.notes), [0], "global")), batch)
        for s in (before, after)
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PF2HetLoRA(rank_personal=3, rank_min=3), "smallest common rank"),
        (lambda: PF2HetLoRA(share="first"), "common adapter is shared whole"),
        (lambda: SLoRA(second=METHODS["ffa"]()), "an SVD's A cannot take that place"),
        (lambda: SLoRA(second=METHODS["hetlora"]()), "one rank for all"),
        (lambda: SLoRA(second=METHODS["fedsa"]()), "one B for all"),
        (lambda: SLoRA(second=METHODS["fedprox"]()), "homlora or pf2lora"),
        (lambda: HetLoRA(rank_pattern=(("query", 4),)), "ranks differ by client"),
        (lambda: FedSALoRA(adapter="bitfit"), "tells two halves apart"),
        (
            lambda: METHODS["houlsby"](rank_pattern=(("query", 4),)),
            "it is of dora, lora, rslora, lora-xs, lora-xs-random and pissa",
        ),
        (lambda: HomLoRA(rank_pattern=(("query", 0),)), "ranks from 1"),
        (lambda: HomLoRA(rank_pattern=(("query", 0.5),)), r"a pair \(a text, an integer\)"),
        (lambda: HomLoRA(rank_pattern=(("quer[y", 2),)), r"rank_pattern: got 'quer\[y'.*unterminated character set"),
        (lambda: PF2LoRA(rank_pattern_personal=(("query", 0),)), "rank_pattern_personal: .*ranks from 1"),
        (lambda: METHODS["sft"](density_pattern=(("(?i)query", 0.1),)), "density_pattern: .*global flags not at"),
        (lambda: METHODS["sft"](density_pattern=(("query", 1.1),)), r"densities in \(0, 1\]"),
    ],
)
def test_refused_with_the_reason(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_all_that_is_wrong_with_a_method_is_said_at_once() -> None:
    """What every method has, what the family has and what the method alone has."""
    with pytest.raises(ConfigError) as e:
        PF2HetLoRA(rank=4, rank_min=9, alpha=0.0, gamma=2.0, lr_personal=-1.0, share="first", rank_personal=1)
    fields = ["alpha", "rank_min", "gamma", "lr_personal", "share"]
    assert sorted(p.field for p in e.value.problems) == sorted(f"method.{f}" for f in fields)
    with pytest.raises(ConfigError) as e:
        PF2LoRA(rank=0, rank_personal=0, lr_personal=-1.0)
    assert [p.field for p in e.value.problems] == ["method.rank", "method.lr_personal"]


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    model = tiny.adapt(tiny.bert())
    m = dataclasses.replace(HomLoRA(rank=4), rank_pattern=(("q_proj", 2),))
    with pytest.raises(ModelError, match=r"'q_proj' matches none of the 4 target layers"):
        m.init(Context(model.groups, 0))
    own = PF2LoRA(rank=4, rank_pattern_personal=(("k_proj", 2),))
    with pytest.raises(ModelError, match=r"method.rank_pattern_personal: 'k_proj' matches none"):
        own.keep(Context(model.groups, 0), Client("a", 1))


def test_a_pattern_that_is_no_map_says_how_to_write_one() -> None:
    from fedlora.recipe import Recipe

    raw = {"name": "x", "data": {"source": "demo"}, "method": {"name": "homlora", "rank_pattern": "query:2"}}
    with pytest.raises(ConfigError, match=r"a map of names to numbers; write rank_pattern: \{name: 4\}"):
        Recipe.from_dict(raw)
