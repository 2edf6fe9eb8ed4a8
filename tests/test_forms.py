"""The delta forms: (IA)^3 and PiSSA against PEFT's own layers, the registry, and what exports write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_export import plain
from torch import Tensor, nn

from fedlora import adapters
from fedlora.checkpoints.merge import merge
from fedlora.checkpoints.peft import export
from fedlora.errors import ConfigError, ModelError
from fedlora.federation.engine import Schedule, train_block
from fedlora.layers import Layer, base_weight
from fedlora.methods import METHODS
from fedlora.methods.contract import Context, RoundInfo
from fedlora.training.optimizers import SGD, AdamW
from fedlora.tree import Key, Params, stack

PLACES = {  # family -> (all places, those whose input is scaled), from section 3.3 of the paper
    "bert": (r".*(attention\.self\.(key|value)|layer\.\d+\.output\.dense)", r".*layer\.\d+\.output\.dense"),
    "gpt2": (r".*(attn\.c_attn|mlp\.c_proj)", r".*mlp\.c_proj"),  # queries, keys and values are one layer
    "llama": (r".*(k_proj|v_proj|down_proj)", r".*down_proj"),
    "deberta-v2": (r".*(self\.(key|value)_proj|layer\.\d+\.output\.dense)", r".*layer\.\d+\.output\.dense"),
}


def family(name: str) -> Any:
    """With larger weights than at a fresh start, whose gradients are too small to compare, and biases that are not zero."""
    base = tiny.seeded(tiny.families()[name]).eval()
    with torch.no_grad():
        for p in base.parameters():
            _ = p.mul_(6) if p.ndim > 1 else p.add_(torch.linspace(-0.3, 0.3, len(p)))
    return base


def one_client(m: Any, name: str, folder: Path) -> tuple[Any, list[Any], Any]:
    """(federation, the client's batches, what it uploads) after one round of local training."""
    model = tiny.adapt(family(name), needs=m.groups, dropout=False)
    f = tiny.federation(m, folder, model=model)
    client, info = f.client(2), RoundInfo(0, 1)
    batches = f.batches(client, info, 1)
    down = m.broadcast(f.context, m.init(f.context), client)
    [done] = train_block(m, f.context, f.loss, info, [down], [{}], [batches], Schedule())
    return f, batches, done.upload


def train(theirs: nn.Module, leaves: list[Tensor], optimizer: Any, batches: list[Any]) -> None:
    """torch's own optimizer on PEFT's own parameters."""
    if isinstance(optimizer, AdamW):
        opt: Any = torch.optim.AdamW(leaves, optimizer.lr, weight_decay=0.0)
    else:
        opt = torch.optim.SGD(leaves, optimizer.lr, momentum=optimizer.momentum)
    for batch in batches:
        opt.zero_grad()
        y = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        nn.functional.cross_entropy(y, batch["labels"]).backward()
        opt.step()


def logits(f: Any, deltas: Params) -> Tensor:
    batch = f.data.examples.collate(np.arange(6))
    with torch.no_grad():
        return f.model.forward(stack([deltas]), {n: v[None] for n, v in batch.items()})[0]


def ready(f: Any, p: Params) -> Params:
    return f.method.form.view(p | f.method.fixed(f.context))


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("optimizer", [SGD(0.5, momentum=0.9), AdamW(3e-2)], ids=["sgd", "adamw"])
def test_ia3_is_pefts(name: str, optimizer: Any, tmp_path: Path) -> None:
    """The same places, forward and local training as PEFT's IA3 layers with torch's optimizers; merged: the same logits."""
    from peft import IA3Config, inject_adapter_in_model

    m = METHODS["homlora"](adapter="ia3", optimizer=optimizer, head="frozen")
    f, batches, up = one_client(m, name, tmp_path)
    theirs = family(name)
    theirs.requires_grad_(False)
    everywhere, inputs = PLACES[name]
    config = IA3Config(target_modules=everywhere, feedforward_modules=inputs, fan_in_fan_out=name == "gpt2")
    theirs = inject_adapter_in_model(config, theirs)
    layers = {n: x for n, x in theirs.named_modules() if hasattr(x, "ia3_l")}
    assert {k.layer for k in up} == layers.keys()
    assert {k.layer for k in up if k.part == "l_in"} == {n for n, x in layers.items() if x.is_feedforward}
    mine = {k: layers[k.layer].ia3_l["default"] for k in up}
    train(theirs, list(mine.values()), optimizer, batches)
    for k, p in mine.items():
        torch.testing.assert_close(up[k], p.detach().flatten() - 1, rtol=5e-4, atol=5e-6)
        assert up[k].abs().max() > 3e-4
    want = logits(f, ready(f, up))
    torch.testing.assert_close(plain(theirs), want, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(plain(merge(family(name), ready(f, up))), want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("optimizer", [SGD(0.1, momentum=0.9), AdamW(3e-3)], ids=["sgd", "adamw"])
def test_pissa_is_pefts(name: str, optimizer: Any, tmp_path: Path) -> None:
    """PEFT's own start by SVD on its residual base, trained by torch: the same weights in the end, and the same logits.

    Signs of singular vectors may differ; B A does not depend on them.
    """
    from peft import LoraConfig, inject_adapter_in_model

    pattern = {r"layers?\.1\..*|h\.1\..*": 2}
    m = METHODS["homlora"](
        rank=4, alpha=6.0, adapter="pissa", rank_pattern=tuple(pattern.items()), optimizer=optimizer, head="frozen"
    )
    f, batches, up = one_client(m, name, tmp_path)
    base, theirs = family(name), family(name)
    theirs.requires_grad_(False)
    targets = [s.name for s in f.model.groups["target"]]
    ranks = {f"^{s}$": m.form.rank_at(s) for s in targets}
    assert set(ranks.values()) == {2, 4}
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets,
        rank_pattern=ranks,
        init_lora_weights="pissa",
        fan_in_fan_out=name == "gpt2",
    )
    theirs = inject_adapter_in_model(config, theirs)
    layers = {n: x for n, x in theirs.named_modules() if hasattr(x, "lora_A")}
    leaves = [
        x[part].default.weight for x in ({"A": y.lora_A, "B": y.lora_B} for y in layers.values()) for part in "AB"
    ]
    train(theirs, leaves, optimizer, batches)
    modules, deltas = dict(base.named_modules()), ready(f, up)
    for site, layer in layers.items():
        a, b = (layer.lora_A.default.weight, layer.lora_B.default.weight)
        whole = base_weight(layer.base_layer) + layer.scaling["default"] * b @ a
        change = (whole - base_weight(modules[site])).detach()
        got = deltas[Key("lora", site, "B")] @ deltas[Key("lora", site, "A")]
        torch.testing.assert_close(got, change, rtol=2e-3, atol=3e-6)
        assert got.abs().max() > 2e-4
    want = logits(f, deltas)
    torch.testing.assert_close(plain(theirs), want, rtol=5e-4, atol=5e-5)
    torch.testing.assert_close(plain(merge(base, deltas)), want, rtol=2e-4, atol=2e-5)


def test_pissa_starts_at_the_best_part_of_the_weight() -> None:
    """s B0 A0 by numpy's SVD in float64; the same on every side that has the base."""
    model, other = tiny.adapt(family("gpt2")), tiny.adapt(family("gpt2"))
    form = adapters.make("pissa", 3, 5.0)
    fixed = [form.fixed("lora", x.groups["target"], 0) for x in (model, other)]
    for k, v in fixed[0].items():
        assert torch.equal(v, fixed[1][k])
    for s in model.groups["target"]:
        u, d, v = np.linalg.svd(base_weight(model.base.get_submodule(s.name)).double().numpy(), full_matrices=False)
        want = (u[:, :3] * d[:3]) @ v[:3]
        got = 5 / 3 * fixed[0][Key("lora", s.name, "B0")] @ fixed[0][Key("lora", s.name, "A0")]
        np.testing.assert_allclose(got.numpy(), want, atol=1e-6)


def test_pissa_without_a_base_is_refused() -> None:
    with pytest.raises(ModelError, match="layer 'w': its delta starts from the base's weight"):
        METHODS["homlora"](rank=2, adapter="pissa").fixed(Context({"target": [Layer("w", 5, 4)]}, 0))


def test_decay_pulls_a_form_to_the_base(tmp_path: Path) -> None:
    """Every form stores a change, so decay alone (no gradient reaches a frozen model's rows of weight zero) makes it smaller."""
    for name in ("ia3", "pissa"):
        m = METHODS["homlora"](rank=2, adapter=name)
        f = tiny.federation(m, tmp_path / name)
        assert all(float(v.abs().max()) == 0 for k, v in m.start(f.context).items())


# the registry -----------------------------------------------------------------------------------------------------
def test_an_unknown_form_is_refused_with_the_near_misses() -> None:
    with pytest.raises(ConfigError, match=r"method.adapter: got 'pisa', expected one of .*pissa"):
        METHODS["homlora"](adapter="pisa")


@pytest.mark.parametrize("method", ["pf2lora", "hetlora", "flexlora", "feddpa-t", "slora"])
def test_what_needs_a_low_rank_product_refuses_the_rest(method: str) -> None:
    """PiSSA's leaves are no factors of its delta: truncating or mixing them would be another delta."""
    for form in sorted(set(adapters.FORMS) - {"lora", "rslora"}):
        with pytest.raises(ConfigError, match=r"method\.adapter: got .*lora or rslora: "):
            METHODS[method](adapter=form)


def test_the_schema_names_the_forms() -> None:
    from fedlora.recipe.schema import schema

    [homlora] = [m for m in schema()["$defs"]["MethodSection"]["oneOf"] if m.get("title") == "homlora"]
    assert homlora["properties"]["adapter"]["enum"] == list(adapters.FORMS)


# exports ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("adapter", ["lora", "rslora", "dora", "pissa"])
def test_ranks_by_layer_leave_with_their_scales(adapter: str, tmp_path: Path) -> None:
    """A PEFT folder of unlike ranks: plain PEFT gives the adapted model's logits, so every layer keeps its scale."""
    from peft import PeftModel

    m = METHODS["homlora"](rank=4, adapter=adapter, rank_pattern=(("query", 2),), optimizer=SGD(0.5), head="frozen")
    f, _, up = one_client(m, "bert", tmp_path / "run")
    g = torch.Generator().manual_seed(0)
    deltas = ready(f, {k: v + 0.1 * torch.randn(v.shape, generator=g) for k, v in up.items()})
    export(lambda: family("bert"), (), deltas, "classification", "somewhere", tmp_path / "out")
    theirs = PeftModel.from_pretrained(family("bert"), tmp_path / "out")
    want = logits(f, deltas)
    torch.testing.assert_close(plain(theirs), want, rtol=2e-4, atol=2e-5)
    assert float((want - plain(family("bert"))).abs().max()) > 1e-2


@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_equal_exports_are_equal_bytes(adapter: str, tmp_path: Path) -> None:
    """PEFT writes sets in the order of hashes, which differ by process, and the head's name twice."""
    m = METHODS["homlora"](rank=2, adapter=adapter, optimizer=SGD(0.5))
    f, _, up = one_client(m, "bert", tmp_path / "run")
    for folder in ("a", "b"):
        export(lambda: family("bert"), ["classifier"], ready(f, up), "classification", "x", tmp_path / folder)
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    said = json.loads(files["adapter_config.json"])
    for field in ("target_modules", "modules_to_save", "feedforward_modules"):
        if said.get(field):
            assert said[field] == sorted(set(said[field])), field
    assert said["target_modules"] and "classifier" in said["modules_to_save"]
