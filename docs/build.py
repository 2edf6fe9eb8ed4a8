"""Writes docs/recipes.md, docs/methods.md, README's list of methods and the JSON schema of recipes from the code: `make docs`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedlora import adapters
from fedlora.federation.guards import GUARDS
from fedlora.methods import METHODS
from fedlora.methods.contract import FAMILIES
from fedlora.methods.facts import WIDTH, facts
from fedlora.recipe.core import defaults, meaning
from fedlora.recipe.hyperparameters import UNTYPED, all_fields, default, own_fields
from fedlora.recipe.schema import schema
from fedlora.recipe.sections import SECTIONS
from fedlora.recipe.shipped import SCHEMA
from fedlora.units import size

HEAD = """# Recipes

A recipe is a YAML file that describes a whole run. `fedlora recipes` lists those that come with the
package, and `fedlora recipes NAME` copies one to the current folder.

Every field has a type, a range and (nearly always) a default. All errors of a recipe are shown at
once. `--set a.b=c` overrides a field on the command line.

The resolved recipe and its hash are stored with the run. The hash covers what decides the result,
and nothing else: a run can be resumed with other threads, but not with another learning rate.

A section `sweep` makes many runs of one file.
`sweep: {method.name: [homlora, fedsa], run.seed: [0, 1, 2]}` makes six. `variants` in it changes
several fields at once. `fedlora sweep FILE --jobs 4` runs four at once.

A comparison at one learning rate favours the method that the rate suits. `search` in a sweep lists
values to try, and chooses them for each setting on validation before the runs begin:

```yaml
sweep:
  method.name: [homlora, pf2lora]
  run.seed: [0, 1, 2, 3, 4]
  search:
    fields: {train.lr: [1.0e-4, 3.0e-4, 1.0e-3]}            # of every method
    methods: {pf2lora: {method.lr_personal: [0.01, 0.1]}}   # and of one
    rounds: 5                                               # of a trial
```

Every setting gets the same number of trials (`trials`; the smallest number of candidates by
default). A setting with more candidates tries a draw of them. Trials have a seed that no run has.
What was tried, what it scored and what it cost stands in `search.json` and on the comparison's page.

Editors with a YAML language server (the YAML extension of VS Code, Neovim, Helix, Emacs) complete
and check recipes by a JSON schema. The first line of a shipped recipe names it, and copies name
that of the installed package.

This page is made from the types by `make docs`.

"""


def allowed(field: dict[str, Any]) -> str:
    """A JSON schema in words."""
    options = field.get("anyOf") or field.get("oneOf")
    if options:
        return " or ".join(allowed(o) for o in options)
    if "enum" in field:
        return ", ".join(f"`{v}`" for v in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        return "a list"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
    }
    out = words.get(field.get("type", ""), "value")
    low, above = field.get("minimum"), field.get("exclusiveMinimum")
    high, below = field.get("maximum"), field.get("exclusiveMaximum")
    parts = [
        f">= {low}" if low is not None else "",
        f"> {above}" if above is not None else "",
        f"<= {high}" if high is not None else "",
        f"< {below}" if below is not None else "",
    ]
    return " ".join([out, *(p for p in parts if p)])


def text() -> str:
    """The page."""
    types = schema()["$defs"]
    out = [HEAD]
    for name, kind in SECTIONS.items():
        out.append(
            f"## {name}\n\n{(kind.__doc__ or '').strip()}\n\n| field | allowed | default | |\n|---|---|---|---|\n"
        )
        values = defaults(kind)
        for field, info in kind.model_fields.items():
            shown = (
                "required"
                if info.is_required()
                else ""
                if values[field] is UNTYPED
                else f"`{json.dumps(values[field])}`"
            )
            out.append(
                f"| `{field}` | {allowed(types[kind.__name__]['properties'][field])} | {shown} | {meaning(info)} |\n"
            )
        out.append("\n")
    out.append(
        "## method\n\nA name and the method's own hyperparameters; the optimizer and clipping come from `train`.\n\n"
        "| method | hyperparameters and defaults |\n|---|---|\n"
    )
    for name, cls in METHODS.items():
        fields = [f"`{f}`" if (v := default(cls, f)) is UNTYPED else f"`{f}: {json.dumps(v)}`" for f in own_fields(cls)]
        out.append(f"| `{name}` | {', '.join(fields)} |\n")
    out.append(
        "\n## federation.guards\n\nA list of names, or of names with fields: `[clip, {trimmed: {share: 0.2}}]`. A guard\n"
        "that cannot serve the method is refused with the reason.\n\n| guard | fields and defaults | |\n|---|---|---|\n"
    )
    for name, guard in GUARDS.items():
        fields = [f"`{f}: {json.dumps(default(guard, f))}`" for f in all_fields(guard)]
        out.append(f"| `{name}` | {', '.join(fields)} | {(guard.__doc__ or '').partition('.')[0]} ({guard.paper}) |\n")
    out.append(f"\n### method.adapter\n\n```text\n{adapters.described()}\n```\n")
    return "".join(out)


METHODS_HEAD = f"""# Methods

