"""Chats through the model's chat template: what is scored is what the assistant says, token by token as transformers masks it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli import fedlora

import fedlora as fl
from fedlora.checkpoints import pretrained
from fedlora.data import chats
from fedlora.data.load import load
from fedlora.errors import ConfigError, DataError
from fedlora.federation.records import SamplesLine
from fedlora.report.read import records
from fedlora.training.tasks.causal_lm import CausalLM

PLAIN = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = PLAIN.replace(
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)


def chat(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    said = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    return ([{"role": "system", "content": system}] if system is not None else []) + said


CHATS = [
    chat("Hi", "Hello you"),
    chat("What is 2 + 2?", "4.", "And é?", "  A letter\nof French ", system="Short answers"),
    chat("Hi", "assistant", "assistant", "Hi\n\n", "bye"),
    chat("x", ""),
]


def bytewise() -> Any:
    """A tokenizer with one token a byte, and the tokens of a chat."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    own = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|im_end|>", model_max_length=4096
    )
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    own.chat_template = PLAIN
    return own


@pytest.fixture(params=["bytes", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "bytes":
        return bytewise()
    where = pretrained.local_copy("smollm2")
    if where is None:
        pytest.skip("needs a local copy of smollm2 in ~/.cache/fedlora-models, or where FEDLORA_MODELS says")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(where, trust_remote_code=False)


@pytest.mark.parametrize("messages", CHATS)
def test_the_mask_is_transformers_own(tokenizer: Any, messages: list[dict[str, str]]) -> None:
    """Oracle: the same template with marks, and transformers' mask."""
    ids, scored = chats.tokens(tokenizer, messages)
    marked = tokenizer.chat_template
    if "{{'<|im_start|>' + message['role']" in marked:  # SmolLM2's
        marked = MARKED.replace("Be kind", "You are a helpful AI assistant named SmolLM, trained by Hugging Face")
    else:
        marked = MARKED
    wanted = tokenizer.apply_chat_template(
        messages, chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == list(wanted["input_ids"])
    assert scored.tolist() == [bool(x) for x in wanted["assistant_masks"]]
    assert scored.any()
    tokenizer.chat_template = marked
    again, said = chats.tokens(tokenizer, messages)
    assert (again, said.tolist()) == (ids, scored.tolist())


def test_a_question_is_asked_as_it_was_trained(tokenizer: Any) -> None:
    ids, scored = chats.tokens(tokenizer, CHATS[0])
    asked = tokenizer(chats.prompt(tokenizer, "Hi"), add_special_tokens=False)["input_ids"]
    assert asked == ids[: int(np.flatnonzero(scored)[0])]


def section(path: Path, **more: Any) -> dict[str, Any]:
    return {"source": str(path), "messages": "messages", "max_length": 400, **more}


def written(folder: Path, rows: list[Any]) -> Path:
    path = folder / "r.jsonl"
    path.write_text("".join(json.dumps({"messages": r}) + "\n" for r in rows))
    return path


def test_labels_are_the_answers_alone(tmp_path: Path) -> None:
    own = bytewise()
    path = written(tmp_path, CHATS[:2])
    for _ in range(2):  # from the tokenizer, and from the cache
        found = load(own, section(path), CausalLM(), 0, cache=tmp_path / "cache").examples
        labels = found.collate(np.arange(2))["labels"].numpy()
        assert [own.decode(x[x >= 0]) for x in labels] == [
            "Hello you<|im_end|>",
            "4.<|im_end|>  A letter\nof French <|im_end|>",
        ]


def test_answers_that_are_cut_away_are_counted(tmp_path: Path) -> None:
    own = bytewise()
    path = written(tmp_path, [chat("Hi", "Hello"), chat("q" * 300, "late"), chat("Hi", "x" * 300)])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = load(own, section(path, max_length=120), CausalLM(), 0, cache=tmp_path / "c")
    said = " | ".join(str(w.message) for w in heard)
    assert "1 of 2 rows are longer than 120 tokens; their chats lose their ends" in said
    assert "1 of 3 chats have no answer within 120 tokens; they are left out" in said
    assert len(found.examples) == 2
    with pytest.raises(DataError, match="none of 1 chats has an answer within 20 tokens; raise it"):
        load(own, section(written(tmp_path, CHATS[:1]), max_length=20), CausalLM(), 0, cache=tmp_path / "c")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (chat("Hi"), "no message of the assistant, expected one at least"),
        (chat("a", "b")[1:], "message 1 is of the assistant where the user is due"),
        ([*chat("a", "b"), {"role": "system", "content": "late"}], "message 3 is of the system where the user is due"),
        ([*chat("a", "b", system="s"), *chat("c", "d")[1:]], "message 4 is of the assistant where the user is due"),
        (
            [{"role": "human", "content": "a"}],
            "message 1 has the role 'human', expected one of system, user, assistant",
        ),
        ([{"role": "user", "content": None}], "message 1 has the content None, expected text"),
        ([], "no message of the assistant"),
    ],
)
def test_chats_that_are_none(bad: Any, says: str, tmp_path: Path) -> None:
    path = written(tmp_path, [CHATS[0], bad])
    with pytest.raises(DataError, match=rf"data.messages: .*r.jsonl, line 2: {says}"):
        load(bytewise(), section(path), CausalLM(), 0, cache=tmp_path / "c")


def test_templates_that_fail(tmp_path: Path) -> None:
    own = bytewise()
    path = written(tmp_path, [CHATS[0], chat("Hi", "Hello", "no", "y")])
    own.chat_template = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}" + PLAIN
    with pytest.raises(DataError, match=r"r.jsonl, line 2: the model's chat template fails: one turn only"):
        load(own, section(path), CausalLM(), 0, cache=tmp_path / "c")
    own.chat_template = "{{ messages | length }}" + PLAIN
    with pytest.raises(DataError, match=r"r.jsonl, line 1: .* it writes earlier turns anew"):
        load(own, section(path), CausalLM(), 0, cache=tmp_path / "c")
    own.chat_template = None
    with pytest.raises(ConfigError, match="the model has no chat template; choose an instruction-tuned model"):
        load(own, section(path), CausalLM(), 0, cache=tmp_path / "c")


