"""Every method on real weights, as its shipped recipe says, shortened: it runs, resumes bit-exactly, and leaves as PEFT.

MiniLM on SST-2 and a tiny Llama on the standard library's documentation. `make test` runs the last of each sweep
(test_recipes_shipped.py); all of them are `make slow`.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import local
import numpy as np
import pytest
import torch
from test_export import refusals

import fedlora as fl
from fedlora.checkpoints.pretrained import locate
from fedlora.errors import ModelError
from fedlora.federation.callbacks import Callback
from fedlora.recipe import Recipe, expand
from fedlora.recipe.build import federation
from fedlora.recipe.reading import read
from fedlora.recipe.shipped import FOLDER
from fedlora.tree import stack

# Shipped recipes cut long texts to keep runs short, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:data.max_length")

SHORT = [
    "model.dtype=fp32",
    "federation.rounds=3",
    "train.steps=1",
    "train.batch_size=4",
    "evaluation.every=3",
    "data.limit=400",
]
MODELS = {"minilm": "every-method.yaml", "llama": "every-method-llama.yaml"}
RUNS = {f"{m}:{r.name}": (m, i) for m, file in MODELS.items() for i, r in enumerate(expand(FOLDER / file))}


def recipe_of(which: tuple[str, int], shared: Path) -> Recipe:
    model, i = which
    file = FOLDER / MODELS[model]
    where = expand(file, [*SHORT, "partition.min_size=2", *local.overrides(read(file), shared, shared)])[i].resolved()
    if where["method"]["name"] == "slora":
        where["method"]["sparse_rounds"] = 1
    return Recipe.from_dict(where)


class Crash(Callback):
    def round_start(self, round: int, clients: int) -> None:
        if round == 3:
            raise KeyboardInterrupt


def files(folder: Path) -> dict[str, bytes]:
    """All that a run leaves behind and that must not differ."""
    kept = [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".jsonl") and p.name != "timings.jsonl"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


@pytest.mark.slow
@pytest.mark.parametrize("which", RUNS.values(), ids=RUNS)
def test_a_method_as_shipped(which: tuple[str, int], shared: Path, tmp_path: Path) -> None:
    recipe = recipe_of(which, shared)
    summary = fl.run(recipe, output=tmp_path / "whole")
    assert summary["rounds"] == 3
    with pytest.raises(KeyboardInterrupt):
        federation(recipe, tmp_path / "broken").run(Crash())
    fl.run(recipe, output=tmp_path / "broken")
    whole = files(tmp_path / "whole")
    assert whole == files(tmp_path / "broken")
    assert any("server" in name for name in whole)
    assert any(name == "metrics.jsonl" for name in whole)

    run = fl.load(tmp_path / "whole")
    f = run.federation
    client = None if f.method.pooled else f.data.ids[0]
    batch = f.data.examples.collate(np.arange(4))
    with torch.no_grad():
        inputs = {n: v[None] for n, v in batch.items()}
        want = f.model.forward(stack([run.deltas(client)]), inputs)[0]
        assert float((want - f.model.forward({}, inputs)[0]).abs().max()) > 1e-4
    no_merge, no_factors = refusals(run.deltas(client))
    for merged in (False, True):
        if why := no_merge if merged else no_factors:
            with pytest.raises(ModelError, match=re.escape(why)):
                run.export(tmp_path / "none", [client] if client else [], merged)
            continue
        [folder] = run.export(tmp_path / f"export-{merged}", [client] if client else [], merged)
        got = plain(folder, recipe, merged, len(f.data.label_names))(
            **{n: v for n, v in batch.items() if n not in ("labels", "chars")}
        ).logits
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def plain(folder: Path, recipe: Recipe, merged: bool, labels: int) -> Any:
    """The folder as PEFT or transformers loads it, ready to be called. labels: classes of a classifier."""
    import peft
    import transformers

    kind = "CausalLM" if recipe.model.task == "causal-lm" else "SequenceClassification"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "classifier weights are newly initialized": the folder holds them
        if merged:
            model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder)
        else:  # the folder names the base by its hub id; here it is loaded from the copy at hand
            head = {} if kind == "CausalLM" else {"num_labels": labels}
            base = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(locate(recipe.model.name), **head)
            model = peft.PeftModel.from_pretrained(base, folder)
    return torch.no_grad()(model.eval().forward)
