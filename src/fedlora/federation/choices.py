"""Classification with a language model: of given texts, each is scored by its likelihood after the prompt, and the likeliest is the
answer (Brown et al., NeurIPS 2020, arXiv:2005.14165, section 2.4)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.encode import flatten
from ..data.examples import Tokens
from ..data.federated import FederatedData
from ..evaluation.predictions import predict
from ..training.tasks.causal_lm import ends
from ..tree import Params

if TYPE_CHECKING:
    from .generation import Generation
    from .setting import Setting


def likelihoods(
    f: Setting, g: Generation, params: Sequence[Params], each: Sequence[Sequence[Sequence[int]]], block: int
) -> list[np.ndarray]:
    """log p(choice | prompt) by model params[j] of its prompts each[j] (token ids): float64 [prompts choices].

    A choice's tokens are those it has by itself, and the token that ends a text is one of them, as in training. g.per: "choice" sums
    over its tokens; "token" takes their mean, so that a long choice has no disadvantage.
    """
    choices = [_tokens(g.tokenizer, c) for c in g.choices]
    room = f.model.positions - max(map(len, choices))
    rows: list[Sequence[int]] = []
    before: list[int] = []
    for prompts in each:
        for p in prompts:
            kept = p if len(p) <= room else p[len(p) - int(room) :]
            rows += [[*kept, *c] for c in choices]
            before += [len(kept)] * len(choices)
    flat, lengths = flatten(rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    examples = Tokens(flat, offsets, prompt=np.array(before, np.int32), pad_id=f.model.pad or 0)
    data = FederatedData(examples, [str(j) for j in range(len(each))], {})
    ends = np.cumsum([0, *(len(p) * len(choices) for p in each)])
    mine = [np.arange(a, b) for a, b in pairwise(ends.tolist())]
    found = predict(f.model, f.task, data, params, range(len(each)), mine, f.evaluation.batch_size, block)
    sums = [-x.losses if g.per == "choice" else -x.losses / x.counts for x in found]
    return [s.reshape(-1, len(choices)) for s in sums]


def chosen(scores: np.ndarray, g: Generation) -> list[str]:
    """The likeliest choice of each prompt; the first one of equals."""
    return [g.choices[i] for i in scores.argmax(1)]


def _tokens(tokenizer: Any, choice: str) -> list[int]:
    return [*tokenizer(choice, add_special_tokens=False, verbose=False)["input_ids"], *ends(tokenizer)]
