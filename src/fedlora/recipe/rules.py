"""Rules that join fields. Each is a function of the sections it reads, and stops at a field that is wrong by itself."""

from __future__ import annotations

import codecs
import contextlib
import inspect
import re
import string
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..data.addresses import hidden, scheme, unfit
from ..data.delimiters import DELIMITERS, WORDS
from ..data.template import names
from ..errors import Problem, near
from ..units import counted
from .sections import Data, Evaluation, Federation, Generation, Model, Partition, Run, Section, Train

if TYPE_CHECKING:
    from ..training.task import Task

Rule = Callable[..., Iterator[Problem]]
PLACES = ("name", "hash", "seed", "method")  # the placeholders that run.output may hold


def work(train: Train) -> Iterator[Problem]:
    if (train.steps is None) == (train.epochs is None):
        both = {"steps": train.steps, "epochs": train.epochs}
        yield Problem("train.steps", both, "exactly one of steps and epochs", "set the other one to null")
    if train.accumulation > train.batch_size:
        yield Problem(
            "train.accumulation",
            train.accumulation,
            f"at most train.batch_size, {train.batch_size}",
            "a part holds a row or more",
        )
    if train.optimizer == "adamw" and train.momentum:
        yield Problem("train.momentum", train.momentum, "0 with adamw", "set train.betas, or train.optimizer to sgd")
    if train.optimizer == "sgd" and train.betas != Train.model_fields["betas"].default:
        yield Problem(
            "train.betas", list(train.betas), "no betas with sgd", "set train.momentum, or train.optimizer to adamw"
        )


def targets(model: Model) -> Iterator[Problem]:
    if isinstance(model.targets, str):
        try:
            re.compile(model.targets)
        except re.error as e:
            yield Problem("model.targets", model.targets, "auto, names of layers, or a regular expression", e.msg)


def columns(model: Model, data: Data) -> Iterator[Problem]:
    if data.source == "demo":
        return  # the built-in corpus has fixed columns
    yield from _task(model).problems(data)
    texts = (data.text,) if isinstance(data.text, str) else data.text or ()
    if len(set(texts)) < len(texts):
        yield Problem("data.text", list(texts), "two different columns", "give one column for single texts")
    if data.label is not None and data.label in texts:
        yield Problem("data.label", data.label, "another column than the text", "name the column of the labels")


def _tasks() -> dict[str, type[Task]]:
    from ..training.tasks import TASKS

    return TASKS


def _task(model: Model) -> type[Task]:
    return _tasks()[model.task]


def weights(model: Model, train: Train, partition: Partition) -> Iterator[Problem]:
    if train.class_weights is None:
        return
    if not _task(model).weighted:
        yield Problem(
            "train.class_weights",
            train.class_weights,
            f"null for {model.task}",
            "only classification has one class a row",
        )
    if partition.permute_labels:
        what = "a label is another class at every client"
        yield Problem("train.class_weights", train.class_weights, "null beside partition.permute_labels", what)


def patience(federation: Federation, partition: Partition, data: Data) -> Iterator[Problem]:
    if federation.patience is not None and not partition.validation and data.validation is None:
        what = "set partition.validation or data.validation: test rows must not decide when to stop"
        yield Problem("federation.patience", federation.patience, "null without validation rows", what)


def options(model: Model) -> Iterator[Problem]:
    every = sorted({o for t in _tasks().values() for o in t.options})
    for field in every:
        value, usual = getattr(model, field), Model.model_fields[field].default
        if value != usual and field not in _task(model).options:
            whose = ", ".join(name for name, t in _tasks().items() if field in t.options)
            yield Problem(f"model.{field}", value, f"{usual} for {model.task}", f"only {whose} reads it: leave it out")


