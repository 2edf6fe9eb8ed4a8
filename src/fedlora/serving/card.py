"""The model card of an export: what the model is, how well it does, and the lines that load it."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import yaml

from ..federation.records import EvalLine, read_lines
from ..federation.run import Federation
from ..training.tasks import TASKS

if TYPE_CHECKING:
    from ..recipe import Recipe
    from .export import Served

PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForCausalLM": "text-generation",
}


def card(recipe: Recipe, fed: Federation, of: Served, client: str | None, base: str, merged: bool) -> str:
    """README.md of an export. base: hub id or folder of the base; merged: the folder holds a whole model."""
    task = TASKS[recipe.model.task]
    pipeline = PIPELINES[task.auto]
    front = {
        "base_model": base, "library_name": "transformers" if merged else "peft", "pipeline_tag": pipeline,
        "tags": ["fedlora", "federated-learning", *([] if merged else ["lora"])],
    }  # fmt: skip
    method = type(fed.method)
    paper = f" ({method.paper})" if getattr(method, "paper", "") else ""
    whose = "The global model" if client is None else f"The model of client `{client}`"
    names = task.names(fed.data)
    facts = {
        "base": f"`{base}`" + (f", revision `{recipe.model.revision}`" if recipe.model.revision else ""),
        **(
            {"trained over": "the base in int8, and loaded over its own weights"}
            if recipe.numbers.dtype == "int8"
            else {}
        ),
        "task": recipe.model.task + (f": {', '.join(names)}" if names else ""),
        "input": _input(recipe),
        "trained on": _rows(fed, client),
        "model of": str(of),
        "test": _scores(fed, of, client) or "no scores of this round",
        "recipe": f"`{recipe.name}`, hash `{recipe.hash}`",
    }
    table = "\n".join(f"| {k} | {v.replace('|', chr(92) + '|')} |" for k, v in facts.items())
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {fed.method.title}: {recipe.name}",
        f"{whose}, trained with {fed.method.title}{paper} by fedlora {version('fedlora')}.",
        f"| | |\n|---|---|\n{table}",
        "## Load it",
        f"In the folder of this file:\n\n```python\n{code(task, names, base, recipe.model.revision, merged)}```",
    ]
    return "\n\n".join(lines) + "\n"


def code(task: Any, names: Any, base: str, revision: str | None, merged: bool) -> str:
    """Lines of Python that load the folder "." and make a pipeline of it."""
    pipeline = PIPELINES[task.auto]
    if merged:
        return f'from transformers import pipeline\n\npipe = pipeline("{pipeline}", model=".")\n'
    extra = task.config(len(names) or 2)
    if names:
        extra |= {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    if task.has_head:
        extra["ignore_mismatched_sizes"] = True  # the base may have a head for other classes; the adapter has its own
    if revision:
        extra["revision"] = revision
    more = "".join(f",\n    {k}={v!r}" for k, v in extra.items())
    return (
        f"from peft import PeftModel\nfrom transformers import {task.auto}, AutoTokenizer, pipeline\n\n"
        f"base = {task.auto}.from_pretrained(\n    {base!r}{more},\n)\n"
        'model = PeftModel.from_pretrained(base, ".")\n'
        f'pipe = pipeline("{pipeline}", model=model.merge_and_unload(), tokenizer=AutoTokenizer.from_pretrained("."))\n'
    )


def _input(recipe: Recipe) -> str:
    d = recipe.data
    if d.template is not None:
        what = f"the template `{d.template}`"
    elif isinstance(d.text, (list, tuple)):
        what = "pairs of texts: " + " and ".join(f"`{c}`" for c in d.text)
    else:
        what = f"texts: `{d.prompt or d.text or 'text'}`"
    if isinstance(d.prompt, tuple):
        what = "questions, one part under the other: " + ", ".join(f"`{c}`" for c in d.prompt)
    if d.messages is not None:
        what = f"chats: `{d.messages}`"
    answer = f", then `{d.completion}`" if d.completion else ""
    if d.messages or d.chat:
        answer += ", through the model's chat template"
    return f"{what}{answer}; at most {d.max_length} tokens"


def _rows(fed: Federation, client: str | None) -> str:
    train = fed.data.splits["train"].sizes
    total = f"{int(train[: fed.training].sum()):,} rows of {fed.training:,} clients"
    return total if client is None else f"{total}; {int(train[fed.index[client]]):,} rows are this client's"


def _scores(fed: Federation, of: Served, client: str | None) -> str:
    """The test scores of this very model, from the records: a client's own, or the mean over clients."""
    if of.round is None:
        return ""
    view = "global" if client is None else "personal"
    wanted = (view, "test", of.round, None)
    for line in read_lines(fed.store.root):
        if isinstance(line, EvalLine) and (line.view, line.split, line.round, line.stage) == wanted:
            found = line.mean if client is None else line.clients.get(client, {})
            said = ", ".join(f"{k} {v:.4g}" for k, v in sorted(found.items()) if k != "n")
            where = "mean over clients" if client is None else "on this client's own rows"
            return f"{said} ({where})" if said else ""
    return ""
