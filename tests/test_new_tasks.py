"""Tasks beyond one class a text, from a recipe to transformers' pipeline; losses and scores against literal formulas,
seqeval and scikit-learn.

Kills: words aligned with the wrong tokens; cut words forgotten in scores; counts of one client in the next; label vectors
cut like tokens.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from cli import fedlora, model_folder
from test_task_contract import setting

import fedlora as fl
from fedlora.data.encode import spaced, words
from fedlora.data.examples import Words
from fedlora.data.load import tagged
from fedlora.seeds import np_rng
from fedlora.training.batching import stack_batches
from fedlora.training.metrics import Predictions
from fedlora.training.tasks import TASKS

SHOWN = {
    "token-classification": ("the bread soup ball", "O B-FOOD I-FOOD O"),
    "multi-label": ("bread soup bread soup bread soup", "food"),  # it may say more: the model is very small
}
TAGS = ("B-FOOD", "B-SEA", "I-FOOD", "I-SEA", "O")
PLACE = {"ball": "O", "goal": "O", "bread": "B-FOOD", "soup": "I-FOOD", "wave": "B-SEA", "ship": "I-SEA", "the": "O"}


def write_rows(path: Path, task: str, n: int = 160) -> Path:
    """Rows whose tags, or labels, show in their words."""
    g = np_rng("new tasks", task)
    lines = []
    for i in range(n):
        held = g.random(2) < 0.4  # which topics the row is about
        can = [w for w, t in PLACE.items() if t == "O" or held[int(t.endswith("SEA"))]]
        said = [str(w) for w in g.choice(can, int(g.integers(3, 9)))]
        site = f"s{i % 4}"
        if task == "token-classification":
            lines.append({"words": said, "tags": [PLACE[w] for w in said], "site": site})
        else:
            labels = sorted({PLACE[w][2:].lower() for w in said if PLACE[w] != "O"})
            lines.append({"words": " ".join(said), "tags": labels, "site": site})
    path.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
    return path


def write_recipe(folder: Path, task: str, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model_folder(folder / "model", bare=True)
    write_rows(folder / "rows.jsonl", task)
    raw = {
        "name": "new", "model": {"name": str(folder / "model"), "task": task, "device": "cpu"},
        "data": {"source": str(folder / "rows.jsonl"), "text": "words", "label": "tags", "client": "site", "max_length": 16},
        "method": {"name": "homlora", "rank": 4, "alpha": 8}, "train": {"steps": 24, "batch_size": 8, "lr": 0.02},
        "federation": {"rounds": 6}, "run": {"output": str(folder / "run"), "threads": 1},
    }  # fmt: skip
    for name, fields in more.items():
        raw[name] = {**raw.get(name, {}), **fields}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["token-classification", "multi-label"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(task, folder) of a recipe that was run."""
    folder = tmp_path_factory.mktemp(request.param)
    fl.run(write_recipe(folder, request.param))
    return request.param, folder