def generation(model: Model, data: Data, generation: Generation) -> Iterator[Problem]:
    g = generation
    if g.scores and not _task(model).over_vocabulary:
        yield Problem("generation.scores", list(g.scores), f"none for {model.task}", "set model.task to causal-lm")
    elif g.scores and data.completion is None and data.messages is None:
        what = "name data.prompt and data.completion, or data.messages, or leave it out"
        yield Problem("generation.scores", list(g.scores), "none for texts without prompts", what)
    if len(set(g.scores)) < len(g.scores):
        yield Problem("generation.scores", list(g.scores), "each score once", "drop the repetition")
    if g.choices is not None and (same := sorted({c for c in g.choices if g.choices.count(c) > 1})):
        yield Problem("generation.choices", same, "each choice once", "drop the repetition")
    if g.choices is not None and not g.scores:
        yield Problem("generation.choices", list(g.choices), "scores beside it", "set generation.scores to [accuracy]")
    if g.choices is None and "accuracy" in g.scores:
        what = "list the texts that may be answers, or take exact-match"
        yield Problem("generation.choices", None, "two texts or more for accuracy", what)
    if g.choices is None and g.per != "choice":
        yield Problem("generation.per", g.per, "choice without generation.choices", "leave it out")
    if g.choices is not None and g.temperature:
        yield Problem(
            "generation.temperature", g.temperature, "0 beside generation.choices", "nothing is drawn: leave it out"
        )
    for field in ("top_p", "top_k"):
        value, usual = getattr(g, field), Generation.model_fields[field].default
        if not g.temperature and value != usual:
            yield Problem(
                f"generation.{field}", value, f"{usual} at temperature 0", "set generation.temperature to draw"
            )


def template(data: Data) -> Iterator[Problem]:
    if data.template is None:
        return
    try:
        names(data.template)
    except ValueError as e:
        yield Problem(
            "data.template", data.template, "plain {name} of columns, without formats or attributes",
            f"it has {e}; double the braces that are text",
        )  # fmt: skip


def encoding(data: Data) -> Iterator[Problem]:
    try:
        codecs.lookup(data.encoding)
    except LookupError:
        yield Problem(
            "data.encoding",
            data.encoding,
            "a character encoding",
            near(data.encoding, ["utf-8", "utf-16", "latin-1", "cp1252"]),
        )


def delimiter(data: Data) -> Iterator[Problem]:
    d = data.delimiter
    if d in ("auto", *WORDS):
        return
    if len(d) != 1 or not d.isascii() or d.isalnum() or d in '"\r\n':
        hint = near(d, ["auto", *WORDS, *DELIMITERS]) if len(d) > 1 else "the file's own, which no text holds unquoted"
        yield Problem(
            "data.delimiter", d, "auto, tab, or one character that is no letter, digit or quotation mark", hint
        )


def source(data: Data) -> Iterator[Problem]:
    several = [data.source] if isinstance(data.source, str) else list(data.source)
    if len(several) > 1:
        several = [s for s in several if scheme(s) is not None]
        for s in several:
            yield Problem("data.source", hidden(s), "files in a list of several", "an address stands alone")
    elif wrong := unfit(several[0], data.query):
        yield wrong
    for field in ("test", "validation"):
        where = getattr(data, field)
        if where is not None and scheme(where) is not None:
            yield Problem(f"data.{field}", hidden(where), "a file, a split, or a query of the database in data.source",
                          "fetch a file first, and name it")  # fmt: skip


def clients(partition: Partition, data: Data) -> Iterator[Problem]:
    p = partition
    if p.validation + p.test >= 1:
        yield Problem(
            "partition.validation",
            p.validation,
            f"less than {1 - p.test:g} beside test {p.test:g}",
            "leave rows to train on",
        )
    if not natural(p, data) and p.unseen >= p.clients:
        yield Problem(
            "partition.unseen", p.unseen, f"less than partition.clients, {p.clients}", "leave clients to train"
        )
    if data.client is not None and p.kind not in ("iid", "column"):
        yield Problem(
            "partition.kind",
            p.kind,
            "column (or nothing) beside data.client",
            "the data say who the clients are: drop one",
        )
    if p.kind == "domain" and p.column is None:
        yield Problem("partition.column", None, "a column for kind domain", "name the column of the domains")
    if p.kind == "column" and p.column is None and data.client is None and data.source != "demo":
        yield Problem("partition.column", None, "a column for kind column", "name it, or set data.client")


