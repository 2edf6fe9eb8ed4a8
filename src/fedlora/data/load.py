"""The examples of a source: rows read, texts tokenised once and cached, labels numbered."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import DataError
from ..files import cache as user_cache
from . import chats, encode, template
from .addresses import scheme
from .columns import codes, column, full, strings
from .encode import Encoded
from .examples import Tokens, Words
from .files import is_data_file
from .lines import CLIENT, place
from .missing import complete
from .sources import limited, read

if TYPE_CHECKING:
    import pyarrow as pa


DEMO = {"text": "text", "label": "area"}  # the columns of the built-in corpus; its natural clients are the modules
DEMO_CLIENT = "module"


# What a row that is too long loses. Running text loses nothing; of words it is said how many are lost.
LOST = {
    "texts": "their texts lose their ends",
    "conversations": "their chats lose their ends",
    "continuations": "their prompts lose their beginnings, then their answers their ends",
}


@dataclass(frozen=True)
class Column:
    """A column as numbers: codes int64 [n], and the value of each number."""

    codes: np.ndarray
    names: Sequence[Any]

    def at(self, rows: np.ndarray) -> Column:
        """The column of some rows; its names stay all that there are."""
        return Column(self.codes[rows], self.names)


@dataclass(frozen=True)
class Loaded:
    """All rows of a source. origin int8 [n]: 0 from the source, 1 from the validation file, 2 from the test file."""

    examples: Tokens
    origin: np.ndarray
    groups: np.ndarray | None  # int64 [n] class of each row, None where the data have none
    names: tuple[str, ...]  # of the classes
    column: Column | None  # what decides the partition (kinds column and domain)
    truncated: int  # rows that lost tokens to max_length
    outputs: tuple[str, ...] = ()  # names of the model's outputs, where they are no classes of rows
    references: Sequence[Sequence[str]] | None = None  # texts that answer each row's prompt, where rows have prompts
    together: Column | None = None  # rows of one value stay together


@dataclass(frozen=True)
class Texts:
    """The inputs of a table's rows. how: one of "texts" (first, or pairs), "words", "running", "continuations"
    and "conversations".

    places: where each chat of conversations stands. field: of the recipe, from which they come. references: texts that answer
    each row's prompt, where they are others than `second` or the assistant's own.
    """

    how: str
    first: Sequence[Any]  # texts; for "words", lists of words; for "conversations", lists of messages
    second: Sequence[str] | None = None
    references: Sequence[Sequence[str]] | None = None
    places: Sequence[str] = ()
    field: str = "data.messages"

    def answers(self, encoded: Encoded) -> list[Sequence[str]] | None:
        """The references of every example; None where rows are no prompts with answers."""
        rows = encoded.source.tolist()
        if self.references is not None:
            return [self.references[i] for i in rows]
        if self.how == "continuations" and self.second is not None:
            return [(self.second[i],) for i in rows]
        if encoded.turn is None:
            return None
        return [(chats.answers(self.first[i])[n],) for i, n in zip(rows, encoded.turn.tolist(), strict=True)]


@dataclass(frozen=True)
class Targets:
    """The labels of every table's rows, as arrays: one entry a table."""

    labels: Sequence[np.ndarray] | None = None  # [rows ...] in the form that the task's loss takes
    groups: Sequence[np.ndarray] | None = (
        None  # int64 [rows]: the class of each row, by which it may be given to a client
    )
    names: tuple[str, ...] = ()  # of these classes
    outputs: tuple[str, ...] = ()  # of the model's outputs, where they are no classes of rows
    words: Sequence[tuple[np.ndarray, np.ndarray]] | None = None  # (label of every word, offsets [rows+1])


class Reader(Protocol):
    """What loading asks of a task: the inputs and the labels of a table's rows, as the recipe's section data names them."""

    def texts(self, table: pa.Table, data: Mapping[str, Any]) -> Texts:
        """The inputs. Raises DataError."""

    def targets(self, tables: Mapping[int, pa.Table], data: Mapping[str, Any]) -> Targets:
        """The labels of every table. Raises DataError."""


Look = Callable[[Mapping[int, "pa.Table"], Sequence[Texts], Sequence[Encoded]], None]


