"""Texts to tokens, and the data of a whole recipe. Kills: loss on prompts; lost text; a stale cache."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from cli import model_folder, rows, write_csv
from pyarrow import parquet
from tokenizers import processors

from fedlora.checkpoints.pretrained import load_tokenizer
from fedlora.data import encode, load
from fedlora.data.federated import FederatedData, assemble, from_arrays
from fedlora.errors import ConfigError, DataError
from fedlora.recipe.sections import Data, Partition
from fedlora.training.tasks import TASKS

TEXTS = ["the ball is a goal", "bread", "a wave the ship the salt is harbour", ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(str(model_folder(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def llama(shared: Path) -> Any:
    return load_tokenizer(str(shared / "weights/stories260K"))


def ids(e: encode.Encoded) -> list[list[int]]:
    return [e.flat[a:b].tolist() for a, b in zip(e.offsets, e.offsets[1:], strict=False)]


def test_single_texts_are_what_the_tokenizer_says(tokenizer: Any) -> None:
    e = encode.texts(tokenizer, TEXTS, None, 8)
    assert ids(e) == [tokenizer(t, truncation=True, max_length=8)["input_ids"] for t in TEXTS]
    assert e.truncated == 1
    assert e.segment is None


def test_pairs(tokenizer: Any) -> None:
    first, second = TEXTS[:3], TEXTS[2::-1]
    e = encode.texts(tokenizer, first, second, 10)
    for row, start, a, b in zip(ids(e), e.segment, first, second, strict=True):  # type: ignore[arg-type]
        want = tokenizer(a, b, truncation=True, max_length=10)
        assert row == want["input_ids"]
        assert [int(i >= start) for i in range(len(row))] == want["token_type_ids"]


def test_prompt_and_completion(llama: Any) -> None:
    """[BOS] prompt completion [EOS]; the prompt carries no loss; characters are those of the completion."""
    e = encode.continuations(llama, ["Once upon"], [" a time"], 64)
    [row] = ids(e)
    p, c = (llama(t, add_special_tokens=False)["input_ids"] for t in ("Once upon", " a time"))
    assert row == [llama.bos_token_id, *p, *c, llama.eos_token_id]
    assert e.prompt is not None
    assert e.chars is not None
    assert list(e.prompt) == [1 + len(p)]
    assert list(e.chars) == [len(" a time")]


def test_long_prompts_lose_their_beginning(llama: Any) -> None:
    prompt = " ".join(f"{a} and {b}" for a in ("one", "two", "red") for b in ("dog", "cat", "sun"))
    e = encode.continuations(llama, [prompt], ["yes"], 20)
    [row] = ids(e)
    assert len(row) == 20
    assert e.truncated == 1
    p, c = (llama(t, add_special_tokens=False)["input_ids"] for t in (prompt, "yes"))
    assert row == [llama.bos_token_id, *p[-(19 - len(c) - 1) :], *c, llama.eos_token_id]


def test_characters_of_text_without_a_first_token(llama: Any) -> None:
    """A tokenizer that puts nothing before a text: its first token is not predicted, and its characters are not counted."""
    bare = copy.deepcopy(llama)
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    bare.add_bos_token = False
    text = "Lily had a red ball."
    assert encode.specials(bare) == ([], [])
    plain = bare(text, add_special_tokens=False, return_offsets_mapping=True)
    stops = [0, *(end for _, end in plain["offset_mapping"])]
    e = encode.running(bare, [text], 8)
    assert e.chars is not None
    starts = range(0, len(plain["input_ids"]), 8)
    want = [stops[min(a + 8, len(stops) - 1)] - stops[a + 1] for a in starts if a + 1 < len(plain["input_ids"])]
    assert list(e.chars) == want


def test_running_text_loses_nothing(llama: Any) -> None:
    texts = ["Lily had a red ball. " * 9, "Hi", "x"]
    e = encode.running(llama, texts, 16)
    for i, t in enumerate(texts):
        pieces = [r for r, s in zip(ids(e), e.source, strict=True) if s == i]
        assert [i for r in pieces for i in r[1:]] == llama(t, add_special_tokens=False)["input_ids"]
        assert all(r[0] == llama.bos_token_id and len(r) <= 16 for r in pieces)
        assert e.chars is not None
        assert e.chars[e.source == i].sum() == len(t)


def test_lengths_that_cannot_be(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data.max_length: got 3, expected at least 4: the tokenizer adds 2"):
        encode.texts(tokenizer, TEXTS, None, 3)
    with pytest.raises(ConfigError, match=r"data.max_length: got 65, expected at most 64"):
        encode.texts(tokenizer, TEXTS, None, 65)


# cache ------------------------------------------------------------------------------------------------------------------


def test_cache(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By content: the same texts are not tokenised again, other texts, lengths or tokenizers are; damage is passed over."""
    table = pa.table({"text": TEXTS[:3], "label": [0, 1, 0]})
    section = Data(source="x", text="text", label="label", max_length=16).model_dump() | {"source": table}
    calls = []
    real = encode.texts
    monkeypatch.setattr(load.encode, "texts", lambda *a: calls.append(a) or real(*a))

    def go(**more: Any) -> Any:
        return load.load(tokenizer, section | more, TASKS["classification"], 0, cache=tmp_path).examples

    first, again = go(), go()
    assert len(calls) == 1
    assert all(np.array_equal(getattr(first, f.name), getattr(again, f.name)) for f in dataclasses.fields(first))
    go(max_length=12)
    go(source=table.set_column(0, "text", pa.array(["a", "b", "c"])))
    assert len(calls) == 3
    [*files] = (tmp_path / "tokens").glob("*")
    assert len(files) == 3
    for f in files:
        f.write_bytes(f.read_bytes()[:-5])
    assert np.array_equal(go().flat, first.flat)
    assert len(calls) == 4
    (tmp_path / "file").write_text("x")
    load.load(tokenizer, section, TASKS["classification"], 0, cache=tmp_path / "file")  # cannot be written: passed over