def small_llama(own: Any, folder: Path) -> None:
    """A base for a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(own),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=512,
        )
    ).save_pretrained(folder)
    own.save_pretrained(folder)


def test_a_chat_model_is_trained_and_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole: from a recipe, with the answers learned and a question put through the template."""
    own = bytewise()
    small_llama(own, tmp_path / "base")
    path = written(tmp_path, [chat(f"{i}?", "yes") for i in range(40)])
    recipe = {
        "name": "chat", "model": {"name": str(tmp_path / "base"), "task": "causal-lm", "dtype": "fp32"},
        "data": section(path), "partition": {"clients": 2}, "method": "fedsa", "federation": {"rounds": 2},
        "train": {"steps": 2, "lr": 0.01}, "run": {"output": str(tmp_path / "run")},
    }  # fmt: skip
    fl.run(recipe)
    asked: list[str] = []
    answer = CausalLM.answer
    monkeypatch.setattr(
        CausalLM, "answer", lambda self, s, requests: asked.extend(requests) or answer(self, s, requests)
    )
    (said,) = fl.load(tmp_path / "run").predict(["1?"], new_tokens=4)
    assert asked == [own.apply_chat_template(chat("1?"), tokenize=False, add_generation_prompt=True)]
    assert said.text == "1?"


# questions and answers in columns ------------------------------------------------------------------------------------


def columns(path: Path, rows: list[tuple[str, str | None, str]], **more: Any) -> dict[str, Any]:
    names = ("instruction", "input", "output")
    path.write_text("".join(json.dumps(dict(zip(names, r, strict=True))) + "\n" for r in rows), encoding="utf-8")
    return {"source": str(path), "prompt": ["instruction", "input"], "completion": "output", "chat": True, "max_length": 400,
            **more}  # fmt: skip


ALPACA = [("Add.", "1 2", "3"), ("Say hi.", "", "hi"), ("Say ho.", None, "ho\n"), ("Sort.", "b\na", "a\nb")]
ASKED = ["Add.\n\n1 2", "Say hi.", "Say ho.", "Sort.\n\nb\na"]


def test_columns_are_chats_of_one_turn(tmp_path: Path) -> None:
    """Oracle: the same chats, written out as messages."""
    own = bytewise()
    one = load(own, columns(tmp_path / "a.jsonl", ALPACA), CausalLM(), 0, cache=tmp_path / "c")
    whole = [chat(q, a) for q, (_, _, a) in zip(ASKED, ALPACA, strict=True)]
    two = load(own, section(written(tmp_path, whole)), CausalLM(), 0, cache=tmp_path / "c")
    for name in ("flat", "offsets", "tags", "prompt"):
        assert np.array_equal(getattr(one.examples, name), getattr(two.examples, name)), name
    assert one.references == two.references == [(a,) for _, _, a in ALPACA]


def test_without_chat_the_columns_are_plain(tmp_path: Path) -> None:
    own = bytewise()
    found = load(own, columns(tmp_path / "a.jsonl", ALPACA, chat=False), CausalLM(), 0, cache=tmp_path / "c").examples
    said = [own.decode(found.flat[a:b]) for a, b in zip(found.offsets, found.offsets[1:], strict=False)]
    assert said == [f"{q}{a}<|im_end|>" for q, (_, _, a) in zip(ASKED, ALPACA, strict=True)]
    with pytest.raises(DataError, match=r"data.prompt: column 'instruction' has no value in .*a.jsonl, line 2"):
        bad: Any = [ALPACA[0], (None, "x", "y")]
        load(own, columns(tmp_path / "a.jsonl", bad), CausalLM(), 0, cache=tmp_path / "c")


