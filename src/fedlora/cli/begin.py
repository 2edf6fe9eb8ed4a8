"""`fedlora init`: a first recipe for a file, or a copy of a recipe."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ..errors import ConfigError, Problem
from ..recipe import reading, start
from ..recipe.core import Recipe
from ..recipe.shipped import write_new

out = Console()
ASKED = (
    ("text", "the texts"),
    ("label", "the labels (none: a language model)"),
    ("client", "the clients (none: rows are dealt out)"),
)


def init(
    source: str | None, base: str | None, given: Mapping[str, Any], model: str | None, output: Path | None, ask: bool
) -> None:
    """Write a recipe, and say what it holds and what to do next."""
    text, name = (None, None) if base is None else start.source_of(base)
    if source is None:
        if text is None or name is None:
            raise ConfigError([Problem("init", None, "a file of data, or --from RECIPE", "fedlora init data.csv")])
        if odd := [k for k, v in {**given, "model": model}.items() if v]:
            raise ConfigError(
                [Problem(f"--{odd[0]}", "an option", "a file of data beside it", "fedlora init data.csv")]
            )
        path = write_new(output or Path(f"{name}.yaml"), text, "init")
        out.print(
            f"{path}: a copy of {name}. Next: fedlora check {path}", soft_wrap=True, highlight=False, markup=False
        )
        return
    found = start.look(source, given)
    if (
        ask
        and sys.stdin.isatty()
        and not found.guess.completion
        and not found.guess.messages
        and not isinstance(found.guess.text, tuple)
    ):
        found = start.look(source, {**given, **_asked(found, given)})
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).stem).strip("-._") or "mine"
    target = output or Path(f"{stem}.yaml")
    written = start.recipe_text(found, stem, model, reading.parse(text, base or "") if text is not None else None)
    raw = reading.mapping(reading.parse(written, str(target)), str(target))
    Recipe.from_dict({k: v for k, v in raw.items() if k != "sweep"})
    path = write_new(target, written, "init")
    g = found.guess
    columns = {
        "text": g.text,
        "label": g.label,
        "prompt": g.prompt,
        "messages": g.messages,
        "completion": g.completion,
        "client": g.client,
    }
    said = ", ".join(f"{k} {' and '.join(v) if isinstance(v, tuple) else v!r}" for k, v in columns.items() if v)
    out.print(f"{path}: {g.task}, {said}. Next: fedlora check {path}", soft_wrap=True, highlight=False, markup=False)


def _asked(found: start.Start, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a person says of the columns that were not named; the guess is the default."""
    for c in found.seen:
        out.print(f"  {c.name}: {c.kind}, {c.values:,} values, such as {c.example!r}", highlight=False, markup=False)
    names = [c.name for c in found.seen]
    answers: dict[str, Any] = {}
    for field, what in ASKED:
        if given.get(field):
            continue
        usual = getattr(found.guess, field) or "none"
        said = click.prompt(f"column of {what}", default=usual, type=click.Choice([*names, "none"]), show_choices=False)
        answers[field] = None if said == "none" else said
    return answers
