"""Requests: what a model is asked is what it read in training, in template, order and cutting."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import command, environment, fedlora, model_folder, write_recipe

import fedlora as fl
from fedlora.data import encode
from fedlora.errors import DataError
from fedlora.recipe import build
from fedlora.serving import requests
from fedlora.training.task import Serving
from fedlora.tree import stack


@pytest.mark.parametrize("template, given, want", [
    ("the {text} is a team", "goal", "the goal is a team"),
    ("the {who} is {text}", {"who": "ship", "text": "salt", "more": "x"}, "the ship is salt"),
])  # fmt: skip
def test_the_template_of_training_is_the_template_of_use(template: str, given: Any, want: str, tmp_path: Path) -> None:
    """What is predicted for a request is what the model says of the row that training would have made of it."""
    fl.run(
        write_recipe(tmp_path, data={"template": template, "text": None if "who" in template else "text"}),
        sets=["federation.rounds=1"],
    )
    run = fl.load(tmp_path / "run")
    [said] = run.predict([given])
    serving = Serving(
        run.federation.model, stack([run.deltas()]), build.tokenizer_of(run.recipe), ("food", "sea", "sport"), 16
    )
    [plain], [bare] = (
        run.federation.task.answer(serving, [t]) for t in (want, given if isinstance(given, str) else given["text"])
    )
    assert (said.answer, said.confidence) == (plain.answer, plain.confidence) != (bare.answer, bare.confidence)
    assert said.text == (given if isinstance(given, str) else " | ".join(given.values()))


def test_a_request_that_does_not_fit_the_template_is_refused(tmp_path: Path) -> None:
    fl.run(write_recipe(tmp_path, data={"template": "{who}: {text}", "text": None}), sets=["federation.rounds=1"])
    run = fl.load(tmp_path / "run")
    with pytest.raises(DataError, match=r"request 1 is one text, expected a row with the columns who, text"):
        run.predict(["goal"])
    with pytest.raises(
        DataError, match=r"request 2 has no text 'who', expected the columns who, text; did you mean 'whoo'"
    ):
        run.predict([{"who": "a", "text": "b"}, {"whoo": "a", "text": "b"}])
    said = fedlora("predict", tmp_path / "run", "goal", code=1)
    assert "request 1 is 'goal', expected a JSON object" in said.stderr
    assert fedlora("predict", tmp_path / "run", '{"who": "ship", "text": "salt"}').stdout.strip()


@pytest.mark.parametrize("prompt", ["the goal is a", "", "the goal " * 40])
def test_a_continuation_follows_the_tokens_of_training(prompt: str, tmp_path: Path) -> None:
    """Of a prompt in its template, with no token after it, and with its beginning cut where the model's positions end."""
    base = model_folder(tmp_path / "m", causal=True)
    rows = [{"q": "the goal", "a": "a team", "who": f"s{i % 2}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    recipe = {
        "name": "small", "model": {"name": str(base), "task": "causal-lm", "device": "cpu"}, "method": {"name": "homlora", "rank": 2},
        "data": {"source": str(tmp_path / "rows.jsonl"), "prompt": "q", "completion": "a", "template": "is {prompt}", "client": "who", "max_length": 16},
        "federation": {"rounds": 1}, "train": {"steps": 1, "batch_size": 4}, "run": {"output": str(tmp_path / "run")},
    }  # fmt: skip
    fl.run(recipe)
    run = fl.load(tmp_path / "run")
    model, tokenizer = run.federation.model, build.tokenizer_of(run.recipe)
    model.base.config.max_position_embeddings = 40
    before, after = encode.specials(tokenizer)
    assert before and after  # BERT's template: a token behind the prompt would end it
    ids = [*before, *tokenizer(f"is {prompt}", add_special_tokens=False)["input_ids"]]
    if long := len(ids) > 35:
        ids = [*before, *ids[len(ids) - 35 + len(before) :]]
    with model.serving(stack([run.deltas()])), torch.inference_mode():
        want = model.base.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
        )
    with (
        pytest.warns(UserWarning, match=r"1 of 1 prompts are longer than 35 tokens")
        if long
        else contextlib.nullcontext()
    ):
        [said] = run.predict([prompt], new_tokens=5)
    assert said.answer == tokenizer.decode(want[0, len(ids) :], skip_special_tokens=True).strip()
    with pytest.raises(DataError, match=r"got 40 new tokens, expected fewer than 40"):
        run.predict(["goal"], new_tokens=40)