def test_it_learns_in_blocks(trained: tuple[str, Path]) -> None:
    task, folder = trained
    s = json.loads((folder / "run/summary.json").read_text(encoding="utf-8"))
    assert s["metric"] == TASKS[task].metric
    assert s["test"] > 0.7
    lines = [json.loads(x) for x in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first = next(x for x in lines if x["kind"] == "eval")
    assert first["mean"][s["metric"]] < s["test"] - 0.1


def test_predict(trained: tuple[str, Path]) -> None:
    task, folder = trained
    text, want = SHOWN[task]
    for client in ((), ("--client", "s1")):
        done = fedlora("predict", folder / "run", text, "--json", *client)
        assert json.loads(done.stdout.splitlines()[-1])["answer"].startswith(want)
    run = fl.load(folder / "run")
    plain, said = run.predict(["ball goal", text])
    assert plain.answer == ("O O" if task == "token-classification" else "")
    assert said.answer.startswith(want)
    if task == "token-classification":
        [said] = run.predict([["the", "bread"] * 12])  # longer than max_length
        assert said.answer.split()[-1] == "O" and len(said.answer.split()) == 24


def test_exports_are_what_others_load(trained: tuple[str, Path], tmp_path: Path) -> None:
    """The PEFT folder by PEFT around transformers' class, the merged folder by transformers' pipeline."""
    import transformers
    from peft import PeftConfig, PeftModel

    task, folder = trained
    run = fl.load(folder / "run")
    names = list(TAGS) if task == "token-classification" else ["food", "sea"]
    [plain] = run.export(tmp_path / "peft", ["s2"])
    kept = PeftConfig.from_pretrained(plain)
    assert kept.task_type == ("TOKEN_CLS" if task == "token-classification" else "SEQ_CLS")
    [merged] = run.export(tmp_path / "merged", ["s2"], merged=True)
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    assert [config["id2label"][str(i)] for i in range(len(names))] == names
    assert config["label2id"] == {n: i for i, n in enumerate(names)}
    text = SHOWN[task][0]
    if task == "token-classification":
        pipe = transformers.pipeline("token-classification", str(merged))
        assert {x["word"]: x["entity"] for x in pipe(text) if x["entity"] != "O"} == {
            "bread": "B-FOOD",
            "soup": "I-FOOD",
        }
        base = transformers.AutoModelForTokenClassification.from_pretrained(
            folder / "model", num_labels=len(names), ignore_mismatched_sizes=True
        )
    else:
        assert config["problem_type"] == "multi_label_classification"
        pipe = transformers.pipeline("text-classification", str(merged), top_k=None)
        scores = [{x["label"]: x["score"] for x in one} for one in pipe([text, "ball goal"])]
        said = [s.answer for s in run.predict([text, "ball goal"], client="s2")]
        assert [", ".join(n for n in names if one[n] > 0.5) for one in scores] == said
        assert said[0] and said[0] != said[1]
        assert sum(scores[1].values()) < 0.9  # sigmoids, no softmax
        base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=len(names),
                                                                               ignore_mismatched_sizes=True)  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    batch = tokenizer(text, return_tensors="pt")
    whole = type(base).from_pretrained(merged)
    with torch.no_grad():
        torch.testing.assert_close(
            PeftModel.from_pretrained(base, plain).eval()(**batch).logits,
            whole.eval()(**batch).logits,
            rtol=1e-3,
            atol=1e-4,
        )


# losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["token-classification", "multi-label"])
def test_the_loss_is_the_formula(task: str, tmp_path: Path) -> None:
    """Of a block of ragged clients, in pieces, against one row at a time through transformers and sums in float64."""
    f = setting(task, tmp_path)
    rows = [f.data.splits["train"][k][: 3 + k] for k in range(4)]
    block = stack_batches([f.data.examples.collate(r) for r in rows])
    leaves = {k: torch.stack([v] * 4) for k, v in f.method.init(f.context).params.items()}  # they start at the base
    value, _ = f.loss.gradient(lambda q: q, leaves, block)
    base = f.model.base
    for h in f.model.hooks:
        h.remove()
    for k in range(4):
        total, terms = 0.0, 0
        for r in rows[k]:
            batch = f.data.examples.collate(np.array([r]))
            labels = batch.pop("labels")[0]
            with torch.no_grad():
                y = base(**batch).logits[0].double()
            if task == "multi-label":
                p = 1 / (1 + torch.exp(-y))
                total += float(-(labels * torch.log(p) + (1 - labels) * torch.log(1 - p)).mean())
                terms += 1
                continue
            for t in range(len(labels)):
                if labels[t] != -100:
                    total -= float(torch.log(torch.exp(y[t, labels[t]]) / torch.exp(y[t]).sum()))
                    terms += 1
        assert float(value[k]) == pytest.approx(total / terms, rel=1e-5)


# scores ---------------------------------------------------------------------------------------------------------------

SCHEMES = {
    "iob2": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
    "io": ["O", "PER", "LOC", "MISC"],
    "iobes": ["O", "B-X", "I-X", "E-X", "S-X", "B-Y", "I-Y", "E-Y", "S-Y"],
    "odd": ["O", "B", "I", "ORG", "B-A-B", "I-A-C", ".", "P"],
}