def load(
    tokenizer: Any,
    data: Mapping[str, Any],
    task: Reader,
    seed: int,
    by: str | None = None,
    cache: Path | None = None,
    look: Look | None = None,
    together: str | None = None,
) -> Loaded:
    """Rows of the recipe section `data`, ready to train on.

    by: the column that the partition asks for. cache: folder of tokenised texts; None for the user's cache folder. look: is shown
    what was read. together: the column of rows that stay together.
    Raises DataError for what is missing, malformed or unlabelled.
    """
    if data["source"] == "demo":
        data = {**data, **{k: v for k, v in DEMO.items() if data.get(k) is None}}
    tables = _tables(data, seed, (by, together))
    inputs = [task.texts(t, data) for t in tables.values()]
    encoded = [_tokens(tokenizer, x, data["max_length"], cache) for x in inputs]
    if look is not None:
        look(tables, inputs, encoded)
    how = inputs[0].how
    if how in LOST and (cut := sum(e.truncated for e in encoded)):
        warnings.warn(
            f"data.max_length: {cut} of {sum(len(e.source) for e in encoded)} rows are longer than {data['max_length']} tokens; "
            f"{LOST[how]}",
            stacklevel=2,
        )
    origin = np.concatenate([np.full(len(e.source), o, np.int8) for o, e in zip(tables, encoded, strict=True)])
    targets = task.targets(tables, data)
    source = [e.source for e in encoded]
    take = lambda parts: None if parts is None else np.concatenate([p[s] for p, s in zip(parts, source, strict=True)])  # noqa: E731
    labels: dict[str, Any] = {"labels": take(targets.labels)}
    if targets.words is not None:
        labels |= tagged(encoded, targets.words)
        said = labels["words"]
        if lost := int((~said.seen).sum()):
            warnings.warn(
                f"data.max_length: {lost} of {len(said.seen)} words have no token within {data['max_length']} tokens; "
                "in scores they count as missed",
                stacklevel=2,
            )
    if encoded[0].scored is not None:
        labels["tags"] = np.concatenate(
            [np.where(np.asarray(e.scored), e.flat, -100).astype(np.int64) for e in encoded]
        )
        every = sum(len(x.first) for x in inputs)
        if lost := every - sum(len(e.source) for e in encoded):
            warnings.warn(
                f"data.max_length: {lost} of {every} chats have no answer within {data['max_length']} tokens; they are left out",
                stacklevel=2,
            )
    tokens = joined(encoded, pad_id=tokenizer.pad_token_id or 0, **labels)
    return Loaded(tokens, origin, take(targets.groups), targets.names, _column(tables, by, source),
                  sum(e.truncated for e in encoded), targets.outputs, _references(inputs, encoded),
                  _column(tables, together, source, "partition.group"))  # fmt: skip


def _references(inputs: Sequence[Texts], encoded: Sequence[Encoded]) -> list[Sequence[str]] | None:
    """The references of every example, over all tables."""
    parts = [x.answers(e) for x, e in zip(inputs, encoded, strict=True)]
    return None if any(p is None for p in parts) else [r for p in parts if p is not None for r in p]


def _tables(data: Mapping[str, Any], seed: int, more: Sequence[str | None]) -> dict[int, pa.Table]:
    """Rows by origin. more: columns that the partition asks for."""
    shared: dict[str, Any] = {k: data.get(k) for k in ("subset", "sheet", "client")}
    shared |= {k: data.get(k) or v for k, v in (("format", "auto"), ("encoding", "utf-8"), ("delimiter", "auto"))}
    tables = {0: read(data["source"], query=data.get("query"), split=data.get("split"), **shared)}
    for origin, field in ((1, "validation"), (2, "test")):
        where = data.get(field)
        if where is not None:
            path = Path(where).expanduser()
            is_file = path.exists() or is_data_file(path) or "*" in where or scheme(where) is not None
            asks = not is_file and data.get("query") is not None  # a second query of the same database
            source, split = (where, None) if is_file else (data["source"], None if asks else where)
            tables[origin] = read(source, query=where if asks else None, split=split, **shared)
    if data.get("missing") == "drop":
        tables = complete(tables, data, more)
    return {o: limited(t, data.get("limit"), seed) for o, t in tables.items()}


def tagged(encoded: Sequence[Encoded], words: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """The fields `tags` and `words` of Tokens, from the label of every word: a word's first token carries its label."""
    tags, seen = [], []
    for e, (labels, offsets) in zip(encoded, words, strict=True):
        assert e.word is not None
        first = np.flatnonzero(e.word >= 0)
        row = np.searchsorted(e.offsets, first, side="right") - 1
        place = offsets[row] + e.word[first]
        own = np.full(len(e.word), -100, np.int64)
        own[first] = labels[place]
        tags.append(own)
        seen.append(np.zeros(len(labels), bool))
        seen[-1][place] = True
    sizes = np.concatenate([np.diff(o) for _, o in words])
    every = Words(np.concatenate([v for v, _ in words]).astype(np.int64),
                  np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), np.concatenate(seen))  # fmt: skip
    return {"tags": np.concatenate(tags), "words": every}


def field_of(origin: int) -> str:
    """The recipe's field from which rows of this origin come, for errors about their labels."""
    return {0: "data.label", 1: "data.validation", 2: "data.test"}[origin]


def _column(
    tables: Mapping[int, pa.Table], by: str | None, source: Sequence[np.ndarray], field: str = "partition.column"
) -> Column | None:
    """The column `by` over all rows."""
    if by is None:
        return None
    import pyarrow as pa

    by = CLIENT if by == "file" and all(CLIENT in t.column_names for t in tables.values()) else by
    parts = [full(t, by, field) for t in tables.values()]
    kinds = {p.type for p in parts}
    if len(kinds) > 1:
        raise DataError(f"{field}: {by!r} is {' and '.join(map(str, kinds))} in different files, expected one type")
    starts = np.cumsum([0, *(len(p) for p in parts)])
    whole = pa.chunked_array([c for p in parts for c in p.chunks], parts[0].type)

    def at(i: int) -> str:
        t = int(np.searchsorted(starts, i, side="right")) - 1
        return place([*tables.values()][t], i - int(starts[t]))

    numbers, names = codes(whole, by, field, at)
    return Column(np.concatenate([numbers[a + s] for a, s in zip(starts, source, strict=False)]), names)


