"""A text made of columns: plain `{name}` and nothing else, so that a template can neither format nor look inside a value."""

from __future__ import annotations

import string
from collections.abc import Mapping


def parts(template: str) -> list[tuple[str, str | None]]:
    """The template as (text, name of the column after it or None), in its order.

    Raises ValueError for anything but plain names: a format such as {text:>100000000} would ask for as many bytes a row as
    its writer likes, and {text.name} or {text[0]} would look inside a value.
    """
    out: list[tuple[str, str | None]] = []
    for text, name, form, conversion in string.Formatter().parse(template):
        if name is not None:
            if not name or name.isdigit():
                raise ValueError("braces without the name of a column")
            if form or conversion:
                raise ValueError(f"a format in {{{name}}}, whose value is written as it is")
            if any(c in name for c in ".[]"):
                raise ValueError(f"a look inside a value in {{{name}}}")
        out.append((text, name))
    return out


def names(template: str) -> list[str]:
    """The columns that it names, each once. Raises ValueError as `parts` does."""
    return list(dict.fromkeys(n for _, n in parts(template) if n is not None))


def fill(cut: list[tuple[str, str | None]], row: Mapping[str, str]) -> str:
    """One row's text, from the parts of a template."""
    return "".join(text + (row[name] if name is not None else "") for text, name in cut)
