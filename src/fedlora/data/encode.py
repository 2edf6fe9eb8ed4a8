"""Texts to token ids: fast, in batches, as flat arrays. One function per kind of example."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, Problem
from . import chats

BATCH = 4096  # texts encoded at once; enough to keep the tokenizer's threads busy, and few enough to need little memory


@dataclass(frozen=True)
class Encoded:
    """n examples without their labels; the arrays are those of `Tokens`."""

    flat: np.ndarray  # int32 [total tokens]
    offsets: np.ndarray  # int64 [n+1]
    source: np.ndarray  # int64 [n]: the table row that each example comes from
    truncated: int  # rows that lost tokens
    segment: np.ndarray | None = None
    prompt: np.ndarray | None = None
    chars: np.ndarray | None = None
    scored: np.ndarray | None = None  # bool [total tokens]: which tokens carry loss (chats)
    word: np.ndarray | None = None  # int32 [total tokens]: the word that begins with this token, -1 for none
    turn: np.ndarray | None = None  # int32 [n]: which of a chat's answers `prompt` leads to, counted from 0


def texts(tokenizer: Any, first: Sequence[str], second: Sequence[str] | None, max_length: int) -> Encoded:
    """One example for each text or pair, cut to max_length tokens as the tokenizer does it (a pair loses from its longer text).

    `segment` is set for pairs of a tokenizer with token types (BERT's), None for others (RoBERTa's, GPT-2's).
    """
    room(tokenizer, max_length, pair=second is not None)
    typed = second is not None and "token_type_ids" in tokenizer.model_input_names
    ids: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    truncated = 0
    for a in range(0, len(first), BATCH):
        pair = {} if second is None else {"text_pair": list(second[a : a + BATCH])}
        batch = tokenizer(
            list(first[a : a + BATCH]), **pair, truncation=True, max_length=max_length, return_attention_mask=False,
            return_token_type_ids=typed,
        )  # fmt: skip
        flat, length = flatten(batch["input_ids"])
        ids.append(flat)
        lengths.append(length)
        if batch.encodings is not None:
            truncated += sum(bool(e.overflowing) for e in batch.encodings)
        else:  # a tokenizer in Python does not say which rows it cut, so every full row is counted
            truncated += int((length == max_length).sum())
        if typed:
            types, _ = flatten(batch["token_type_ids"])
            place = np.arange(len(types)) - np.repeat(np.cumsum(length) - length, length)
            beginning = np.repeat(length, length)
            starts.append(np.minimum.reduceat(np.where(types == 1, place, beginning), np.cumsum(length) - length))
    offsets = _offsets(_join(lengths))
    segment = _join(starts).astype(np.int32) if typed else None
    return Encoded(_join(ids).astype(np.int32), offsets, np.arange(len(first)), truncated, segment)


def words(tokenizer: Any, rows: Sequence[Sequence[str]], max_length: int) -> Encoded:
    """One example for each list of words, cut to max_length tokens; `word` says where each word's first token is.

    Raises DataError for a tokenizer written in Python, which keeps no positions, and for one that cannot take words.
    """
    room(tokenizer, max_length)
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"model.name: {type(tokenizer).__name__} does not say which word a token comes from, expected a fast tokenizer; "
            "choose a model that has tokenizer.json"
        )
    ids: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    found: list[np.ndarray] = []
    truncated = 0
    with spaced(tokenizer):
        for a in range(0, len(rows), BATCH):
            part = [list(r) for r in rows[a : a + BATCH]]
            batch = tokenizer(
                part, is_split_into_words=True, truncation=True, max_length=max_length, return_attention_mask=False,
                return_token_type_ids=False,
            )  # fmt: skip
            flat, length = flatten(batch["input_ids"])
            ids.append(flat)
            lengths.append(length)
            for e in batch.encodings:
                of = np.array([-1 if w is None else w for w in e.word_ids], np.int32)
                first = np.ones(len(of), bool)
                first[1:] = of[1:] != of[:-1]
                found.append(np.where(first, of, -1))
                truncated += bool(e.overflowing)
    return Encoded(_join(ids).astype(np.int32), _offsets(_join(lengths)), np.arange(len(rows)), truncated,
                   word=_join(found).astype(np.int32))  # fmt: skip


@contextmanager
def spaced(tokenizer: Any) -> Iterator[None]:
    """Inside, a byte-level tokenizer puts a space before every word, as between the words of a text (GPT-2, RoBERTa)."""
    inner = tokenizer.backend_tokenizer
    old = inner.pre_tokenizer
    said = json.loads(inner.to_str())["pre_tokenizer"]
    if not (said and said["type"] == "ByteLevel" and not said["add_prefix_space"]):
        yield
        return
    from tokenizers import pre_tokenizers

    inner.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=True, trim_offsets=said["trim_offsets"], use_regex=said["use_regex"]
    )
    try:
        yield
    finally:
        inner.pre_tokenizer = old


def continuations(tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], max_length: int) -> Encoded:
    """One example for each prompt + completion: [specials] prompt completion [EOS]; prompt tokens carry no loss.

    The two are tokenised apart, so that the prompt's tokens are those it has when the completion is generated. Too long: first
    the prompt loses its beginning, down to half of the room, then the completion its end (and EOS). A tokenizer without an
    end-of-sequence token gets none. chars: characters of the completion that is left.
    """
    before, _ = specials(tokenizer)
    space = room(tokenizer, max_length)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows: list[list[int]] = []
    skip, chars = np.zeros(len(prompts), np.int32), np.zeros(len(prompts), np.int32)
    truncated = 0
    pieces = zip(_plain(tokenizer, prompts), _plain(tokenizer, completions), strict=True)
    for i, ((p, _), (c, stops)) in enumerate(pieces):
        c = c + end
        keep = min(len(p), max(space - len(c), space // 2))
        rest = min(len(c), space - keep)
        truncated += keep < len(p) or rest < len(c)
        rows.append([*before, *p[len(p) - keep :], *c[:rest]])
        skip[i] = len(before) + keep
        unscored = 1 if skip[i] == 0 else 0  # nothing stands before the first token, so it cannot be predicted
        stop = [0, *stops]
        chars[i] = stop[min(rest, len(stops))] - stop[min(unscored, len(stops))]
    flat, lengths = flatten(rows)
    return Encoded(flat, _offsets(lengths), np.arange(len(rows)), truncated, None, skip, chars)


def running(tokenizer: Any, documents: Sequence[str], max_length: int) -> Encoded:
    """Plain text for a causal language model: each document is cut into pieces of max_length tokens, none is lost.

    Special tokens stand in every piece as the tokenizer puts them around a text. Pieces without a token to predict are
    dropped. `source` maps a piece to its document. chars: characters of the tokens that are predicted, so that the sum over
    a document is its length (less the first token of each piece where the tokenizer puts nothing before a text).
    """
    before, after = specials(tokenizer)
    space = room(tokenizer, max_length)
    rows: list[list[int]] = []
    source: list[int] = []
    chars: list[int] = []
    for i, (ids, stops) in enumerate(_plain(tokenizer, documents)):
        stop = [0, *stops]
        for a in range(0, len(ids), space):
            piece = ids[a : a + space]
            first = a if before else a + 1  # the first token that is predicted
            if len(before) + len(piece) > 1:
                rows.append([*before, *piece, *after])
                source.append(i)
                chars.append(stop[a + len(piece)] - stop[first])
    flat, lengths = flatten(rows)
    return Encoded(flat, _offsets(lengths), np.array(source, np.int64), 0, None, None, np.array(chars, np.int32))


def conversations(
    tokenizer: Any, rows: Sequence[Any], places: Sequence[str], max_length: int, field: str = "data.messages"
) -> Encoded:
    """One example for each chat (lists of messages), `scored` where the assistant speaks. Too long: the chat loses its end.

    A chat that has no token of an answer left is left out; `source` tells which ones are there. prompt: the tokens before the last
    answer of which something is left, and `turn` its number among the chat's answers. places: where each chat stands; field: of
    the recipe that names them.
    Raises DataError for what is no chat, for a template that fails, and if no chat is left.
    """
    chats.usable(tokenizer, field)
    room(tokenizer, max_length)
    ids: list[list[int]] = []
    scored: list[np.ndarray] = []
    source: list[int] = []
    asked: list[tuple[int, int]] = []
    truncated = 0
    for i, row in enumerate(rows):
        chat = chats.checked(row, places[i], field)
        try:
            own, said = chats.tokens(tokenizer, chat)
        except ValueError as e:
            raise DataError(f"{field}: {places[i]}: the model's chat template fails: {e}; correct the row, or choose "
                            "another model") from e  # fmt: skip
        if said[1:max_length].any():  # nothing stands before the first token, so it cannot be predicted
            ids.append(own[:max_length])
            scored.append(said[:max_length])
            source.append(i)
            asked.append(_last_answer(said, max_length, chats.answers(chat)))
            truncated += len(own) > max_length
    if not ids:
        raise DataError(
            f"data.max_length: none of {len(rows)} chats has an answer within {max_length} tokens; raise it"
        )
    flat, lengths = flatten(ids)
    prompt, turn = np.array(asked, np.int32).T
    return Encoded(flat, _offsets(lengths), np.array(source, np.int64), truncated, prompt=prompt,
                   scored=np.concatenate(scored), turn=turn)  # fmt: skip


def _last_answer(said: np.ndarray, length: int, answers: Sequence[str]) -> tuple[int, int]:
    """Where the last answer begins that lies within `length` tokens, in part at least, and its number among all answers."""
    starts = np.flatnonzero(np.diff(said.astype(np.int8), prepend=0) == 1)
    number = int((starts < length).sum()) - 1
    # A template that does not score the end of an answer scores nothing of an empty one.
    held = [i for i, a in enumerate(answers) if a or len(starts) == len(answers)]
    return int(starts[number]), held[number]


# shared ---------------------------------------------------------------------------------------------------------------


def specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that the tokenizer puts before and after one text, e.g. ([BOS], [])."""
    marked = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for at in range(len(marked) - len(bare) + 1):
        if marked[at : at + len(bare)] == bare:
            return marked[:at], marked[at + len(bare) :]
    return [], []


def room(tokenizer: Any, max_length: int, pair: bool = False) -> int:
    """How many tokens of text fit beside the special tokens. Raises ConfigError where there are fewer than two."""
    extra = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length - extra < 2:
        raise ConfigError(
            [Problem("data.max_length", max_length, f"at least {extra + 2}: the tokenizer adds {extra} special tokens")]
        )
    limit = getattr(tokenizer, "model_max_length", None) or max_length
    if max_length > limit:
        raise ConfigError(
            [
                Problem(
                    "data.max_length",
                    max_length,
                    f"at most {limit}, the longest input of the model",
                    f"set it to {limit}",
                )
            ]
        )
    return max_length - extra


def _plain(tokenizer: Any, items: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of each text without special tokens, and the character where each token ends."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    for a in range(0, len(items), BATCH):
        part = list(items[a : a + BATCH])
        batch = tokenizer(
            part, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
            return_offsets_mapping=fast, verbose=False,
        )  # fmt: skip
        for i, ids in enumerate(batch["input_ids"]):
            if fast:
                stops = [stop for _, stop in batch["offset_mapping"][i]]
            else:  # a tokenizer in Python keeps no positions, so characters are spread evenly over the tokens
                stops = [round(len(part[i]) * (j + 1) / len(ids)) for j in range(len(ids))]
            yield list(ids), stops


def flatten(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as one array int32 [total], and their lengths int64 [n]."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
