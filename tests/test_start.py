"""Runs that start from an adapter: the first model is the adapter's, as plain PEFT computes it; what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import fedlora, write_recipe

import fedlora as fl
from fedlora.checkpoints.peft import default_targets
from fedlora.data import encode
from fedlora.data.load import joined
from fedlora.errors import ConfigError, StateError
from fedlora.federation.callbacks import Callback
from fedlora.federation.views import whole
from fedlora.recipe import Recipe, build
from fedlora.training.task import Serving
from fedlora.tree import stack

TEXTS = ["the goal is a team", "salt wave", "bread the soup a cook is apple"]


def adapter(folder: Path, rank: int = 4, alpha: int = 6, **more: Any) -> Path:
    """A PEFT adapter of the small BERT, with every number drawn; and its head."""
    import peft
    import transformers

    write_recipe(folder)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=default_targets("bert"),
        task_type="SEQ_CLS",
        modules_to_save=["classifier"],
        **more,
    )
    model = peft.get_peft_model(base, config)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


def logits(folder: Path) -> torch.Tensor:
    """What plain PEFT says."""
    import peft
    import transformers

    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    with torch.no_grad():
        return torch.cat([model(**tokenizer(t, return_tensors="pt")).logits for t in TEXTS])


METHODS = ["homlora", "fedsa", "ffa", "local", "pf2lora", "hetlora", "fedprox", "fedavg-ft"]


@pytest.mark.parametrize(
    "method, more",
    [
        *((m, {}) for m in METHODS),
        ("ffa", {"use_rslora": True}),
        ("homlora", {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 5}}),
    ],
)
def test_the_first_global_model_is_the_adapter(method: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Before a round is trained, and its head with it."""
    path = adapter(tmp_path, **more)
    sets = [f"model.adapter={path}", f"method.name={method}", "method.rank=4", "federation.rounds=1", "train.lr=1e-12"]
    if "rank_pattern" in more:
        sets.append("method.rank_pattern={query: 2}")
    recipe = Recipe.load(write_recipe(tmp_path), sets=sets)
    f = build.federation(recipe, tmp_path / "run")
    server = f.method.init(f.context)
    f.store.root.mkdir()
    params = whole(f, f.engine(Callback()), server)
    serving = Serving(f.model, stack([params]), build.tokenizer_of(recipe), (), 16)

    rows = joined([encode.texts(serving.tokenizer, TEXTS, None, 16)], labels=np.zeros(3))
    got = torch.stack([y for y, _ in serving.outputs(rows)])
    torch.testing.assert_close(got, logits(tmp_path), rtol=1e-4, atol=1e-4)


