"""Scores of written texts against references, each by the library that the field reports: sacrebleu, rouge-score."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from decimal import Decimal
from importlib.util import find_spec

from ..errors import ConfigError, Problem

Answers = Sequence[str]
References = Sequence[Sequence[str]]  # one or more of each answer
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
ROUGE = ("rouge1", "rouge2", "rougeL")


def bleu(answers: Answers, references: References) -> dict[str, float]:
    """Corpus BLEU, 0 to 100, as `sacrebleu` prints it by default (Post, arXiv:1804.08771)."""
    from sacrebleu.metrics import BLEU

    return {"bleu": _percent(BLEU().corpus_score(answers, _columns(references)).score)}


def chrf(answers: Answers, references: References) -> dict[str, float]:
    """Corpus chrF2, 0 to 100, as `sacrebleu -m chrf` prints it (Popovic, WMT 2015)."""
    from sacrebleu.metrics import CHRF

    return {"chrf": _percent(CHRF().corpus_score(answers, _columns(references)).score)}


def rouge(answers: Answers, references: References) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, -2 and -L, 0 to 1, without a stemmer; of several references the best one counts (Lin, 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE))
    found = [scorer.score_multi(r, a) for a, r in zip(answers, references, strict=True)]
    return {name: sum(float(f[name].fmeasure) for f in found) / len(found) for name in ROUGE}


def exact_match(answers: Answers, references: References) -> dict[str, float]:
    """Share of answers that are one of their references, spaces around them aside."""
    hits = [a.strip() in {r.strip() for r in rs} for a, rs in zip(answers, references, strict=True)]
    return {"exact_match": sum(hits) / len(hits)}


def accuracy(answers: Answers, references: References) -> dict[str, float]:
    """Share of answers that are right, where an answer is one of given choices."""
    return {"accuracy": exact_match(answers, references)["exact_match"]}


def number_match(answers: Answers, references: References) -> dict[str, float]:
    """Share of answers whose number is that of one of their references: the one after the last "####", where GSM8K writes its
    results (arXiv:2110.14168), or without that mark the last number. 1,000 and 1000.0 are equal."""
    hits = [
        (n := number(a)) is not None and n in {number(r) for r in rs} for a, rs in zip(answers, references, strict=True)
    ]
    return {"number_match": sum(hits) / len(hits)}


def number(text: str) -> Decimal | None:
    """The number that a text gives as its result, None where it gives none."""
    _, mark, after = text.rpartition("####")
    found = NUMBER.findall(after if mark else text)
    chosen = (found[0] if mark else found[-1]) if found else None
    return None if chosen is None else Decimal(chosen.replace(",", ""))


SCORES: dict[str, Callable[[Answers, References], dict[str, float]]] = {
    "bleu": bleu, "chrf": chrf, "rouge": rouge, "exact-match": exact_match, "number-match": number_match,
    "accuracy": accuracy,
}  # fmt: skip
LIBRARIES = {
    "bleu": ("sacrebleu", "sacrebleu"),
    "chrf": ("sacrebleu", "sacrebleu"),
    "rouge": ("rouge_score", "rouge-score"),
}


def scored(wanted: Collection[str], answers: Answers, references: References) -> dict[str, float]:
    """The scores called `wanted` (names of SCORES) of answers with their references; {} without answers."""
    out: dict[str, float] = {}
    for name in wanted if answers else ():
        out |= SCORES[name](answers, references)
    return out


def check(field: str, wanted: Collection[str]) -> None:
    """Raise ConfigError for scores whose library is not installed. field: of the recipe, or the option, that asks for them."""
    bad = [n for n in wanted if n in LIBRARIES and find_spec(LIBRARIES[n][0]) is None]
    if bad:
        lacking = sorted({LIBRARIES[n][1] for n in bad})
        raise ConfigError(
            [Problem(field, bad, f"the package {' and '.join(lacking)}", "pip install 'fedlora[generation]'")]
        )


def _columns(references: References) -> list[list[str | None]]:
    """References as sacrebleu takes them: a list for each place, with None where an answer has fewer."""
    most = max(map(len, references))
    return [[r[i] if i < len(r) else None for r in references] for i in range(most)]


def _percent(score: float) -> float:
    return min(float(score), 100.0)  # sums of floats may end a hair above
