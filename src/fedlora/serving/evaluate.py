"""Scores of a finished run's models, on rows that it has held out or on others."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from ..data.examples import Rows
from ..data.federated import FederatedData
from ..data.load import load
from ..errors import ConfigError, DataError, Problem
from ..federation import generation
from ..federation.callbacks import Callback
from ..federation.generation import Generation, Written
from ..federation.run import Federation
from ..federation.store import Which
from ..federation.views import scores
from ..recipe.build import generation_of, tokenizer_of
from ..training import texts
from ..training.metrics import Scores
from ..training.tasks import TASKS
from .export import Served, models_of

if TYPE_CHECKING:
    from ..recipe import Recipe

GLOBAL = "global"
SECTIONS = ("generation", "evaluation")  # what --set may change of a run that is over


@dataclass(frozen=True)
class Evaluated:
    """One model's scores, and what it wrote where the task is a language model's and texts are scored."""

    model: str  # a client's id, or "global"
    scores: Scores
    written: Written | None = None


def evaluate(
    recipe: Recipe, fed: Federation, clients: Sequence[str], source: str | None = None, split: str = "test",
    sets: Sequence[str] = (), which: Which = "best",
) -> tuple[Served, list[Evaluated]]:  # fmt: skip
    """Scores of the models of `clients`, of the global model where there are none named.

    source: rows that the recipe's columns fit: a file, folder or hub id. Where the recipe names clients by a column, a client is
    scored on its own rows of it, and else on all. None: the run's own `split`. sets: changes of the recipe's section generation;
    texts of all questions are written unless they set generation.rows. Raises ConfigError and DataError.
    """
    if odd := [s for s in sets if s.split(".")[0] not in SECTIONS]:
        raise ConfigError(
            [Problem("--set", odd, f"fields of {' and '.join(SECTIONS)}", "the run is over: change nothing else")]
        )
    changed = recipe.override(*sets) if sets else recipe
    tokenizer = tokenizer_of(recipe)
    g = generation_of(changed, tokenizer)
    if g is not None:
        texts.check("generation.scores", g.scores)
        g = g if any(s.startswith("generation.rows") for s in sets) else replace(g, rows=None)
    whose: list[str | None] = [*clients] or [None]
    of, models = models_of(fed, whose, which)
    setting = copy.copy(fed)
    setting.evaluation = replace(fed.evaluation, batch_size=changed.evaluation.batch_size)
    if source is not None:
        setting.enrol(_other(recipe, fed, tokenizer, source, whose))
        split, numbers = "test", range(len(whose))
    else:
        setting.enrol(_own(fed, split, whose))
        numbers = range(len(whose))
    block = fed.engine(Callback()).block
    found = scores(setting, models, numbers, split, block)
    said: Sequence[Written | None] = [None] * len(whose)
    if g is not None:
        generation.check(setting.data)
        said = generation.write(setting, g, models, [generation.asked(setting, g, k, split) for k in numbers], block)
    return of, [Evaluated(id, found[id] | _scored(w, g), w) for id, w in zip(setting.data.ids, said, strict=True)]


def own_scores(fed: Federation, clients: Sequence[str], split: str, which: Which = "best") -> dict[str, Scores]:
    """Scores of clients' models, or of the global one, on the run's own rows, for a run that has no recipe."""
    whose: list[str | None] = [*clients] or [None]
    _, models = models_of(fed, whose, which)
    setting = copy.copy(fed)
    setting.enrol(_own(fed, split, whose))
    return scores(setting, models, range(len(whose)), split, fed.engine(Callback()).block)


def _scored(w: Written | None, g: Generation | None) -> Scores:
    return {} if w is None or g is None else w.scores(g.scores)


def _own(fed: Federation, split: str, whose: Sequence[str | None]) -> FederatedData:
    """The run's own rows of a split: each client's, and everybody's for the global model."""
    rows = fed.data.splits.get(split)
    if rows is None or not rows.offsets[-1]:
        there = [s for s, r in fed.data.splits.items() if r.offsets[-1]]
        raise DataError(
            f"evaluate: the run has no rows of split {split!r} here, expected one of {', '.join(there) or 'those at its sites'}; give "
            "others with --data"
        )
    each = [rows.rows if c is None else rows[fed.index[c]] for c in whose]
    return _of_rows(fed.data, fed, split, each, whose)