def test_how_many_rows_are_cut_is_said(tokenizer: Any, tmp_path: Path) -> None:
    """As many as have more tokens than max_length by the tokenizer itself, of all files together."""
    table = pa.table({"text": TEXTS[:4], "label": [0, 1, 0, 1]})
    most = 6
    long = sum(len(tokenizer(t)["input_ids"]) > most for t in TEXTS[:4])
    assert 0 < long < 4
    section = Data(source="x", text="text", label="label", max_length=most).model_dump() | {"source": table}
    for _ in range(2):  # tokens from the cache are as cut as new ones
        with pytest.warns(
            UserWarning, match=rf"data.max_length: {long} of 4 rows are longer than 6 tokens; their texts lose"
        ):
            assert load.load(tokenizer, section, TASKS["classification"], 0, cache=tmp_path).truncated == long


# whole recipes ----------------------------------------------------------------------------------------------------------


def data(
    tokenizer: Any, folder: Path, task: str = "classification", partition: dict[str, Any] | None = None, **section: Any
) -> FederatedData:
    """The data of a recipe over 120 rows in three classes from four sites."""
    if not (folder / "rows.csv").exists():
        write_csv(folder / "rows.csv", rows(120))
    given = {"source": str(folder / "rows.csv"), "text": "text", "label": "label", "max_length": 16} | section
    return assemble(
        tokenizer,
        Data(**given).model_dump(),
        Partition(**(partition or {})).model_dump(),
        TASKS[task],
        0,
        folder / "cache",
    )


def test_labels_belong_to_their_texts(tokenizer: Any, tmp_path: Path) -> None:
    d = data(tokenizer, tmp_path, limit=50)
    assert d.label_names == ("food", "sea", "sport")
    from cli import WORDS

    assert d.examples.labels is not None
    for i in range(50):
        words = set(tokenizer.decode(d.examples.flat[d.examples.offsets[i] : d.examples.offsets[i + 1]]).split())
        topics = {t for t, ws in WORDS.items() if words & set(ws)}
        assert topics <= {d.label_names[d.examples.labels[i]]}


def test_natural_clients(tokenizer: Any, tmp_path: Path) -> None:
    for p, section in (({"kind": "column", "column": "who"}, {}), ({}, {"client": "who"})):
        d = data(tokenizer, tmp_path, partition=p, **section)
        assert list(d.ids) == ["site-0", "site-1", "site-2", "site-3"]
        for k in range(4):
            assert all(r % 4 == k for s in d.splits.values() for r in s[k])


def test_one_client_per_file(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "sites").mkdir()
    for i, name in enumerate(("north", "south")):
        write_csv(tmp_path / f"sites/{name}.csv", rows(30 + 6 * i, i))
    d = data(tokenizer, tmp_path, source=str(tmp_path / "sites"), client="file")
    assert list(d.ids) == ["north", "south"]
    assert [sum(int(s.sizes[k]) for s in d.splits.values()) for k in range(2)] == [30, 36]


