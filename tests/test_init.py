"""`fedlora init`: a recipe for a file, which loads and checks; columns as a person would name them.

Kills: a recipe that does not load, a guess that takes a site for the label, a file that is overwritten, a copy that is another recipe.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from cli import fedlora, model_folder, rows, write_csv

from fedlora.cli import begin
from fedlora.errors import ConfigError
from fedlora.recipe import Recipe, expand
from fedlora.recipe.shipped import FOLDER, MARK
from fedlora.recipe.start import look, recipe_text


def table(path: Path, header: list[str], data: list[list[Any]]) -> str:
    """A CSV, or JSON lines where values are lists."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(dict(zip(header, r, strict=True))) for r in data), encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([header, *data])
    return str(path)


TEXT = "a sentence of some words that is long enough"
FILES: dict[str, tuple[str, list[str], Any, dict[str, Any]]] = {
    "classes": ("a.csv", ["id", "when", "note", "label", "site"], lambda i: [f"r{i}", f"2024-01-{i % 28 + 1:02d}", f"{TEXT} {i}", "ab"[i % 2], "xyz"[i % 3]],
                {"task": "classification", "text": "note", "label": "label", "client": "site"}),
    "odd names": ("a.csv", ["Befund", "Klasse"], lambda i: [f"{TEXT} {i}", ["gut", "schlecht"][i % 2]],
                  {"task": "classification", "text": "Befund", "label": "Klasse", "client": None}),
    "numbers": ("a.csv", ["review", "score"], lambda i: [f"{TEXT} {i}", i / 7], {"task": "regression", "text": "review", "label": "score"}),
    "pairs": ("a.csv", ["premise", "hypothesis", "label"], lambda i: [f"{TEXT} {i}", f"{TEXT} {-i}", i % 3],
              {"task": "classification", "text": ("premise", "hypothesis"), "label": "label"}),
    "prompts": ("a.csv", ["question", "answer"], lambda i: [f"{TEXT} {i}?", f"{TEXT} {i}"],
                {"task": "causal-lm", "prompt": "question", "completion": "answer", "text": None}),
    "instructions": ("a.jsonl", ["instruction", "input", "output"], lambda i: [f"{TEXT} {i}", f"{i}", f"{TEXT} {i}"],
                     {"task": "causal-lm", "prompt": ("instruction", "input"), "completion": "output"}),
    "chats": ("a.jsonl", ["messages", "who"], lambda i: [[{"role": "user", "content": TEXT}, {"role": "assistant", "content": "x"}], "ab"[i % 2]],
              {"task": "causal-lm", "messages": "messages", "text": None, "completion": None}),
    "tags": ("a.jsonl", ["tokens", "ner_tags"], lambda i: [["a", "b"], ["O", "PER"]], {"task": "token-classification", "text": "tokens", "label": "ner_tags"}),
    "labels": ("a.jsonl", ["text", "labels"], lambda i: [f"{TEXT} {i}", ["x", "y"][: i % 3]], {"task": "multi-label", "text": "text", "label": "labels"}),
    "plain": ("a.jsonl", ["text"], lambda i: [f"{TEXT} {i}"], {"task": "causal-lm", "text": "text", "label": None}),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_columns_are_found_and_the_recipe_loads(case: str, tmp_path: Path) -> None:
    name, header, row, wanted = FILES[case]
    found = look(table(tmp_path / name, header, [row(i) for i in range(60)]))
    assert {k: getattr(found.guess, k) for k in wanted} == wanted
    path = tmp_path / "r.yaml"
    path.write_text(recipe_text(found, "mine"), encoding="utf-8")
    recipe = Recipe.load(path)
    data = recipe.data
    fields = ("text", "label", "prompt", "completion", "messages", "client")
    assert [getattr(data, k) for k in fields] == [getattr(found.guess, k) for k in fields]
    assert recipe.model.task == wanted["task"]


def test_the_command_writes_what_check_then_takes(tmp_path: Path) -> None:
    write_csv(tmp_path / "my notes.csv", rows(120))
    model_folder(tmp_path / "model")
    said = fedlora("init", "my notes.csv", "--model", "model", "--client", "who", cwd=tmp_path).stdout
    assert "my-notes.yaml" in said and "label 'label'" in said and "client 'who'" in said
    lines = (tmp_path / "my-notes.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(MARK) and sum("#" in x for x in lines) > 5
    facts = json.loads(fedlora("check", "my-notes.yaml", "--json", "--no-measure", cwd=tmp_path).stdout)
    assert facts["clients"] == 4 and facts["label_names"] == ["food", "sea", "sport"]
    again = fedlora("init", "my notes.csv", cwd=tmp_path, code=2)
    assert "expected a file that is not there yet" in again.stderr


def test_names_that_are_given_win(tmp_path: Path) -> None:
    path = table(
        tmp_path / "a.csv", ["a", "b", "label"], [[f"{TEXT} {i}", "uv"[i % 2], "xy"[i % 2]] for i in range(40)]
    )
    g = look(path, {"label": "b"}).guess
    assert (g.task, g.text, g.label) == ("classification", "a", "b")
    g = look(path, {"prompt": "a", "completion": "label"}).guess
    assert (g.task, g.text, g.label, g.prompt, g.completion) == ("causal-lm", None, None, "a", "label")
    with pytest.raises(ConfigError, match=r"--label: got 'lable', expected a column of the data; did you mean 'label'"):
        look(path, {"label": "lable"})
    with pytest.raises(
        ConfigError, match=r"--task: got 'clasification', expected one of .* did you mean 'classification'"
    ):
        look(path, {"task": "clasification"})
    with pytest.raises(ConfigError, match=r"expected a column of texts among n \(whole\); name it with --text"):
        look(table(tmp_path / "b.csv", ["n"], [[i] for i in range(30)]))


def test_a_person_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal; the guess is what an empty answer means."""
    write_csv(tmp_path / "a.csv", rows(60))
    asked: list[tuple[str, Any]] = []

    def prompt(text: str, default: str, **more: Any) -> str:
        asked.append((text, default))
        return "who" if "clients" in text else default

    monkeypatch.setattr("click.prompt", prompt)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    nothing = dict.fromkeys(("text", "label", "prompt", "completion", "client", "task"))
    begin.init(str(tmp_path / "a.csv"), None, nothing, None, tmp_path / "a.yaml", True)
    assert [d for _, d in asked] == ["text", "label", "none"]
    assert Recipe.load(tmp_path / "a.yaml").data.client == "who"


def test_from_a_recipe(tmp_path: Path) -> None:
    fedlora("init", "--from", "recipes/sst2.yaml", cwd=tmp_path)
    assert Recipe.load(tmp_path / "sst2.yaml") == Recipe.load(FOLDER / "sst2.yaml")
    write_csv(tmp_path / "a.csv", rows(60))
    fedlora("init", "a.csv", "--from", "pf2lora-sst2", "-o", "b.yaml", cwd=tmp_path)
    mine, theirs = expand(tmp_path / "b.yaml"), expand(FOLDER / "papers/pf2lora-sst2.yaml")
    assert [r.method_object() for r in mine] == [r.method_object() for r in theirs]
    assert mine[0].data.text == "text" and mine[0].train == theirs[0].train
    assert "did you mean 'sst2'" in fedlora("init", "--from", "ss2", cwd=tmp_path, code=2).stderr
    assert "fedlora init data.csv" in fedlora("init", cwd=tmp_path, code=2).stderr