def _of_rows(
    data: FederatedData, fed: Federation, split: str, each: Sequence[np.ndarray], whose: Sequence[str | None]
) -> FederatedData:
    """`data` with one client for each model. Labels are permuted as the run has permuted a client's."""
    names = [GLOBAL if c is None else c for c in whose]
    if empty := [n for n, r in zip(names, each, strict=True) if not len(r)]:
        raise DataError(f"evaluate: there are no rows for {', '.join(empty[:4])}; choose other clients or other data")
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in each])]).astype(np.int64)
    maps = fed.data.label_maps
    if maps is not None:
        plain = np.arange(maps.shape[1])
        maps = np.stack([plain if c is None else maps[fed.index[c]] for c in whose])
    rows = Rows(offsets, np.concatenate(each).astype(np.int64))
    return replace(data, ids=names, splits={split: rows, "train": rows}, label_maps=maps, unseen=0)


def _other(recipe: Recipe, fed: Federation, tokenizer: Any, source: str, whose: Sequence[str | None]) -> FederatedData:
    """Rows of `source`, read as the recipe reads its own and labelled by the classes that the run has."""
    kind = TASKS[recipe.model.task]
    section = recipe.data.model_dump() | {
        "source": source, "format": "auto", "subset": None, "split": None, "validation": None, "test": None, "limit": None,
        "classes": kind.names(fed.data) or recipe.data.classes,
    }  # fmt: skip
    if not kind.named and kind.over_vocabulary:
        section["label"] = None  # of a language model, classes are for the partition alone
    by = recipe.data.client or (recipe.partition.column if recipe.partition.kind == "column" else None)
    by = None if by == "file" else by
    found = load(tokenizer, section, kind, fed.seed, by if any(c is not None for c in whose) else None)
    every = np.arange(len(found.examples))
    each = [every] * len(whose)
    if found.column is not None:
        names = [str(n) for n in found.column.names]
        code = {n: i for i, n in enumerate(names)}
        each = [every if c is None else np.flatnonzero(found.column.codes == code.get(c, -1)) for c in whose]
    references = None if found.references is None else {i: tuple(r) for i, r in enumerate(found.references)}
    data = FederatedData(
        found.examples, [], {}, fed.data.label_names, groups=found.groups, truncated=found.truncated, outputs=fed.data.outputs,
        references=references,
    )  # fmt: skip
    return _of_rows(data, fed, "test", each, whose)


def write_answers(folder: Path, found: Sequence[Evaluated], tokenizer: Any) -> list[Path]:
    """What every model wrote: all as answers.jsonl; and for each model MODEL.answers.txt and MODEL.references.txt, a line a question,
    several references with tabs between them, as the command `sacrebleu --num-refs` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    rows: list[dict[str, Any]] = []
    for e in found:
        if e.written is None:
            continue
        questions, answers = e.written.questions, e.written.answers
        most = max((len(q.references) for q in questions), default=0)
        references = [
            "\t".join([_line(r) for r in q.references] + [""] * (most - len(q.references))) for q in questions
        ]
        for name, lines in (("answers", [_line(a) for a in answers]), ("references", references)):
            out.append(folder / f"{quote(e.model, safe='')}.{name}.txt")
            out[-1].write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        rows += [
            {"model": e.model, "prompt": tokenizer.decode(list(q.prompt), skip_special_tokens=True),
             "references": list(q.references), "answer": a}
            for q, a in zip(questions, answers, strict=True)
        ]  # fmt: skip
    out.append(folder / "answers.jsonl")
    out[-1].write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return out


def _line(text: str) -> str:
    return " ".join(text.split())
