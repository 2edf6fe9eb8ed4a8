"""Labels as words: the likeliest of given texts is the answer, as plain transformers and PEFT score them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import fedlora
from test_generation import recipe
from torch import Tensor

import fedlora as fl
from fedlora.errors import ConfigError

CHOICES = ["salt is", "harbour is", "is"]


def asked(per: str = "choice", **more: Any) -> dict[str, Any]:
    return {"scores": ["accuracy"], "choices": CHOICES, "per": per, **more}


def plainly(folder: Path, run: Any, client: str, question: str, per: str) -> Tensor:
    """log p of every choice, token by token, by transformers and PEFT in float64."""
    import peft
    import transformers

    [adapter] = run.export(folder / "out" / client, [client], round="last")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "m")
    model = peft.PeftModel.from_pretrained(base, adapter).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "m")
    before = [2, *tokenizer(question, add_special_tokens=False)["input_ids"]]  # [CLS] stands before a text
    out = []
    for choice in CHOICES:
        ids = list(before)
        terms = []
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for t in [*tokenizer(choice, add_special_tokens=False)["input_ids"], *end]:
            with torch.no_grad():
                terms.append(model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(0)[t])
            ids.append(t)
        out.append(torch.stack(terms).sum() if per == "choice" else torch.stack(terms).mean())
    return torch.stack(out)


@pytest.mark.parametrize("per", ["choice", pytest.param("token", marks=pytest.mark.slow)])
def test_the_likeliest_choice_is_the_answer(per: str, tmp_path: Path) -> None:
    fl.run(recipe(tmp_path, generation=asked(per, samples=2)))
    run = fl.load(tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    [last] = [x for x in lines if x["kind"] == "eval" and (x["round"], x["view"]) == (2, "personal")]
    rows = [json.loads(x) for x in (tmp_path / "rows.jsonl").read_text().splitlines()]
    f = run.federation
    for k, client in enumerate(f.data.ids):
        every: dict[str, set[str]] = {}
        for row in f.data.splits["test"][k]:
            every.setdefault(rows[row]["q"], set()).add(rows[row]["a"])
        hits = []
        for question in every:
            scores = plainly(tmp_path, run, client, question, per)
            hits.append(CHOICES[int(scores.argmax())] in every[question])
            [said] = run.predict([question], client=client, round="last")
            assert said.answer == CHOICES[int(scores.argmax())]
            assert said.probabilities is not None and said.confidence == max(said.probabilities.values())
            assert torch.allclose(torch.tensor([*said.probabilities.values()]).double(), scores.softmax(0), atol=1e-5)
        assert last["clients"][client]["accuracy"] == pytest.approx(np.mean(hits))
    [samples] = [x for x in lines if x["kind"] == "samples"]
    assert {a for each in samples["answers"].values() for a in each} <= set(CHOICES)
    again = fedlora("evaluate", tmp_path / "run", "-c", "s0", "--json").stdout
    best = json.loads((tmp_path / "run/summary.json").read_text())["chosen_round"]
    [line] = [x for x in lines if x["kind"] == "eval" and (x["round"], x["view"]) == (best, "personal")]
    assert json.loads(again)["accuracy"] == pytest.approx(line["clients"]["s0"]["accuracy"])


def test_class_names_of_a_hub_set_are_words(tmp_path: Path) -> None:
    """A completion of numbers that `datasets` has names for is those names."""
    import datasets

    rows = {"q": [f"the {i}" for i in range(12)], "a": [i % 2 for i in range(12)]}
    features = datasets.Features({"q": datasets.Value("string"), "a": datasets.ClassLabel(names=["salt", "harbour"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    raw = recipe(tmp_path, data={"source": str(tmp_path / "rows.parquet"), "client": None}, generation=asked())
    found = fl.Recipe.from_dict(raw | {"partition": {"clients": 2, "test": 0.5}})
    from fedlora.recipe import build

    data = build.federation(found).data
    assert data.references is not None and {r for rs in data.references.values() for r in rs} == {"salt", "harbour"}


@pytest.mark.parametrize(
    ("generation", "says"),
    [
        ({"scores": ["accuracy"]}, "generation.choices: got None, expected two texts or more for accuracy"),
        ({"scores": [], "choices": CHOICES}, "expected scores beside it; set generation.scores to [accuracy]"),
        (asked(choices=["a", "a"]), "generation.choices: got ['a'], expected each choice once"),
        (asked(choices=["a"]), "generation.choices"),
        (asked(temperature=1.0), "generation.temperature: got 1.0, expected 0 beside generation.choices"),
        (
            {"scores": ["bleu"], "per": "token"},
            "generation.per: got 'token', expected choice without generation.choices",
        ),
    ],
)
def test_what_does_not_fit(generation: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as e:
        fl.Recipe.from_dict(recipe(tmp_path, generation=generation))
    assert says in str(e.value)


def test_a_choice_has_the_tokens_of_a_completion() -> None:
    """Those that the same text has in training, the one that ends a text included."""
    from test_chats import bytewise

    from fedlora.data import encode
    from fedlora.federation import choices

    own = bytewise()
    found = encode.continuations(own, ["good?"], ["yes é"], 40)
    assert found.prompt is not None
    assert choices._tokens(own, "yes é") == found.flat[found.prompt[0] :].tolist()
