"""The examples of a source: rows read, texts tokenised once and cached, labels numbered."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import cache as user_cache
from ..errors import DataError
from . import encode
from .columns import codes, column, full, strings
from .encode import Encoded
from .examples import Tokens
from .files import FORMATS
from .labels import classes, reals
from .sources import CLIENT, read

if TYPE_CHECKING:
    import pyarrow as pa

DEMO = {"text": "text", "label": "area"}  # the columns of the built-in corpus; its natural clients are modules
DEMO_CLIENT = "module"


@dataclass(frozen=True)
class Column:
    """A column as numbers: codes int64 [n], and the value of each number."""

    codes: np.ndarray
    names: Sequence[Any]

    def at(self, rows: np.ndarray) -> Column:
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


def load(
    tokenizer: Any, data: Mapping[str, Any], task: str, seed: int, by: str | None = None, cache: Path | None = None
) -> Loaded:
    """Rows of the recipe section `data`, ready to train on.

    by: the column that the partition asks for. cache: folder of tokenised texts; None for the user's cache folder.
    Raises DataError for what is missing, malformed or unlabelled.
    """
    if data["source"] == "demo":
        data = {**data, **{k: v for k, v in DEMO.items() if data.get(k) is None}}
    tables = _tables(data, seed)
    encoded = [_tokens(tokenizer, t, data, task, cache) for t in tables.values()]
    origin = np.concatenate([np.full(len(e.source), o, np.int8) for o, e in zip(tables, encoded, strict=True)])
    targets, groups, names = _targets(tables, data, task)
    source = [e.source for e in encoded]
    take = lambda parts: None if parts is None else np.concatenate([p[s] for p, s in zip(parts, source, strict=True)])  # noqa: E731
    tokens = dataclasses.replace(_joined(encoded), labels=take(targets), pad_id=tokenizer.pad_token_id or 0)
    return Loaded(tokens, origin, take(groups), names, _column(tables, by, source), sum(e.truncated for e in encoded))


def _tables(data: Mapping[str, Any], seed: int) -> dict[int, pa.Table]:
    """Rows by origin."""
    shared: dict[str, Any] = {k: data.get(k) for k in ("subset", "encoding", "client", "limit")}
    shared["encoding"] = shared["encoding"] or "utf-8"
    tables = {0: read(data["source"], format=data.get("format", "auto"), split=data.get("split"), seed=seed, **shared)}
    for origin, field in ((1, "validation"), (2, "test")):
        where = data.get(field)
        if where is not None:
            path = Path(where).expanduser()
            is_file = path.exists() or path.suffix.lower() in FORMATS or "*" in where
            source, split = (where, None) if is_file else (data["source"], where)
            tables[origin] = read(source, format=data.get("format", "auto"), split=split, seed=seed, **shared)
    return tables


def _targets(tables: Mapping[int, pa.Table], data: Mapping[str, Any], task: str) -> tuple[Any, Any, tuple[str, ...]]:
    """(targets per table, classes per table, names of the classes)."""
    label = data.get("label")
    if task == "regression":
        return [reals(t, label) for t in tables.values()], None, ()  # type: ignore[arg-type]
    if label is None:
        return None, None, ()
    first, names = classes(tables[0], label, data.get("classes"))
    ids = [first] + [classes(t, label, names, f"data.{_FIELD[o]}")[0] for o, t in tables.items() if o]
    if task == "classification" and len(names) < 2:
        raise DataError(f"data.label: column {label!r} holds only {names[0]!r}, expected two or more classes")
    return (ids if task == "classification" else None), ids, names


_FIELD = {1: "validation", 2: "test"}


def _column(tables: Mapping[int, pa.Table], by: str | None, source: Sequence[np.ndarray]) -> Column | None:
    """The column `by` over all rows."""
    if by is None:
        return None
    import pyarrow as pa

    by = CLIENT if by == "file" and all(CLIENT in t.column_names for t in tables.values()) else by
    parts = [full(t, by, "partition.column") for t in tables.values()]
    kinds = {p.type for p in parts}
    if len(kinds) > 1:
        raise DataError(
            f"partition.column: {by!r} is {' and '.join(map(str, kinds))} in different files, expected one type"
        )
    numbers, names = codes(
        pa.chunked_array([c for p in parts for c in p.chunks], parts[0].type), by, "partition.column"
    )
    starts = np.cumsum([0, *(len(p) for p in parts)])
    return Column(np.concatenate([numbers[a + s] for a, s in zip(starts, source, strict=False)]), names)


# texts ----------------------------------------------------------------------------------------------------------------


def _tokens(tokenizer: Any, table: pa.Table, data: Mapping[str, Any], task: str, cache: Path | None) -> Encoded:
    """Token rows of one table, from the cache where it has them."""
    length = data["max_length"]
    first: list[str]
    second: list[str] | None = None
    text = data.get("text")
    if task == "causal-lm" and data.get("completion"):
        kind, second = "continuations", strings(table, data["completion"], "data.completion")
        first = _filled(table, data) if data.get("template") else strings(table, data["prompt"], "data.prompt")
    elif task == "causal-lm":
        kind, first = "running", _filled(table, data) if data.get("template") else strings(table, text, "data.text")  # type: ignore[arg-type]
    elif data.get("template"):
        kind, first = "texts", _filled(table, data)
    elif isinstance(text, str):
        kind, first = "texts", strings(table, text, "data.text")
    else:
        kind, (first, second) = "texts", (strings(table, c, "data.text") for c in text or ())

    def make() -> Encoded:
        if kind == "running":
            return encode.running(tokenizer, first, length)
        if kind == "continuations":
            return encode.continuations(tokenizer, first, second or [], length)
        return encode.texts(tokenizer, first, second, length)

    encode.room(tokenizer, length, pair=kind == "texts" and second is not None)
    return _cached(_fingerprint(tokenizer, kind, length, first, second), cache, make)


def _filled(table: pa.Table, data: Mapping[str, Any]) -> list[str]:
    """data.template with the columns it names, row by row; {prompt} and {text} are the columns of that name in the recipe."""
    template = data["template"]
    try:
        names = {n for _, n, _, _ in string.Formatter().parse(template) if n is not None}
    except ValueError as e:
        raise DataError(
            f"data.template: {template!r} is no format string ({e}); double the braces that are text"
        ) from e
    alias = {n: data[n] for n in ("prompt", "text") if isinstance(data.get(n), str)}
    for n in names:
        column(table, alias.get(n) or n, "data.template")
    values = {n: strings(table, alias.get(n) or n, "data.template") for n in names}
    return [template.format(**{n: v[i] for n, v in values.items()}) for i in range(table.num_rows)]


def _joined(parts: Sequence[Encoded]) -> Tokens:
    """Token rows of several tables behind each other."""
    shift = np.cumsum([0, *(len(p.flat) for p in parts)])
    offsets = np.concatenate([[0], *(p.offsets[1:] + s for p, s in zip(parts, shift, strict=False))]).astype(np.int64)
    extra: dict[str, Any] = {
        n: None if getattr(parts[0], n) is None else np.concatenate([getattr(p, n) for p in parts])
        for n in ("segment", "prompt", "chars")
    }
    return Tokens(np.concatenate([p.flat for p in parts]), offsets, **extra)


# cache ----------------------------------------------------------------------------------------------------------------


def _fingerprint(tokenizer: Any, kind: str, length: int, first: Sequence[str], second: Sequence[str] | None) -> str:
    """Of everything that decides the tokens: the texts themselves, not the name or date of a file."""
    digest = hashlib.blake2b(digest_size=20)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # without what an earlier call has set: it is no part of the tokenizer
        inner = json.loads(backend.to_str())
        vocabulary = json.dumps({k: v for k, v in inner.items() if k not in ("truncation", "padding")}, sort_keys=True)
    else:
        vocabulary = repr(sorted(tokenizer.get_vocab().items()))
    facts = (
        1,
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
