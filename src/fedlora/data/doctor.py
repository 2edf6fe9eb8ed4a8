"""What is odd in the data of a run: facts and findings, each a sentence that says what to do. Nothing is changed or refused here.

Rows are named by their place in the file, which a reader can look up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from . import chats
from .encode import Encoded
from .federated import FederatedData
from .lines import place
from .shown import example

if TYPE_CHECKING:
    import pyarrow as pa

    from .load import Texts

SHOWN = 5  # places or names in a sentence
FEW = 5  # training rows below which nobody learns or scores a class
LEAK = 0.01  # share of the test rows that share a group with training rows, from which on it is said
MANY_NUMBERS = 50  # whole numbers as classes from which on they look like a quantity
LONG_NAME = 60  # characters of a class's name, on average, from which on it is a text
DATE = re.compile(r"\d{4}[-./]\d{1,2}[-./]\d{1,2}([T ].*)?|\d{1,2}[-./]\d{1,2}[-./](\d{2}|\d{4})([T ].*)?")
# How people and programs write that there is no value.
MISSING = frozenset(("", "-", "--", ".", "?", "na", "n/a", "n.a.", "n. a.", "nan", "nil", "null", "none", "missing", "<na>", "#n/a"))  # fmt: skip
ALSO_CLASSES = frozenset({"none", "nil"})  # words that may well be a class where they stand alone


@dataclass(frozen=True)
class Finding:
    """One odd thing. kind: a word for programs; text: what it is and what to do; count: rows or classes; places: of the first
    rows, as "row 7" or "notes.csv, line 7"."""

    kind: str
    text: str
    count: int
    places: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.places) else ""
        return f"{self.text} ({_joined(self.places)}{more})" if self.places else self.text


def _joined(places: Sequence[str]) -> str:
    """Places in one file, its name said once: "notes.csv, lines 7, 9"."""
    cut = [p.rpartition(" ") for p in places]
    if len(places) > 1 and len({before for before, *_ in cut}) == 1 and all(n.isdigit() for *_, n in cut):
        return f"{cut[0][0]}s {', '.join(n for *_, n in cut)}"
    return ", ".join(places)


@dataclass(frozen=True)
class Lengths:
    """Tokens of a row before it is cut: the median, the length that 95 % do not exceed, the longest; cut: the share that is."""

    median: int
    most: int
    longest: int
    cut: float


@dataclass(frozen=True)
class DataFacts:
    """rows: of each file, by the field that names it. tokens: None where rows have no tokens. example: a row in pieces, each
    with whether it is scored, where a model learns a part of its row alone."""

    rows: Mapping[str, int]
    tokens: Lengths | None
    findings: tuple[Finding, ...]
    example: tuple[tuple[str, bool], ...] = ()


@dataclass
class Doctor:
    """Looks at the tables of a source while they are loaded (`load`), and tells what it saw once the rows have their clients."""

    tables: Mapping[int, pa.Table] = field(default_factory=dict)
    inputs: Sequence[Texts] = ()
    encoded: Sequence[Encoded] = ()

    def __call__(self, tables: Mapping[int, pa.Table], inputs: Sequence[Texts], encoded: Sequence[Encoded]) -> None:
        self.tables, self.inputs, self.encoded = tables, inputs, encoded

    def facts(
        self, tokenizer: Any, data: Mapping[str, Any], partition: Mapping[str, Any], fed: FederatedData
    ) -> DataFacts:
        """What was seen. data, partition: the recipe's sections; fed: the rows with their clients."""
        seen = _Seen(self.tables, self.inputs, self.encoded, fed)
        names = {0: "source", 1: "validation", 2: "test"}
        found = [*_empty(seen, data), *_duplicates(seen), *_groups(seen, data, partition)]
        odd = list(_no_label(seen, data))
        found += odd or [*_torn(seen), *_alike(fed), *_few(fed)]  # of what is no label nothing else needs to be said
        rows = {names[o]: t.num_rows for o, t in self.tables.items()}
        lengths = _lengths(tokenizer, self, int(data["max_length"]))
        return DataFacts(rows, lengths, tuple(found), example(tokenizer, fed))


class _Seen:
    """Rows of all tables behind each other, and which of them are on which side."""

    def __init__(
        self, tables: Mapping[int, pa.Table], inputs: Sequence[Texts], encoded: Sequence[Encoded], fed: FederatedData
    ):
        self.tables, self.inputs, self.fed = list(tables.values()), inputs, fed
        starts = np.cumsum([0, *(t.num_rows for t in self.tables)])
        self.starts = starts
        row = np.concatenate([s + e.source for s, e in zip(starts, encoded, strict=False)])  # of each example
        self.sides = {name: np.unique(row[r.rows]) for name, r in fed.splits.items()}
        self.label = np.full(starts[-1], -1)
        classes = fed.examples.labels if fed.groups is None else fed.groups
        if fed.label_names and classes is not None:
            self.label[row] = classes

    def place(self, row: int) -> str:
        t = int(np.searchsorted(self.starts, row, side="right")) - 1
        return place(self.tables[t], row - int(self.starts[t]))

    def places(self, rows: Sequence[int] | np.ndarray) -> tuple[str, ...]:
        return tuple(self.place(int(i)) for i in rows[:SHOWN])