def test_the_question_of_a_chat_is_all_before_its_last_answer(tmp_path: Path) -> None:
    """What generation asks: the chat with the prompt to answer, as the template writes it; what it compares with: the answer."""
    from fedlora.data.federated import FederatedData
    from fedlora.data.partition import Rows
    from fedlora.federation.generation import questions

    own = bytewise()
    several = [*CHATS[:2], chat("Hi", "Hello", "more", "x" * 300)]
    with pytest.warns(UserWarning, match="1 of 3 rows are longer than 300 tokens"):
        found = load(own, section(written(tmp_path, several), max_length=300), CausalLM(), 0, cache=tmp_path / "c")
    data = FederatedData(found.examples, ("a",), {"train": Rows(np.array([0, 3]), np.arange(3))}, (), None,
                         references=found.references)  # fmt: skip
    for q, c in zip(questions(data, np.arange(3)), several, strict=True):
        assert own.decode(q.prompt) == own.apply_chat_template(c[:-1], tokenize=False, add_generation_prompt=True)
        assert q.references == (c[-1]["content"],)
    late = section(written(tmp_path, [chat("Hi", "Hello", "q" * 300, "gone")]), max_length=120)
    with pytest.warns(UserWarning, match="1 of 1 rows are longer than 120 tokens"):
        cut = load(own, late, CausalLM(), 0, cache=tmp_path / "c")
    assert cut.references == [("Hello",)]  # the last answer of which something is left
    assert own.decode(cut.examples.flat[: cut.examples.prompt[0]]).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")


def test_an_answer_without_characters_has_its_place(tmp_path: Path) -> None:
    own = bytewise()
    own.chat_template = MARKED.replace("{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
                                       "{{ m['content'] }}{% endgeneration %}<|im_end|>")  # fmt: skip
    rows = [chat("a", "", "b", "second"), chat("a", "first", "b", "")]
    assert load(own, section(written(tmp_path, rows)), CausalLM(), 0, cache=tmp_path / "c").references == [
        ("second",),
        ("first",),
    ]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"messages": "m", "chat": True}, "data.chat: got True, expected false beside data.messages"),
        ({"text": "t", "chat": True}, "data.chat: got True, expected data.prompt and data.completion beside it"),
        (
            {"prompt": ["a", "b"], "completion": "c", "template": "{a}"},
            "expected one column or null beside data.template",
        ),
        ({"prompt": ["a"], "completion": "c"}, "data.prompt"),
    ],
)
def test_columns_that_do_not_fit(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as e:
        fl.Recipe.from_dict({"name": "x", "model": {"name": "m", "task": "causal-lm"}, "data": {"source": "s", **data}})
    assert says in str(e.value)


def test_instructions_are_trained_scored_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole: `check` shows what is scored, a run scores answers, and a question by its columns is asked as in training."""
    own = bytewise()
    small_llama(own, tmp_path / "base")
    data = columns(tmp_path / "a.jsonl", [(f"Say {i}.", ("", "now")[i % 2], f"word {i}") for i in range(40)])
    recipe = {
        "name": "chat", "model": {"name": str(tmp_path / "base"), "task": "causal-lm", "dtype": "fp32"}, "data": data,
        "partition": {"clients": 2}, "method": "fedsa", "federation": {"rounds": 1}, "train": {"steps": 2, "lr": 0.01},
        "generation": {"scores": ["exact-match"], "new_tokens": 4, "samples": 1}, "run": {"output": str(tmp_path / "run")},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    said = fedlora("check", tmp_path / "r.yaml", "--no-measure").stdout
    assert "what is scored stands between >> and <<" in said
    assert any(f"  >>word {i}<|im_end|><<" in said for i in range(40)), said
    fl.run(recipe)
    run = fl.load(tmp_path / "run")
    heard: list[str] = []
    answer = CausalLM.answer
    monkeypatch.setattr(
        CausalLM, "answer", lambda self, s, requests: heard.extend(requests) or answer(self, s, requests)
    )
    run.predict([{"instruction": "Say 1.", "input": "now"}, {"instruction": "Say 2."}, "Say 1.\n\nnow"], new_tokens=4)
    through = [
        own.apply_chat_template(chat(q), tokenize=False, add_generation_prompt=True)
        for q in ("Say 1.\n\nnow", "Say 2.")
    ]
    assert heard == [*through, through[0]]
    (line,) = [x for x in records(tmp_path / "run").lines if isinstance(x, SamplesLine)]
    assert all(q["prompt"].startswith("<|im_start|>") is False and "assistant" in q["prompt"] for q in line.questions)