def test_separate_files(tokenizer: Any, tmp_path: Path) -> None:
    write_csv(tmp_path / "test.csv", rows(33, 5))
    p = {"kind": "dirichlet", "clients": 5, "alpha": 0.3, "min_size": 5, "validation": 0.2}
    d = data(tokenizer, tmp_path, partition=p, test=str(tmp_path / "test.csv"))
    assert sorted(d.splits["test"].rows) == list(range(120, 153))
    assert sorted([*d.splits["train"].rows, *d.splits["validation"].rows]) == list(range(120))
    share = d.histogram("train") / d.histogram("train").sum(0)
    assert (abs(d.histogram("test") - share * d.histogram("test").sum(0)) <= 1).all()


def test_domains_and_concepts(tokenizer: Any, tmp_path: Path) -> None:
    d = data(tokenizer, tmp_path, partition={"kind": "domain", "column": "who", "clients": 8, "permute_labels": True})
    assert all(len({int(r) % 4 for r in d.splits["train"][k]}) == 1 for k in range(8))
    assert d.label_maps is not None
    assert d.label_maps.shape == (8, 3)


def test_regression_and_language(tokenizer: Any, llama: Any, tmp_path: Path) -> None:
    parquet.write_table(
        pa.table({"text": TEXTS * 5, "y": np.arange(20) / 3, "topic": ["a", "b"] * 10}), tmp_path / "r.parquet"
    )
    d = data(tokenizer, tmp_path, "regression", {"clients": 2}, source=str(tmp_path / "r.parquet"), label="y")
    assert d.examples.labels is not None
    np.testing.assert_allclose(d.examples.labels, np.arange(20) / 3, rtol=1e-6)
    assert d.label_names == ()
    parquet.write_table(
        pa.table({"text": ["Once upon a time there was a cat."] * 20, "topic": ["a", "b"] * 10}), tmp_path / "l.parquet"
    )
    d = data(
        llama,
        tmp_path,
        "causal-lm",
        {"kind": "classes", "classes": 1, "clients": 2},
        source=str(tmp_path / "l.parquet"),
        label="topic",
        max_length=32,
    )
    assert d.examples.labels is None
    assert sorted((d.histogram("train") > 0).sum(1)) == [1, 1]


def test_templates(tokenizer: Any, tmp_path: Path) -> None:
    d = data(tokenizer, tmp_path, text=None, template="{label} is {text}", limit=10)
    first = d.examples.flat[: d.examples.offsets[1]]
    assert tokenizer.convert_ids_to_tokens([first[2]]) == ["is"]
    with pytest.raises(DataError, match=r"data.template: no column 'txt'.*did you mean 'text'"):
        data(tokenizer, tmp_path, text=None, template="{txt}")


def test_own_arrays() -> None:
    x = np.zeros((60, 2), np.float32)
    d = from_arrays({"x": x, "labels": np.arange(60) % 3}, "column", by=["a", "b", "c"] * 20, unseen=1)
    assert list(d.ids) == ["a", "b", "c"]
    assert d.histogram("train").tolist() == [[14, 0, 0], [0, 14, 0], [0, 0, 14]]
    with pytest.raises(DataError, match=r"columns have lengths .*expected one common length"):
        from_arrays({"x": x, "labels": np.zeros(3)})
    with pytest.raises(ConfigError, match=r"partition.unseen: got 8, expected less than the number of clients, 8"):
        from_arrays({"x": x, "labels": np.arange(60) % 3}, unseen=8)


def test_the_built_in_corpus(tokenizer: Any) -> None:
    from fedlora.data.demo import AREAS, corpus, sentences

    t = corpus()
    assert t.num_rows > 4000
    assert set(t.column("area").to_pylist()) == {*AREAS, "language reference"}
    texts = t.column("text").to_pylist()
    assert len({x.casefold() for x in texts}) == len(texts)
    assert corpus().equals(t)
    assert len(set(t.column("module").to_pylist())) > 100
    doc = """Return the value.

    This sentence is prose, e.g. it has words. Another one follows it here.

        x = code(here) is not prose at all
    """
    assert list(sentences(doc)) == ["This sentence is prose, e.g. it has words.", "Another one follows it here."]