def _texts(seen: _Seen) -> list[tuple[Any, ...]]:
    """The inputs of every row: (text,) or (first, second)."""
    out: list[tuple[Any, ...]] = []
    for x in seen.inputs:
        if x.field == "data.chat":
            out += ((question["content"], answer["content"]) for question, answer in x.first)
            continue
        first = [tuple(words) for words in x.first] if x.how == "words" else x.first
        first = [json.dumps(chat) for chat in x.first] if x.how == "conversations" else first
        out += zip(first, x.second, strict=True) if x.second is not None else ((t,) for t in first)
    return out


def _empty(seen: _Seen, data: Mapping[str, Any]) -> Iterator[Finding]:
    """Texts without a character, and texts of spaces alone."""
    texts = _texts(seen)
    what = ("prompt", "completion") if data.get("completion") else ("first text", "second text")
    sides = len(texts[0]) if texts else 0
    for side in range(sides):
        name = what[side] if sides > 1 else "text"
        empty = [i for i, t in enumerate(texts) if len(t[side]) == 0]
        blank = [i for i, t in enumerate(texts) if isinstance(t[side], str) and t[side] and not t[side].strip()]
        for kind, rows in (("empty", empty), ("blank", blank)):
            if rows:
                text = f"{len(rows):,} of {len(texts):,} rows have {'an empty' if kind == 'empty' else 'a blank'} {name}; fill or remove them"
                yield Finding(kind, text, len(rows), seen.places(rows))


def _duplicates(seen: _Seen) -> Iterator[Finding]:
    """Rows whose inputs occur before, among those that are trained on and on both sides."""
    key = _keys(seen)
    train = seen.sides["train"]
    _, first = np.unique(key[train], return_index=True)
    again = np.setdiff1d(train, train[first])
    if len(again):
        text = f"{len(again):,} of {len(train):,} training rows repeat the input of another one; remove them if that is no wish"
        yield Finding("duplicates", text, len(again), seen.places(again))
    for side in ("validation", "test"):
        if side in seen.sides:
            both = seen.sides[side][np.isin(key[seen.sides[side]], key[train])]
            if len(both):
                text = f"{len(both):,} of {len(seen.sides[side]):,} {side} rows have an input that is trained on, which flatters scores; remove them"
                yield Finding("leak", text, len(both), seen.places(both))


def _torn(seen: _Seen) -> Iterator[Finding]:
    """Inputs that occur with more than one label."""
    key = _keys(seen)
    labelled = np.flatnonzero(seen.label >= 0)
    pairs = np.unique(np.stack([key[labelled], seen.label[labelled]]), axis=1)
    torn = np.flatnonzero(np.bincount(pairs[0], minlength=1) > 1) if pairs.size else np.zeros(0, np.int64)
    if len(torn):
        rows = labelled[np.isin(key[labelled], torn)]
        text = f"{len(torn):,} inputs stand with different labels, in {len(rows):,} rows; decide which label is right"
        yield Finding("labels-differ", text, len(rows), seen.places(rows))


def _keys(seen: _Seen) -> np.ndarray:
    """A number for each row that is equal for equal inputs, int64 [n]; of its own for a row without a text, which is said apart."""
    number: dict[Any, int] = {}
    blank = lambda t: all(not x or (isinstance(x, str) and not x.strip()) for x in t)  # noqa: E731
    return np.array(
        [number.setdefault(i if blank(t) else t, len(number)) for i, t in enumerate(_texts(seen))], np.int64
    )


def _groups(seen: _Seen, data: Mapping[str, Any], partition: Mapping[str, Any]) -> Iterator[Finding]:
    """Columns of a pair, or of prompts, whose values stand on both sides: all questions of a passage belong to one side."""
    text = data.get("text")
    columns = list(text) if isinstance(text, (list, tuple)) else [data["prompt"]] if data.get("prompt") else []
    if "test" not in seen.sides or data.get("test"):
        return
    train, test = seen.sides["train"], seen.sides["test"]
    for name in columns:
        if partition.get("group") or not all(name in t.column_names for t in seen.tables):
            continue
        values = np.concatenate([_numbered(t.column(name)) for t in seen.tables[:1]])
        inside = len(values)
        ours, theirs = train[train < inside], test[test < inside]
        both = theirs[np.isin(values[theirs], values[ours])]
        if len(both) > LEAK * len(theirs):
            said = (
                f"{len(both):,} of {len(theirs):,} test rows share their {name!r} with training rows; "
                f"--set partition.group={name} gives all rows of one to one side"
            )
            yield Finding("group", said, len(both), seen.places(both))


