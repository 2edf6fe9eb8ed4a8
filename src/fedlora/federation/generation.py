"""Texts that clients' language models write, for scores against references and as samples in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..data.examples import Tokens
from ..errors import ConfigError, Problem
from ..model.decoding import Asked, Decoding, decode
from ..seeds import np_rng, number
from ..training import texts
from ..training.metrics import Scores
from ..training.tasks.causal_lm import ends
from ..tree import Params
from . import choices

if TYPE_CHECKING:
    from ..data.federated import FederatedData
    from .setting import Setting

MOST_SAMPLED = 4  # clients whose answers stand side by side


@dataclass(frozen=True)
class Generation:
    """What is generated in an evaluation. scores: names of training/texts.py; how: of decoding.

    rows: questions of each client in a split, drawn once for the run; None for all. samples: questions whose answers are kept.
    """

    scores: Sequence[str]
    how: Decoding = Decoding()
    rows: int | None = None
    samples: int = 0
    tokenizer: Any = field(default=None, repr=False, compare=False)
    choices: Sequence[str] = ()  # the texts that may be answers; the likeliest is taken, and nothing is decoded
    per: Literal["choice", "token"] = "choice"  # what the likelihoods of choices are sums or means over


@dataclass(frozen=True)
class Question:
    """A prompt as token ids, and every text that answers it. row: the first one that asks it."""

    prompt: tuple[int, ...]
    references: tuple[str, ...]
    row: int


@dataclass(frozen=True)
class Written:
    """Questions of one client, and what a model answered."""

    questions: Sequence[Question]
    answers: Sequence[str]

    def scores(self, wanted: Sequence[str]) -> Scores:
        """Against the references; {} without questions."""
        return texts.scored(wanted, self.answers, [q.references for q in self.questions])


def check(data: FederatedData) -> None:
    """Raise ConfigError where the data have no references, so that no text could be scored."""
    if data.references is None:
        what = "name data.prompt and data.completion, or data.messages, or leave generation.scores out"
        raise ConfigError([Problem("generation.scores", "texts without prompts", "prompts with completions", what)])


def questions(data: FederatedData, rows: np.ndarray) -> list[Question]:
    """The questions of some rows, in their order. Rows with one prompt are one question with all their completions as references,
    as E2E and WebNLG are scored."""
    examples = data.examples
    assert isinstance(examples, Tokens) and examples.prompt is not None and data.references is not None
    found: dict[tuple[int, ...], tuple[int, dict[str, None]]] = {}
    for row in rows.tolist():
        start = int(examples.offsets[row])
        prompt = tuple(examples.flat[start : start + int(examples.prompt[row])].tolist())
        _, references = found.setdefault(prompt, (row, {}))
        references |= dict.fromkeys(data.references[row])
    return [Question(prompt, tuple(references), row) for prompt, (row, references) in found.items()]


def asked(f: Setting, g: Generation, client: int, split: str) -> list[Question]:
    """The questions of a client in a split: all, or `g.rows` of them."""
    every = questions(f.data, f.data.splits[split][client])
    if g.rows is None or len(every) <= g.rows:
        return every
    drawn = np_rng(f.seed, "generation", split, f.data.ids[client]).choice(len(every), g.rows, replace=False)
    return [every[i] for i in np.sort(drawn)]


def write(
    f: Setting, g: Generation, params: Sequence[Params], each: Sequence[Sequence[Question]], block: int
) -> list[Written]:
    """What model params[j] answers to the questions each[j]. Models that are one object answer as one."""
    first = _first(f)
    if g.choices:
        prompts_of = [[q.prompt or first for q in own] for own in each]
        found = choices.likelihoods(f, g, params, prompts_of, block)
        return [Written(own, choices.chosen(s, g)) for own, s in zip(each, found, strict=True)]
    most = f.model.positions - g.how.new_tokens
    same: dict[int, list[int]] = {}
    for j, p in enumerate(params):
        same.setdefault(id(p), []).append(j)
    jobs = []
    for group in same.values():
        own = [q for j in group for q in each[j]]
        prompts = [_fitted(q.prompt or first, most) for q in own]
        seeds = [number(f.seed, "decoding", q.row) for q in own]
        jobs.append(Asked(params[group[0]], prompts, seeds))
    pad = f.model.pad if f.model.pad is not None else g.tokenizer.pad_token_id or 0
    said = decode(f.model, jobs, g.how, pad, ends(g.tokenizer), f.evaluation.batch_size, block)
    out: dict[int, Written] = {}
    for group, lines in zip(same.values(), said, strict=True):
        left = iter(lines)
        for j in group:
            answers = [g.tokenizer.decode(next(left), skip_special_tokens=True).strip() for _ in each[j]]
            out[j] = Written(each[j], answers)
    return [out[j] for j in range(len(params))]


def scores(
    f: Setting, g: Generation, params: Sequence[Params], clients: Sequence[int], split: str, block: int
) -> dict[str, Scores]:
    """Scores of what params[j] writes to the questions of client clients[j] in a split."""
    found = write(f, g, params, [asked(f, g, k, split) for k in clients], block)
    return {f.data.ids[k]: w.scores(g.scores) for k, w in zip(clients, found, strict=True)}


def _first(f: Setting) -> tuple[int, ...]:
    """What an empty prompt starts from: a model cannot start from nothing."""
    config: Any = getattr(f.model.base, "config", None)
    begin = getattr(config, "bos_token_id", None)
    return (f.model.pad or 0 if begin is None else begin,)


def _fitted(prompt: Sequence[int], most: float) -> Sequence[int]:
    """A prompt that leaves no room for new tokens loses its beginning."""
    return prompt if len(prompt) <= most else prompt[len(prompt) - int(most) :]