def spoken(seed: int, tags: list[str], cut: bool = False) -> tuple[Predictions, list[list[str]], list[list[str]]]:
    """(predictions of a client, its rows' true tags, and those that are said). cut: some words have no token."""
    g = np_rng("spoken", seed, *tags)
    n = int(g.integers(1, 8))
    true = [g.integers(0, len(tags), int(g.integers(1, 10))) for _ in range(n)]
    said = [np.where(g.random(len(t)) < 0.6, t, g.integers(0, len(tags), len(t))) for t in true]
    seen = [(g.random(len(t)) < 0.7) if cut else np.ones(len(t), bool) for t in true]
    labels, values = np.full((n, 12), -100), np.full((n, 12), -100)
    for i in range(n):
        at = np.sort(g.choice(12, int(seen[i].sum()), replace=False))
        labels[i, at], values[i, at] = true[i][seen[i]], said[i][seen[i]]
    every = Words(np.concatenate(true), np.concatenate([[0], np.cumsum([len(t) for t in true])]), np.concatenate(seen))
    p = Predictions(np.ones(n), np.ones(n), values, labels, None, every)
    name = lambda row: [tags[j] for j in row]  # noqa: E731
    heard = [
        [tags[j] if there else "O" for j, there in zip(s, m, strict=True)] for s, m in zip(said, seen, strict=True)
    ]
    return p, [name(t) for t in true], heard


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_entities_are_seqevals(scheme: str, cut: bool) -> None:
    """Thirty clients at once against seqeval one at a time; words that were cut are said to be outside."""
    seqeval = pytest.importorskip("seqeval.metrics", reason="needs seqeval, which the extra dev installs")
    tags = SCHEMES[scheme]
    clients = [spoken(i, tags, cut) for i in range(30)]
    found = TASKS["token-classification"].of(tags, {}).scores([p for p, _, _ in clients])
    some = 0.0
    for (_, true, said), s in zip(clients, found, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tags that are no IOB, and clients without entities
            want = {n: getattr(seqeval, f"{n}_score")(true, said) for n in ("f1", "precision", "recall")}
        assert {n: s[n] for n in want} == pytest.approx(want)
        some += want["f1"]
    assert some > 1


@pytest.mark.parametrize("classes", [2, 7])
def test_classes_are_scikit_learns(classes: int) -> None:
    from sklearn import metrics as sk

    g = np_rng("classes", classes)
    clients = []
    for i in range(40):
        n = int(g.integers(1, 30))
        true = g.integers(0, 1 if i == 0 else classes, n)
        said = np.where(g.random(n) < 0.5, true, g.integers(0, classes, n)) if i else true
        clients.append(Predictions(np.ones(n), np.ones(n), said, true))
    clients.insert(3, Predictions(*(np.zeros(0),) * 4))
    found = TASKS["classification"].of(["x"] * classes, {}).scores(clients)
    assert found[3]["n"] == 0 and "accuracy" not in found[3]
    for p, s in zip(clients, found, strict=True):
        if s["n"]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                want = {"accuracy": sk.accuracy_score(p.labels, p.values),
                        "macro_f1": sk.f1_score(p.labels, p.values, average="macro", zero_division=0.0),
                        "matthews": sk.matthews_corrcoef(p.labels, p.values)}  # fmt: skip
            assert {n: s[n] for n in want} == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_labels_are_scikit_learns(threshold: float) -> None:
    from sklearn import metrics as sk

    goal = fl.MultiLabel(4, threshold)
    clients, outputs = [], []
    for i in range(20):
        g = np_rng("labels", i)
        n = int(g.integers(1, 9))
        true = (g.random((n, 4)) < 0.4 * (i > 0)).astype(np.float32)
        outputs.append(torch.from_numpy(g.normal(size=(n, 4))))
        said = goal.answers(outputs[-1], torch.from_numpy(true)).numpy()
        clients.append(Predictions(np.ones(n), np.ones(n), said, true))
    for p, y, s in zip(clients, outputs, goal.scores(clients), strict=True):
        said = (1 / (1 + np.exp(-y.numpy())) > threshold).astype(int)
        want = {"micro_f1": sk.f1_score(p.labels, said, average="micro", zero_division=0.0),
                "macro_f1": sk.f1_score(p.labels, said, average="macro", zero_division=0.0),
                "exact_match": sk.accuracy_score(p.labels, said)}  # fmt: skip
        assert {n: s[n] for n in want} == pytest.approx(want)


# data -----------------------------------------------------------------------------------------------------------------


def pieces_tokenizer(kind: str) -> Any:
    """A tokenizer that cuts words into pieces: WordPiece, or bytes with spaces (as GPT-2's)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if kind == "wordpiece":
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "b", "##r", "##e", "##a", "##d", "the", "##s"]
        inner = Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
        return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                       sep_token="[SEP]", model_max_length=64)  # fmt: skip
    names = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", model_max_length=64)


@pytest.mark.parametrize("kind", ["wordpiece", "bytes"])
def test_the_first_piece_of_a_word_carries_its_tag(kind: str) -> None:
    tokenizer = pieces_tokenizer(kind)
    rows = [["the", "breads", "the"], ["", "bread"], ["breads"] * 3]
    encoded = words(tokenizer, rows, 12)
    labels, offsets = np.arange(8), np.array([0, 3, 5, 8])
    found = tagged([encoded], [(labels, offsets)])
    for i in range(3):
        at = slice(encoded.offsets[i], encoded.offsets[i + 1])
        tags, seen = found["tags"][at], found["words"].seen[offsets[i] : offsets[i + 1]]
        ids = encoded.flat[at]
        assert tags[tags >= 0].tolist() == labels[offsets[i] : offsets[i + 1]][seen].tolist()
        text = tokenizer.convert_ids_to_tokens(ids)
        for t, (tag, piece) in enumerate(zip(tags, text, strict=True)):
            begins = piece in ("the", "b") if kind == "wordpiece" else piece == "Ġ"
            assert (tag >= 0) == begins, (text, t)
    assert found["words"].seen.tolist()[-3:] == [True, True, False]
    assert encoded.truncated == (1 if kind == "wordpiece" else 2)


def test_a_tokenizer_is_left_as_it_was() -> None:
    tokenizer = pieces_tokenizer("bytes")
    before = tokenizer("the the")["input_ids"]
    with spaced(tokenizer):
        assert tokenizer("the the")["input_ids"] != before
    assert tokenizer("the the")["input_ids"] == before


def test_cut_words_are_said_and_missed(tmp_path: Path) -> None:
    """Every word that does not fit counts as missed: recall falls with max_length, and the run says how many there are."""
    recipe = write_recipe(tmp_path, "token-classification", data={"max_length": 4}, federation={"rounds": 1})
    with pytest.warns(UserWarning, match=r"data.max_length: \d+ of \d+ words have no token within 4 tokens"):
        summary = fl.run(recipe)
    recall = summary["views"]["personal"]["mean"]["recall"]
    rows = [json.loads(x) for x in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    begun = [t.startswith("B") for r in rows for t in r["tags"]]
    fits = [t.startswith("B") for r in rows for t in r["tags"][:2]]
    assert recall < 1.3 * sum(fits) / sum(begun)


BAD = {
    "text": ("token-classification", {"words": "a b", "tags": ["O", "O"]}, "data.text: column 'words' holds string, expected a list"),
    "sizes": ("token-classification", {"words": ["a", "b"], "tags": ["O"]}, "data.label: .*rows.jsonl, line 1 has 2 words and 1 tags"),
    "no words": ("token-classification", {"words": [], "tags": []}, "data.text: .*rows.jsonl, line 1 of column 'words' has no words"),
    "null": ("multi-label", {"words": "a", "tags": ["x", None]}, "data.label: the list in .*rows.jsonl, line 1 of column 'tags' has an item without"),
    "empty": ("multi-label", {"words": "a", "tags": []}, "data.label: the lists of column 'tags' are all empty"),
    "plain": ("multi-label", {"words": "a", "tags": "x"}, "data.label: column 'tags' holds string, expected a list"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_refused_with_their_place(case: str, tmp_path: Path) -> None:
    task, row, message = BAD[case]
    recipe = write_recipe(tmp_path, task)
    (tmp_path / "rows.jsonl").write_text((json.dumps(row | {"site": "a"}) + "\n") * 2, encoding="utf-8")
    with pytest.raises(fl.ConfigError, match=message):
        fl.run(recipe)


def test_recipes_of_new_tasks() -> None:
    """Columns that a task cannot read, options of another task and partitions by class, each with its field."""
    from fedlora.recipe import Recipe

    def fields(**sections: Any) -> list[str]:
        raw = {"data": {"source": "x.jsonl", "text": "a", "label": "b"}, "method": "fedsa", **sections}
        try:
            Recipe.from_dict(raw)
        except fl.ConfigError as e:
            return sorted(p.field for p in e.problems)
        return []

    assert fields(model={"task": "multi-label", "threshold": 0.3}) == []
    assert fields(model={"threshold": 0.3}) == ["model.threshold"]
    assert fields(model={"task": "token-classification"}) == []
    assert fields(model={"task": "token-classification"}, data={"source": "x", "text": ["a", "b"]}) == [
        "data.label",
        "data.text",
    ]
    assert fields(model={"task": "token-classification"}, data={"source": "x", "template": "{a}", "label": "b"}) == [
        "data.template"
    ]
    assert fields(model={"task": "multi-label"}, partition={"kind": "dirichlet"}) == ["partition.kind"]
    assert fields(model={"task": "multi-label"}, partition={"permute_labels": True}) == ["partition.permute_labels"]