def _numbered(column: pa.ChunkedArray) -> np.ndarray:
    encoded = column.combine_chunks().dictionary_encode()
    if hasattr(encoded, "combine_chunks"):
        encoded = encoded.combine_chunks()
    return np.asarray(encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


# labels ---------------------------------------------------------------------------------------------------------------


def folded(name: str) -> str:
    """A label without its case and its spaces; "" for all spellings of a missing value."""
    plain = " ".join(name.casefold().split())
    return "" if plain in MISSING else plain


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")


def _alike(fed: FederatedData) -> Iterator[Finding]:
    """Classes whose names differ in case or spaces alone, and those that say that there is no value."""
    names = list(fed.label_names or fed.outputs)
    groups: dict[str, list[str]] = {}
    for n in names:
        groups.setdefault(folded(n), []).append(n)
    for plain, same in groups.items():
        if len(same) > 1 and plain:
            yield Finding(
                "labels-alike", f"classes {_list(same)} differ in case or spaces alone; write them as one", len(same)
            )
    absent = groups.get("", [])
    if len(absent) > 1:
        text = (
            f"classes {_list(absent)} all seem to say that a value is missing; write them as one, or remove their rows"
        )
        yield Finding("labels-missing", text, len(absent))
    elif absent and absent[0].casefold().strip() not in ALSO_CLASSES:
        text = f"class {absent[0]!r} seems to say that a value is missing; remove its rows if it is no class"
        yield Finding("labels-missing", text, 1)


def _no_label(seen: _Seen, data: Mapping[str, Any]) -> Iterator[Finding]:
    """A column of classes that is surely something else."""
    import pyarrow as pa

    label, names = data.get("label"), seen.fed.label_names
    table = seen.tables[0]
    if not names or not isinstance(label, str) or label not in table.column_names:
        return
    kind, n = table.column(label).type, table.num_rows
    what = ""
    if pa.types.is_temporal(kind) or sum(bool(DATE.fullmatch(x.strip())) for x in names) > 0.9 * len(names):
        what = f"holds dates ({len(names):,} different ones)"
    elif n >= 20 and len(names) > n / 2:
        what = f"has {len(names):,} values in {n:,} rows, as names or numbers of rows have"
    elif sum(map(len, names)) > LONG_NAME * len(names):
        what = f"holds texts of {sum(map(len, names)) // len(names)} characters on average"
    elif pa.types.is_integer(kind) and len(names) >= MANY_NUMBERS and all(re.fullmatch(r"-?\d+", x) for x in names):
        what = f"holds {len(names):,} different whole numbers, as a quantity has (model.task: regression)"
    if what:
        yield Finding(
            "no-label", f"column {label!r} {what}, which is hardly a label; name another with data.label", len(names)
        )


def _few(fed: FederatedData) -> Iterator[Finding]:
    """Classes with few training rows, and those that no test row has."""
    if not fed.label_names:
        return
    names = fed.label_names
    train = fed.histogram("train").sum(0)
    few = sorted(np.flatnonzero(train < FEW).tolist(), key=lambda i: int(train[i]))
    if few:
        shown = ", ".join(f"{names[i]!r} {train[i]}" for i in few[:SHOWN]) + (", ..." if len(few) > SHOWN else "")
        text = f"{len(few):,} of {len(names):,} classes have fewer than {FEW} training rows ({shown}); join them with others, or give more rows"
        yield Finding("few-rows", text, len(few))
    if "test" in fed.splits and len(fed.splits["test"].rows):
        untested = [names[i] for i in np.flatnonzero((fed.histogram("test").sum(0) == 0) & (train > 0))]
        if untested:
            text = f"{len(untested):,} of {len(names):,} classes have no test row, so no score tells of them ({_list(untested)})"
            yield Finding("untested", text, len(untested))


# tokens ---------------------------------------------------------------------------------------------------------------


def _lengths(tokenizer: Any, doctor: Doctor, limit: int) -> Lengths | None:
    """Tokens of rows before they are cut. Rows at the limit are tokenised once more, whole."""
    if not doctor.encoded or not sum(len(e.source) for e in doctor.encoded):
        return None
    parts = []
    for x, e in zip(doctor.inputs, doctor.encoded, strict=True):
        n = np.diff(e.offsets)
        full = np.flatnonzero(n >= limit) if x.how != "running" else np.zeros(0, np.int64)
        for i in full.tolist():
            row = int(e.source[i])
            n[i] = max(int(n[i]), _whole(tokenizer, x.how, x.first[row], None if x.second is None else x.second[row]))
        parts.append(n)
    every = np.sort(np.concatenate(parts))
    cut = sum(e.truncated for e in doctor.encoded) / len(every)
    at = lambda q: int(every[min(len(every) - 1, int(np.ceil(q * len(every))) - 1)])  # noqa: E731
    return Lengths(at(0.5), at(0.95), int(every[-1]), cut)


def _whole(tokenizer: Any, how: str, first: Any, second: str | None) -> int:
    """Tokens of one row that is not cut."""
    if how == "words":
        return len(tokenizer(list(first), is_split_into_words=True, verbose=False)["input_ids"])
    if how == "conversations":
        return len(chats.tokens(tokenizer, chats.checked(first, ""))[0])
    if how == "continuations":
        plain = sum(
            len(tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"]) for t in (first, second or "")
        )
        return plain + 1 + (tokenizer.num_special_tokens_to_add() > 0)
    return len(tokenizer(first, second, verbose=False)["input_ids"])
