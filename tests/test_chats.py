"""Chats through the model's chat template: what is scored is what the assistant says, token by token as transformers masks it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedlora as fl
from fedlora.checkpoints import pretrained
from fedlora.data import chats
from fedlora.data.load import load
from fedlora.errors import ConfigError, DataError
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


def test_a_chat_model_is_trained_and_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole: from a recipe, with the answers learned and a question put through the template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own = bytewise()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(own), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, max_position_embeddings=512))  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    own.save_pretrained(tmp_path / "base")
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