def natural(p: Partition, data: Data) -> bool:
    """Whether the data say how many clients there are."""
    return p.kind == "column" or data.client is not None


def labels(model: Model, data: Data, partition: Partition) -> Iterator[Problem]:
    from ..data.partitions import PARTITIONS

    task = _task(model)
    if PARTITIONS[partition.kind].by_label and not task.grouped(data):
        why = "or name a column of classes as data.label" if task.over_vocabulary else f"{model.task} has no classes"
        yield Problem(
            "partition.kind", partition.kind, "a kind that needs no classes", f"choose iid, quantity or column; {why}"
        )
    if partition.permute_labels and not task.permutes:
        yield Problem("partition.permute_labels", True, f"false for {model.task}", "only classes can be permuted")


def cohort(federation: Federation, partition: Partition, data: Data) -> Iterator[Problem]:
    if natural(partition, data) or partition.unseen >= partition.clients:
        return
    training, c = partition.clients - partition.unseen, federation.clients_per_round
    if isinstance(c, int) and c > training:
        yield Problem(
            "federation.clients_per_round",
            c,
            f"at most {training}, the clients that train",
            "lower it, or null for all",
        )
        return
    size = counted(c, training)
    if federation.min_clients > size:
        yield Problem(
            "federation.min_clients", federation.min_clients, f"at most {size}, the clients of a round", "lower it"
        )


def scored(evaluation: Evaluation, partition: Partition, data: Data) -> Iterator[Problem]:
    c, training = evaluation.clients, partition.clients - partition.unseen
    if isinstance(c, int) and not natural(partition, data) and c > training > 0:
        yield Problem(
            "evaluation.clients", c, f"at most {training}, the clients that train", "lower it, or null for all"
        )


def views(evaluation: Evaluation, partition: Partition) -> Iterator[Problem]:
    v = evaluation.views
    if len(set(v)) < len(v):
        yield Problem("evaluation.views", list(v), "each view once", "drop the repetition")
    if "unseen" in v and not partition.unseen:
        yield Problem(
            "evaluation.views", list(v), "no view unseen, because no client is", "set partition.unseen to 1 or more"
        )


def output(run: Run) -> Iterator[Problem]:
    try:
        places = [p for _, p, _, _ in string.Formatter().parse(run.output) if p is not None]
    except ValueError as e:
        yield Problem("run.output", run.output, "a folder", f"{e}; write {{{{ for a brace")
        return
    for p in places:
        if p not in PLACES:
            yield Problem(
                "run.output",
                run.output,
                f"a folder with {', '.join('{' + x + '}' for x in PLACES)} at most",
                near(p, PLACES),
            )


RULES: tuple[Rule, ...] = (
    work,
    targets,
    options,
    weights,
    patience,
    columns,
    generation,
    template,
    encoding,
    delimiter,
    source,
    clients,
    labels,
    cohort,
    scored,
    views,
    output,
)


class Wrong(Exception):
    """A rule has read a field that is wrong by itself. The rule ends there: it cannot be checked."""


class Partial:
    """A section of which some fields are wrong; reading one of those raises Wrong."""

    def __init__(self, section: Section, wrong: Collection[str] = ()):
        self._section, self._wrong = section, wrong

    def __getattr__(self, field: str) -> Any:
        if field in self._wrong:
            raise Wrong(field)
        return getattr(self._section, field)


def broken(sections: Mapping[str, Partial]) -> list[Problem]:
    """What the rules find in the sections that are there."""
    found: list[Problem] = []
    for rule in RULES:
        names = inspect.signature(rule).parameters
        if all(n in sections for n in names):
            with contextlib.suppress(Wrong):
                for problem in rule(**{n: sections[n] for n in names}):
                    found.append(problem)
    return found
