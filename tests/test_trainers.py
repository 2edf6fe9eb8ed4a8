"""What every trainer has: early stopping, class weights, VeRA over layers of several shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cli import write_recipe

import fedlora as fl
from fedlora.adapters import VeRA
from fedlora.checkpoints import peft as folders
from fedlora.errors import ConfigError
from fedlora.layers import layer_of
from fedlora.model.adapted import Adapted
from fedlora.seeds import rng
from fedlora.training.tasks.classification import Classification
from fedlora.tree import stack


def test_patience_stops_a_run_that_gets_no_better(tmp_path: Path) -> None:
    """With a vanishing learning rate the start is the best round, so `patience` rounds are trained; a resumed run stays stopped."""
    recipe = write_recipe(tmp_path, federation={"rounds": 9}, partition={"validation": 0.2})
    sets = ["federation.patience=3", "train.lr=1e-12"]
    result = fl.run(recipe, sets=sets)
    assert result["rounds"] == 3 and "no round of the last 3 was better" in result["stopped"]
    assert fl.run(recipe, sets=sets) == result
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(x["round"] for x in lines) == 3
    with pytest.raises(ConfigError, match="test rows must not decide"):
        fl.run(recipe, sets=["federation.patience=3", "partition.validation=0"])


def test_class_weights_are_those_of_pytorch() -> None:
    g = torch.Generator().manual_seed(0)
    y, labels, weights = torch.randn(9, 3, generator=g), torch.tensor([0, 1, 2, 0, 0, 1, 0, 0, 2]), (0.5, 2.0, 1.5)
    task = Classification(3, weights)
    ours = task.row_losses(y, labels).sum() / task.row_counts(labels).sum()
    torch.testing.assert_close(ours, torch.nn.CrossEntropyLoss(torch.tensor(weights))(y, labels))


def test_balanced_weights_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    recipe = write_recipe(tmp_path)
    fl.run(recipe, sets=["train.class_weights=balanced", "federation.rounds=1"])
    f = fl.load(tmp_path / "run").federation
    labels = f.data.examples.labels[f.data.splits["train"].rows]
    assert f.task.weights == pytest.approx(compute_class_weight("balanced", classes=np.unique(labels), y=labels))
    with pytest.raises(ConfigError, match="expected 3 weights, of food, sea, sport"):
        fl.run(recipe, sets=["train.class_weights=[1.0, 2.0]"], output=tmp_path / "odd")


def test_vera_over_layers_of_several_shapes_is_pefts(tmp_path: Path) -> None:
    """Query and value of a Llama whose heads share keys: the folder that PEFT loads computes what the model computes."""
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip

    def make() -> torch.nn.Module:
        return tiny.seeded(lambda: transformers.LlamaForCausalLM(config))

    base = make()
    names = [n for n, _ in base.named_modules() if n.endswith(("q_proj", "v_proj", "down_proj"))]
    layers = [layer_of(n, base.get_submodule(n)) for n in names]
    form = VeRA(rank=6)
    drawn = {k: torch.randn(v.shape, generator=rng(str(k))) for k, v in form.init("lora", layers, 0).items()}
    p = drawn | form.fixed("lora", layers, 0)
    ids = torch.arange(3, 13)[None]
    model = Adapted(base, {"target": names, "head": ()})
    ours = model.forward(stack([p]), {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]})[0]
    folders.export(make, (), p, "causal-lm", "base", tmp_path)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()(input_ids=ids).logits
        plain = make().eval()(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - plain).abs().max() > 0.01
