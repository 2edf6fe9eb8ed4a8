"""A first recipe for a file: the columns that were named or guessed, and a comment for every field that people change first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.guess import LOOKED_AT, Column, Guess, columns, guess
from ..data.sources import read
from ..errors import ConfigError, Problem, near
from ..training.tasks import NAMES, TASKS
from . import reading
from .shipped import FOLDER, known

if TYPE_CHECKING:
    import pyarrow as pa

SIZES = (32, 64, 128, 256, 512)  # of max_length
TOKENS_PER_WORD = 1.4  # of English text, about
LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M"  # for tasks over a vocabulary; minilm for all others
CHAT_MODEL = "smollm2"  # for chats, which need a model with a chat template
CLIENTS = 8  # where no column names them


@dataclass(frozen=True)
class Start:
    """A file and what is known of it. seen: its columns; guess: those that a recipe names."""

    source: str
    rows: int
    seen: Sequence[Column]
    guess: Guess
    most: int  # tokens that 95 % of the texts do not exceed, about
    values: int  # different labels
    clients: int  # different values of the column of clients


def look(source: str, given: Mapping[str, Any] | None = None) -> Start:
    """Read a source and guess its columns. given: fields of Guess that are known. Raises DataError, and ConfigError for columns that
    are not there."""
    table = read(source)
    seen = columns(table)
    names = [c.name for c in seen]
    known_ = {k: v for k, v in (given or {}).items() if v}
    bad = [
        Problem(f"--{k}", v, "a column of the data", near(v, names))
        for k, value in known_.items() if k != "task"
        for v in ([value] if isinstance(value, str) else value) if v not in names
    ]  # fmt: skip
    task = known_.get("task")
    if task and task not in NAMES:
        bad.append(Problem("--task", task, f"one of {', '.join(NAMES)}", near(task, NAMES)))
    if bad:
        raise ConfigError(bad)
    return settled(source, table, seen, _with(guess(seen, min(table.num_rows, LOOKED_AT)), known_, seen))


def _with(g: Guess, given: Mapping[str, Any], seen: Sequence[Column]) -> Guess:
    """The guess with what is known in its place, and a task that fits."""
    taken = {v for value in given.values() for v in ([value] if isinstance(value, str) else value)}
    free: dict[str, Any] = {f.name: None for f in fields(g) if f.name != "task" and getattr(g, f.name) in taken}
    g = replace(g, **free)
    g = replace(g, **given)
    if "completion" in given or "prompt" in given:
        g = replace(g, text=None, messages=None, label=None if "label" not in given else g.label)
    elif "text" in given or "label" in given:
        g = replace(g, prompt=None, completion=None, messages=None)
    if "task" in given:
        return g
    kinds = {c.name: c.kind for c in seen}
    first = g.text if isinstance(g.text, str) else g.text[0] if g.text else ""
    if g.completion or g.messages:
        return replace(g, task="causal-lm")
    if g.label:
        kind = kinds[g.label]
        lists = "token-classification" if kinds.get(first) == "list" else "multi-label"
        return replace(g, task={"list": lists, "real": "regression"}.get(kind, "classification"))
    return replace(g, task="causal-lm" if first else "")


def settled(source: str, table: pa.Table, seen: Sequence[Column], g: Guess) -> Start:
    """What is known of a file whose columns are settled. Raises ConfigError where a text is missing."""
    if not g.text and not g.completion and not g.messages:
        shown = ", ".join(f"{c.name} ({c.kind})" for c in seen)
        raise ConfigError([Problem("init", source, f"a column of texts among {shown}", "name it with --text, and the labels with --label")])  # fmt: skip
    texts = [c for v in (g.text, g.prompt) for c in ([v] if isinstance(v, str) else v or ())]
    named = [n for n in (*texts, g.completion, g.messages) if n]
    looked_at = range(min(table.num_rows, LOOKED_AT))
    words = sorted(sum(_words(table.column(n)[i].as_py()) for n in named) for i in looked_at)
    most = int(words[int(0.95 * (len(words) - 1))] * TOKENS_PER_WORD) + 3
    values = {c.name: c.values for c in seen}
    return Start(source, table.num_rows, seen, g, most, values.get(g.label or "", 0), values.get(g.client or "", 0))


def _words(value: Any) -> int:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return sum(
            3 + len(str(m.get("content")).split()) for m in value
        )  # a template writes some tokens around each message
    return 0 if value is None else len(value) if isinstance(value, list) else len(str(value).split())


# writing --------------------------------------------------------------------------------------------------------------


def recipe_text(s: Start, name: str, model: str | None = None, base: Mapping[str, Any] | None = None) -> str:
    """The recipe as YAML with comments. base: another recipe, whose method, training and rounds are taken."""
    g = s.guess
    base = base or {}
    kind = TASKS[g.task]
    task = f"{s.values:,} different labels" if kind.permutes else "fedlora init --task takes another"
    usual = CHAT_MODEL if g.messages else LANGUAGE_MODEL if kind.over_vocabulary else "minilm"
    text = {
        "text": list(g.text) if isinstance(g.text, tuple) else g.text,
        "label": g.label,
        "prompt": list(g.prompt) if isinstance(g.prompt, tuple) else g.prompt,
        "messages": g.messages,
        "completion": g.completion,
    }
    length = next((n for n in SIZES if n >= s.most), SIZES[-1])
    client = {"client": (g.client, f"one client for each of {s.clients:,} values")} if g.client else {}
    lines = [
        f"# {Path(s.source).name}: {s.rows:,} rows; written by fedlora init. Look at it with fedlora check.",
        f"name: {_value(name)}",
        *_section("model", {
            "name": (model or base.get("model", {}).get("name") or usual, "a hub id, a folder from save_pretrained, or minilm"),
            "task": (g.task, task),
        }),
        *_section("data", {
            "source": (s.source, ""),
            **{k: (v, "") for k, v in text.items() if v},
            **client,
            "max_length": (length, f"tokens; 95 % of the texts have about {s.most:,} or fewer"),
        }),
        *_section("partition", {**_partition(s, base), "validation": (0.1, "shares of each client's own rows"), "test": (0.2, "")}),
    ]  # fmt: skip
    if base:
        rest = {k: base[k] for k in ("method", "train", "federation", "evaluation", "sweep") if k in base}
        lines += ["# from the recipe that --from names", reading.dump(rest).rstrip()]
    else:
        lines += [
            *_section("method", {"name": ("fedsa", "fedlora methods lists all"), "rank": (8, ""), "alpha": (16, "")}),
            *_section("train", {
                "steps": (10, "local steps of a client in a round; or epochs: 1"), "batch_size": (16, ""), "lr": (5e-3, ""),
            }),
            *_section("federation", {"rounds": (15, "")}),
            "# sweep: {method.name: [homlora, fedsa], run.seed: [0, 1, 2]}  # compares methods and seeds",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _partition(s: Start, base: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    if s.guess.client:
        return {}
    given = base.get("partition", {})
    clients = max(1, min(int(given.get("clients", CLIENTS)), s.rows // 10))
    skewed = TASKS[s.guess.task].permutes
    kind = (("dirichlet", "classes shared out unevenly; small alpha is skewed"), ("iid", "rows dealt at random"))[
        not skewed
    ]
    alpha = {"alpha": (given.get("alpha", 0.5), "")} if skewed else {}
    return {
        "kind": kind,
        **alpha,
        "clients": (clients, ""),
        "min_size": (max(1, min(10, s.rows // (2 * clients))), "rows of every client at least"),
    }


def _section(name: str, content: Mapping[str, tuple[Any, str]]) -> list[str]:
    """A section with a field a line, its comments below each other."""
    shown = {k: f"  {k}: {_value(v)}" for k, (v, _) in content.items()}
    wide = max((len(shown[k]) for k, (_, c) in content.items() if c), default=0)
    return [f"{name}:", *(f"{shown[k]:<{wide}}  # {c}" if c else shown[k] for k, (_, c) in content.items())]


def _value(value: Any) -> str:
    """A value as YAML has it on one line."""
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value)  # YAML reads JSON's strings, escapes included
    return reading.dump({"k": value}).partition(": ")[2].strip().replace("\n  ", " ")


def source_of(name: str) -> tuple[str, str]:
    """The text of the recipe `name`, a shipped one's name or a file, and a name for its copy. Raises ConfigError."""
    path = Path(name).expanduser()
    if (
        not path.exists()
        and path.parent.name in ("", "recipes", "papers")
        and (path.stem in {p.stem for p in FOLDER.rglob("*.yaml")} or not path.suffix)
    ):
        path = known(path.stem).path
    reading.read(path)
    return path.read_text(encoding="utf-8"), path.stem
