"""Chats to tokens, by the model's own chat template. Loss is on what the assistant says, and on nothing else.

Where the template marks it ({% generation %}), transformers' mask is taken. Else the template is asked for the chat up to each of
the assistant's turns, with the prompt to answer, and up to its end: what lies between the two is the answer, with the token that
ends it and without the blanks after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, Problem

ROLES = ("system", "user", "assistant")
Chat = Sequence[Mapping[str, Any]]


def checked(chat: Any, place: str, field: str = "data.messages") -> list[dict[str, str]]:
    """The chat as plain messages. Raises DataError with its place if it is none: messages of role and content, a system message
    at most at its beginning, then user and assistant in turn, with one answer at least."""

    def wrong(what: str, expected: str) -> DataError:
        return DataError(f"{field}: {place}: {what}, expected {expected}; correct or remove it")

    if not isinstance(chat, Sequence) or isinstance(chat, str) or not all(isinstance(m, Mapping) for m in chat):
        raise wrong(f"a {type(chat).__name__}", "a list of messages, each with role and content")
    out = []
    for n, m in enumerate(chat, 1):
        role, content = m.get("role"), m.get("content")
        if role not in ROLES:
            raise wrong(f"message {n} has the role {role!r}", f"one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise wrong(f"message {n} has the content {content!r}", "text")
        out.append({"role": role, "content": content})
    turns = out[1:] if out and out[0]["role"] == "system" else out
    for n, m in enumerate(turns):
        due = ROLES[1 + n % 2]
        if m["role"] != due:
            what = f"message {n + 1 + len(out) - len(turns)} is of the {m['role']} where the {due} is due"
            raise wrong(what, "user and assistant in turn, after one system message at most")
    if not any(m["role"] == "assistant" for m in out):
        raise wrong("no message of the assistant", "one at least, since nothing else is learned")
    return out


def turn(question: str, answer: str) -> list[dict[str, str]]:
    """A chat of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def answers(chat: Chat) -> list[str]:
    """What the assistant says in a chat, in its order."""
    return [m["content"] for m in chat if m["role"] == "assistant"]


def usable(tokenizer: Any, field: str = "data.messages") -> None:
    """Raise ConfigError for a tokenizer that has no chat template, or cannot say where its tokens lie in a text."""
    got, usual = ("a column", "null") if field == "data.messages" else (True, "false")
    if not getattr(tokenizer, "chat_template", None):
        expected = f"{usual}, since the model has no chat template"
        raise ConfigError([Problem(field, got, expected, "choose an instruction-tuned model")])
    if not getattr(tokenizer, "is_fast", False):
        expected = f"{usual} for a tokenizer written in Python"
        raise ConfigError([Problem(field, got, expected, "choose a model that has tokenizer.json")])


def tokens(tokenizer: Any, chat: list[dict[str, str]]) -> tuple[list[int], np.ndarray]:
    """Token ids of a chat, and which of them the assistant says, bool [n]. Raises ValueError for a template that fails."""
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template):
        said = _rendered(tokenizer, chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(said["input_ids"]), np.asarray(said["assistant_masks"], bool)
    text = _rendered(tokenizer, chat, tokenize=False)
    spans = []
    for n, m in enumerate(chat):
        if m["role"] == "assistant":
            before = _rendered(tokenizer, chat[:n], tokenize=False, add_generation_prompt=True)
            through = _rendered(tokenizer, chat[: n + 1], tokenize=False).rstrip()
            if not (text.startswith(through) and through.startswith(before.rstrip())):
                raise ValueError(
                    "it writes earlier turns anew when later ones follow, so that answers cannot be told apart"
                )
            spans.append((min(len(before), len(through)), len(through)))
    said = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    at = np.asarray(said["offset_mapping"], np.int64).reshape(-1, 2)
    scored = np.zeros(len(at), bool)
    for a, b in spans:
        scored |= (at[:, 1] > a) & (at[:, 0] < b)  # a token may begin before the answer does
    return list(said["input_ids"]), scored


def prompt(tokenizer: Any, text: str) -> str:
    """A question of the user as the template writes it, with the prompt to answer; without the special tokens that the tokenizer
    itself puts before a text. Raises DataError for a template that fails."""
    usable(tokenizer)
    try:
        said = str(
            _rendered(tokenizer, [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        )
    except ValueError as e:
        raise DataError(f"predict: the model's chat template fails: {e}; correct the template") from e
    first = tokenizer.bos_token
    return said.removeprefix(first) if first and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else said


def _rendered(tokenizer: Any, chat: Chat, **options: Any) -> Any:
    """What the template makes of a chat. Raises ValueError."""
    import jinja2

    try:
        return tokenizer.apply_chat_template(list(chat), **options)
    except (jinja2.TemplateError, TypeError, KeyError, IndexError) as e:
        raise ValueError(" ".join(str(e).split())) from e