# files, standard input and probabilities ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    fedlora("run", write_recipe(folder), "--quiet", "--set", "federation.rounds=1")
    return folder / "run"


def asked(*arguments: object, stdin: str = "") -> list[dict[str, Any]]:
    """The JSON lines of `fedlora predict`, which reads `stdin`."""
    done = subprocess.run(
        command("predict", *arguments, "--json"),
        input=stdin,
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(x) for x in done.stdout.splitlines()]


def test_predict_reads_files_and_standard_input_alike(small: Path, tmp_path: Path) -> None:
    """The same texts as a workbook's CSV, as JSON lines, as plain lines and on standard input have the same answers."""
    texts = ["goal match", "the wave ship", "bread; soup"]
    table = tmp_path / "rows.csv"
    table.write_text('id;text\n1;goal match\n2;the wave ship\n3;"bread; soup"\n', encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": t, "more": 1}) + "\n" for t in texts), encoding="utf-8")
    want = asked(small, *texts)
    assert [x["text"] for x in want] == texts
    for said in (asked(small, "-f", table), asked(small, "-f", rows), asked(small, stdin="\n".join([*texts, ""]))):
        assert said == want
    assert asked(small, texts[0], "-f", "-", stdin=f"{texts[1]}\n\n{texts[2]}") == want
    for x in want:
        assert set(x["probabilities"]) == {"sport", "food", "sea"}
        assert sum(x["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert max(x["probabilities"], key=x["probabilities"].__getitem__) == x["answer"]
        assert max(x["probabilities"].values()) == pytest.approx(x["confidence"])


def test_what_is_missing_is_said_before_a_model_is_loaded(small: Path, tmp_path: Path) -> None:
    """The base's folder is gone, and the errors are still those of the request."""
    hidden = small.parent / "model"
    away = hidden.rename(tmp_path / "away")
    try:
        table = tmp_path / "rows.csv"
        table.write_text("tekst\nx\n", encoding="utf-8")
        assert "no column 'text'" in fedlora("predict", small, "-f", table, code=1).stderr
        assert "did you mean 'c1'" in fedlora("predict", small, "goal", "-c", "c11", code=1).stderr
        none = fedlora("predict", small, "-f", tmp_path / "no.txt", code=1).stderr
        assert f"predict: {tmp_path}/no.txt does not exist" in none
        bad = tmp_path / "bad.txt"
        bad.write_bytes(b"caf\xe9\n")
        assert "is not utf-8 (byte 0xe9 at offset 3)" in fedlora("predict", small, "-f", bad, code=1).stderr
    finally:
        away.rename(hidden)


@pytest.mark.parametrize("data, want", [
    ({"text": ["a", "b"]}, [("x", "1"), ("y", "2")]),
    ({"text": "b"}, ["1", "2"]),
    ({"text": None, "template": "{b} of {a}"}, [{"b": "1", "a": "x"}, {"b": "2", "a": "y"}]),
    ({"text": "a", "template": "say {text}"}, [{"a": "x"}, {"a": "y"}]),
    ({"prompt": "b", "completion": "a"}, ["1", "2"]),
])  # fmt: skip
def test_rows_of_a_file_are_read_by_the_columns_of_training(
    data: dict[str, Any], want: list[Any], tmp_path: Path
) -> None:
    """Pairs, templates and prompts, from columns in another order; each request then fits the recipe."""
    table = tmp_path / "rows.csv"
    table.write_text("c,b,a\nno,1,x\nno,2,y\n", encoding="utf-8")
    found = requests.of_file(table, data)
    assert found == want
    requests.check(found, data)


def test_words_of_a_file_are_read_as_lists(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"words": ["a", "b"]}\n{"words": ["c"]}\n', encoding="utf-8")
    assert requests.of_file(rows, {"text": "words"}) == [["a", "b"], ["c"]]


def test_lines_of_pairs_hold_both_texts() -> None:
    assert requests.of_lines(["a ||| b"], {"text": ["x", "y"]}) == [("a", "b")]
    with pytest.raises(DataError, match=r"put ' \|\|\| ' between"):
        requests.of_lines(["a"], {"text": ["x", "y"]})