What each method trains, what travels and what stays, with its default hyperparameters.
`fedlora methods` prints the same, and `fedlora methods --cost MODEL` measures time and memory.

A and B are the two factors of an adapter; the head is the classifier on top. One switch
(`method.head`) says whether the head is shared, personal or frozen, the same for all methods of a
comparison. Frozen leaves are trained by nobody. Bytes are those of a client's first messages, down
and up, in fp32 for one layer of {WIDTH} x {WIDTH}, without the head. A method is exact where the
product of what the uploads become is the mean of their products; `–` where that says nothing, as
one factor stays at the client or there are no factors.

This page is made from the methods by `make docs`.
"""
NOTEBOOK = Path(__file__).parents[1] / "examples/notebook.py"
README, BEGIN, END = (
    Path(__file__).parent.parent / "README.md",
    "<!-- methods: by make docs -->\n",
    "<!-- end of methods -->",
)


def paper(name: str) -> str:
    """A link to a paper on arXiv; other names as they are."""
    number = name.removeprefix("arXiv:")
    return name if number == name else f"[{number}](https://arxiv.org/abs/{number})"


def methods() -> str:
    """The page on methods: a table for each family."""
    found = [facts(m) for m in METHODS.values()]
    out = [METHODS_HEAD]
    for family, title in FAMILIES.items():
        out.append(
            f"\n## {title}\n\n| name | method | paper | trained | shared | personal | frozen | down, up | exact |\n"
            "|---|---|---|---|---|---|---|---|---|\n"
        )
        for f in found:
            if f["family"] == family:
                leaves = " | ".join(", ".join(f[k]) for k in ("trained", "shared", "personal", "frozen"))
                average = {True: "yes", False: "no", None: "–"}[f["exact"]]
                sent = f"{size(f['down'])}, {size(f['up'])}"
                out.append(
                    f"| `{f['name']}` | {f['title']}: {f['what']} | {paper(f['paper'])} | {leaves} | {sent} | {average} |\n"
                )
    return "".join(out)


def listed() -> str:
    """README's short list: the methods of each family by name."""
    out = ["| | methods |\n|---|---|\n"]
    for family, title in FAMILIES.items():
        names = ", ".join(f"{m.title} `{n}`" for n, m in METHODS.items() if m.family == family)
        out.append(f"| {title} | {names} |\n")
    return "".join(out)


def readme() -> str:
    """README with its list of methods made anew."""
    old = README.read_text(encoding="utf-8")
    a, b = old.index(BEGIN) + len(BEGIN), old.index(END)
    return old[:a] + listed() + old[b:]


def cells(text: str) -> list[tuple[str, str]]:
    """The cells of a script in which lines "# %%" begin them, as ("markdown" or "code", its text)."""
    out = []
    for part in text.split("# %%")[1:]:
        first, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in first else "code"
        lines = body.strip("\n").splitlines()
        said = [x.removeprefix("#").removeprefix(" ") for x in lines] if kind == "markdown" else lines
        out.append((kind, "\n".join(said)))
    return out


def notebook(text: str) -> str:
    """A Jupyter notebook (nbformat 4.5) without outputs, made of a script's cells; the script is what is edited."""
    made: list[dict[str, Any]] = []
    for i, (kind, said) in enumerate(cells(text)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{i}", "metadata": {}}
        cell |= {"execution_count": None, "outputs": []} if kind == "code" else {}
        made.append(cell | {"source": said.splitlines(keepends=True)})
    about = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return json.dumps({"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "recipes.md").write_text(text(), encoding="utf-8")
    (Path(__file__).parent / "methods.md").write_text(methods(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
    SCHEMA.write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")
    NOTEBOOK.with_suffix(".ipynb").write_text(notebook(NOTEBOOK.read_text(encoding="utf-8")), encoding="utf-8")
