"""Which column of a table is the text, the label, the client: by its type, its values and its name. A guess that people can change."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .doctor import DATE, LONG_NAME

if TYPE_CHECKING:
    import pyarrow as pa

LOOKED_AT = 5000  # rows
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "passage"), ("question1", "question2"),
         ("question", "sentence"), ("text1", "text2"), ("text_a", "text_b"), ("query", "document"))  # fmt: skip
PROMPTS = ("prompt", "instruction", "question", "input", "query", "context", "meaning_representation", "mr", "source")
COMPLETIONS = ("completion", "response", "output", "answer", "target", "reference", "human_reference", "ref", "chosen")
TEXTS = (
    "text",
    "sentence",
    "review",
    "content",
    "body",
    "headline",
    "title",
    "document",
    "message",
    "abstract",
    "tokens",
    "words",
    "note",
)
LABELS = ("label", "labels", "class", "category", "sentiment", "target", "topic", "intent", "diagnosis", "tags", "ner_tags", "tag",
          "score", "rating", "stars", "y")  # fmt: skip
CLIENTS = ("client", "client_id", "site", "hospital", "clinic", "institution", "center", "centre", "user", "user_id", "author", "speaker",
           "writer", "device", "device_id", "company")  # fmt: skip
MOST_CLASSES = 200


@dataclass(frozen=True)
class Column:
    """What is seen of a column. kind: text, list, chat, whole, real, date or other; values: different ones; words: mean of a text."""

    name: str
    kind: str
    values: int
    words: float
    missing: int
    example: str


@dataclass(frozen=True)
class Guess:
    """A recipe's columns. Empty where nothing fits; task and text, or prompt and completion, or messages, are needed."""

    task: str = ""
    text: str | tuple[str, str] | None = None
    label: str | None = None
    prompt: str | tuple[str, ...] | None = None
    completion: str | None = None
    client: str | None = None
    messages: str | None = None


def columns(table: pa.Table) -> list[Column]:
    """What is seen of every column, in the first rows."""
    return [_column(n, table.column(n).slice(0, LOOKED_AT)) for n in table.column_names if not n.startswith("__")]


def _column(name: str, values: pa.ChunkedArray) -> Column:
    import pyarrow as pa

    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    items = [v for v in values.to_pylist() if v is not None]
    what = "other"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        what = "date" if items and all(DATE.fullmatch(v.strip()) for v in items[:200]) else "text"
    elif pa.types.is_temporal(kind):
        what = "date"
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        what = "list" if not pa.types.is_nested(kind.value_type) else "chat" if _chat(kind.value_type) else "other"
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        what = "whole"
    elif pa.types.is_floating(kind):
        what = "whole" if all(float(v).is_integer() for v in items) else "real"
    words = sum(len(str(v).split()) for v in items) / max(len(items), 1) if what == "text" else 0.0
    different = len({str(v) for v in items})
    return Column(name, what, different, words, len(values) - len(items), str(items[0])[:40] if items else "")


def _chat(message: pa.DataType) -> bool:
    """Whether a list of these is a chat: messages with a role and a content."""
    import pyarrow as pa

    return pa.types.is_struct(message) and {"role", "content"} <= {field.name for field in message}


def guess(seen: Sequence[Column], rows: int) -> Guess:
    """The columns that fit best. rows: looked at."""
    by = {_plain(c.name): c for c in reversed(seen)}
    client = next((by[n].name for n in CLIENTS if n in by and _divides(by[n], rows)), None)
    for a, b in PAIRS:
        if a in by and b in by and (label := _label(seen, rows, {by[a].name, by[b].name, client})):
            return Guess(_task(by[a], label), (by[a].name, by[b].name), label.name, client=client)
    if chat := next((c for c in seen if c.kind == "chat"), None):
        return Guess("causal-lm", messages=chat.name, client=client)
    text = _text(seen, by, {client})
    label = _label(seen, rows, {client, text.name if text else None})
    prompt, completion = (
        next((by[n] for n in names if n in by and by[n].kind == "text"), None) for names in (PROMPTS, COMPLETIONS)
    )
    if (
        prompt
        and completion
        and prompt is not completion
        and not (label and label.name.lower() in LABELS and label is not completion)
    ):
        if (
            _plain(prompt.name) == "instruction" and "input" in by
        ):  # the usual names of instruction sets: what to do, and to what
            both = (prompt.name, by["input"].name)
            return Guess("causal-lm", prompt=both, completion=completion.name, client=client)
        return Guess("causal-lm", prompt=prompt.name, completion=completion.name, client=client)
    if text is None:
        return Guess(client=client)
    if label is None:
        return Guess("causal-lm" if text.kind == "text" else "", text.name, client=client)
    return Guess(_task(text, label), text.name, label.name, client=client)


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _divides(c: Column, rows: int) -> bool:
    """Whether the values of a column may be clients: several, with rows enough."""
    return c.kind in ("text", "whole") and 2 <= c.values <= max(2, rows // 4) and not c.missing


def _text(seen: Sequence[Column], by: dict[str, Column], not_: set[Any]) -> Column | None:
    named = next((by[n] for n in TEXTS if n in by and by[n].kind in ("text", "list")), None)
    if named:
        return named
    long = [c for c in seen if c.kind == "text" and c.name not in not_ and c.words > 3]
    return max(long, key=lambda c: c.words, default=None)


def _label(seen: Sequence[Column], rows: int, not_: set[Any]) -> Column | None:
    """The column of labels: by its name, else the one with the fewest values that repeat."""
    free = [c for c in seen if c.name not in not_ and (c.values >= 2 or c.kind == "list") and c.kind != "date"]
    for n in LABELS:
        for c in free:
            if _plain(c.name) == n and (c.kind in ("list", "real") or c.values <= max(MOST_CLASSES, rows // 2)):
                return c
    lists = [c for c in free if c.kind == "list"]
    if lists:
        return lists[0]
    few = [
        c
        for c in free
        if c.kind in ("text", "whole")
        and c.values <= min(50, max(2, rows // 5))
        and len(c.example) < LONG_NAME
        and c.words < 4
    ]
    return min(few, key=lambda c: c.values, default=None)


def _task(text: Column, label: Column) -> str:
    """Of a text and a label of these kinds."""
    if label.kind == "list":
        return "token-classification" if text.kind == "list" else "multi-label"
    return "regression" if label.kind == "real" else "classification"