# texts ----------------------------------------------------------------------------------------------------------------


def _tokens(tokenizer: Any, texts: Texts, length: int, cache: Path | None) -> Encoded:
    """Token rows of one table, from the cache where it has them."""
    how, first, second = texts.how, texts.first, texts.second
    make: Callable[[], Encoded] = {
        "running": lambda: encode.running(tokenizer, first, length),
        "continuations": lambda: encode.continuations(tokenizer, first, second or [], length),
        "texts": lambda: encode.texts(tokenizer, first, second, length),
        "words": lambda: encode.words(tokenizer, first, length),
        "conversations": lambda: encode.conversations(tokenizer, first, texts.places, length, texts.field),
    }[how]
    encode.room(tokenizer, length, pair=how == "texts" and second is not None)
    plain = [json.dumps(x, default=repr) for x in first] if how in ("words", "conversations") else first
    if how == "conversations":
        second = [str(getattr(tokenizer, "chat_template", None))]
    return _cached(_fingerprint(tokenizer, how, length, plain, second), cache, make)


def filled(table: pa.Table, data: Mapping[str, Any]) -> list[str]:
    """data.template with the columns it names, row by row; {prompt} and {text} are the columns of that name in the recipe."""
    try:
        cut = template.parts(data["template"])
    except ValueError as e:
        raise DataError(
            f"data.template: {data['template']!r} has {e}; write plain {{name}}, and double the braces that are text"
        ) from e
    names = {n for _, n in cut if n is not None}
    alias = {n: data[n] for n in ("prompt", "text") if isinstance(data.get(n), str)}
    for n in names:
        column(table, alias.get(n) or n, "data.template")
    values = {n: strings(table, alias.get(n) or n, "data.template") for n in names}
    return [template.fill(cut, {n: v[i] for n, v in values.items()}) for i in range(table.num_rows)]


def joined(parts: Sequence[Encoded], **more: Any) -> Tokens:
    """Token rows of several tables behind each other. more: fields of Tokens over all rows."""
    shift = np.cumsum([0, *(len(p.flat) for p in parts)])
    offsets = np.concatenate([[0], *(p.offsets[1:] + s for p, s in zip(parts, shift, strict=False))]).astype(np.int64)
    extra: dict[str, Any] = {
        n: None if getattr(parts[0], n) is None else np.concatenate([getattr(p, n) for p in parts])
        for n in ("segment", "prompt", "chars")
    }
    return Tokens(np.concatenate([p.flat for p in parts]), offsets, **extra, **more)


# cache ----------------------------------------------------------------------------------------------------------------


def _fingerprint(tokenizer: Any, kind: str, length: int, first: Sequence[str], second: Sequence[str] | None) -> str:
    """A fingerprint of all that decides the tokens: the texts themselves, not the name or date of a file."""
    digest = hashlib.blake2b(digest_size=20)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # padding and cutting may be set from an earlier call, and are no part of the tokenizer
        inner = json.loads(backend.to_str())
        vocabulary = json.dumps({k: v for k, v in inner.items() if k not in ("truncation", "padding")}, sort_keys=True)
    else:
        vocabulary = repr(sorted(tokenizer.get_vocab().items()))
    facts = (
        2,
        kind,
        length,
        type(tokenizer).__name__,
        sorted(tokenizer.special_tokens_map.items()),
        tokenizer.model_input_names,
    )
    for text in (repr(facts), vocabulary):
        digest.update(text.encode())
    for texts in (first, second or ()):
        for t in texts:
            raw = t.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little"))
            digest.update(raw)
    return digest.hexdigest()


def _cached(name: str, folder: Path | None, make: Any) -> Encoded:
    """What `make` returned when it was last called for `name`. A cache that is off, damaged or cannot be written is passed over."""
    from safetensors import SafetensorError
    from safetensors.numpy import load, save

    place = user_cache.room("tokens", folder)
    if place is None:
        return make()
    path = place / f"{name}.safetensors"
    kept = user_cache.read(path)
    if kept is not None:
        with contextlib.suppress(SafetensorError, KeyError, TypeError):
            found: dict[str, Any] = load(kept)
            return Encoded(**{**found, "truncated": int(found["truncated"][0])})
    encoded: Encoded = make()
    arrays = {f.name: getattr(encoded, f.name) for f in dataclasses.fields(encoded)}
    arrays["truncated"] = np.array([encoded.truncated])
    with contextlib.suppress(OSError):
        user_cache.write(path, save({k: np.ascontiguousarray(v) for k, v in arrays.items() if v is not None}))
    return encoded