def test_a_run_goes_on_from_an_export(tmp_path: Path) -> None:
    """Round 0 of the second run has the scores of the last round of the first; resuming looks at the adapter again."""
    first = write_recipe(tmp_path / "a", method={"name": "homlora", "rank": 4}, federation={"rounds": 3})
    fl.run(first)
    [out] = fl.load(tmp_path / "a/run").export(tmp_path / "out", round="last")
    sets = [f"model.adapter={out}", "federation.rounds=1", f"run.output={tmp_path / 'b'}"]
    fl.run(first, sets=sets)
    scores = [
        next(
            x["mean"]
            for x in map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
            if x["kind"] == "eval" and (x["round"], x["view"], x["split"]) == (round, "global", "test")
        )
        for folder, round in (("a/run", 3), ("b", 0))
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


@pytest.mark.parametrize("spoil, sets, said", [
    (None, ["method.rank=8"], "its rank at .* is 4, the method's 8; set method.rank to 4"),
    (None, ["model.targets=[query]"], "has factors for .*value.* expected the 2 layers of model.targets"),
    (None, ["model.targets=[query, value, key]"], "has no factors for .*key"),
    (None, ["method.name=homlora", "method.adapter=dora"], "this delta form does not"),
    (None, ["method.name=slora"], "SLoRA with this delta form does not"),
    ({"use_dora": True}, [], "is a DoRA adapter, expected LoRA"),
    ({"peft_type": "IA3"}, [], "is a IA3 adapter, expected LoRA"),
    ("no config", [], "has no adapter_config.json"),
    ("nothing", [], "is no folder"),
    ("a pickle", [], "has no adapter_model.safetensors"),
    ("another base", [], "factors of a 16 x 24 weight .* it is an adapter of another base"),
])  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(spoil: Any, sets: list[str], said: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter(tmp_path)
    config, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    if isinstance(spoil, dict):
        config.write_text(json.dumps(json.loads(config.read_text()) | spoil))
    elif spoil == "no config":
        config.unlink()
    elif spoil == "nothing":
        shutil.rmtree(path)
    elif spoil == "a pickle":
        weights.rename(path / "adapter_model.bin")
    elif spoil == "another base":
        wide = {k: torch.zeros(4, 24) if "lora_A" in k else v for k, v in load_file(weights).items()}
        save_file(wide, weights)
    with pytest.raises(ConfigError, match=f"(?s)model.*{said}"):
        fl.run(write_recipe(tmp_path), sets=["method.name=homlora", "method.rank=4", *sets, f"model.adapter={path}"])


def test_an_adapter_that_was_made_for_another_name_is_said(tmp_path: Path) -> None:
    path = adapter(tmp_path)
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "bert-large"}))
    with pytest.warns(UserWarning, match="was made for 'bert-large'"):
        fl.run(
            write_recipe(tmp_path),
            sets=["method.name=homlora", "method.rank=4", "federation.rounds=1", f"model.adapter={path}"],
        )


# a finished run -----------------------------------------------------------------------------------------------------------
def scores(folder: Path, round: int, view: str = "personal") -> dict[str, Any]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return next(
        x["clients"]
        for x in lines
        if x["kind"] == "eval" and (x["round"], x["view"], x["split"]) == (round, view, "test")
    )


@pytest.mark.parametrize("method", ["fedsa", "local", "pf2lora", "hetlora"])
def test_a_run_goes_on_from_a_finished_one(method: str, tmp_path: Path) -> None:
    """Every client begins with its own model of the first run, and trains it on; a crash changes nothing."""
    first = write_recipe(
        tmp_path, method={"name": method, "rank": 4}, federation={"rounds": 2}, evaluation={"every": 1}
    )
    fl.run(first)
    best = json.loads((tmp_path / "run/summary.json").read_text())["chosen_round"]
    sets = [f"federation.start={tmp_path / 'run'}", "federation.rounds=2"]
    fl.run(first, sets=sets, output=tmp_path / "more")
    assert scores(tmp_path / "more", 0) == scores(tmp_path / "run", best)
    assert scores(tmp_path / "more", 2) != scores(tmp_path / "more", 0)


def test_the_command_goes_on_with_more_rounds(tmp_path: Path) -> None:
    """Without a recipe it takes the run's own; a larger number of rounds alone says what to do."""
    first = write_recipe(tmp_path, federation={"rounds": 1})
    fl.run(first)
    with pytest.raises(StateError, match="To go on with more rounds: fedlora run RECIPE --from"):
        fl.run(first, sets=["federation.rounds=3"])
    fedlora("run", "--from", tmp_path / "run", "--set", "federation.rounds=2", "-o", tmp_path / "more", "-q")
    assert scores(tmp_path / "more", 0) == scores(
        tmp_path / "run", json.loads((tmp_path / "run/summary.json").read_text())["chosen_round"]
    )
    said = fedlora("run", "--from", tmp_path / "run", "--set", "method.rank=5", "-o", tmp_path / "odd", code=2).stderr
    assert "expected a run of the same method, rank, targets and head" in " ".join(said.split())
    assert "give a recipe" in fedlora("run", code=2).stderr
