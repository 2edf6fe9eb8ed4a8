"""Decoding in blocks: the models of many clients write on at once, each row after its own prompt.

transformers' `generate` does the work: keys and values of past tokens are kept, and a row ends at its end-of-sequence token.
Prompts are padded on the left, where masks and positions leave the padding out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.dropout import GOLDEN
from ..tree import Params, stack
from .adapted import Adapted
from .dropout import mix, starts


@dataclass(frozen=True)
class Decoding:
    """How a text is written.

    new_tokens: the most there are. temperature: 0 takes the likeliest token; above 0 a token is drawn, of the `top_k` likeliest
    (0: of all) and of the likeliest whose probabilities sum to `top_p`.
    """

    new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def processors(self, seeds: Tensor, start: int) -> list[Any]:
        """What changes the scores of the next token. seeds int64 [rows]; start: tokens of the padded prompts."""
        import transformers as t

        if not self.temperature:
            return []
        out: list[Any] = [t.TemperatureLogitsWarper(self.temperature)]
        if self.top_k:
            out.append(t.TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            out.append(t.TopPLogitsWarper(self.top_p))
        return [*out, _Gumbel(seeds, start)]


class _Gumbel:
    """Adds Gumbel noise to the scores, so that the largest one is a draw from their softmax (Gumbel, 1954).

    The noise is a hash of the row's seed, the number of the new token and the token: no generator, so that neither the block nor
    the order of rows changes a draw.
    """

    def __init__(self, seeds: Tensor, start: int):
        self.seeds, self.start = seeds, start

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        place = (torch.arange(scores.shape[1], device=scores.device) + 1) * GOLDEN
        bits = mix(starts(self.seeds, ids.shape[1] - self.start)[:, None] + place)
        uniform = ((bits >> 11).bitwise_and_(2**53 - 1).double() + 0.5) * 2.0**-53
        return scores.double() - (-uniform.log()).log()


@dataclass
class Asked:
    """One model's prompts, and what it writes: token ids without the end of sequence. seeds: of the draws, one a prompt."""

    params: Params
    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]


def decode(
    model: Adapted, asked: Sequence[Asked], how: Decoding, pad: int, ends: Sequence[int], rows: int = 64, block: int = 8
) -> list[list[list[int]]]:
    """The new tokens of every prompt of every model, without the end-of-sequence token.

    pad: the token that stands before shorter prompts; it is masked. ends: tokens that end a row beside those that the model's own
    generation config names. rows: in a forward pass, of all models together. Prompts are longest first, so that little is padding.
    """
    out: list[list[list[int]]] = [[[]] * len(a.prompts) for a in asked]
    stop = sorted({*ends, *_ends(model.base)})
    order = sorted((j for j in range(len(asked)) if asked[j].prompts), key=lambda j: -len(asked[j].prompts))
    for i in range(0, len(order), block):
        part = order[i : i + block]
        left = {j: sorted(range(len(asked[j].prompts)), key=lambda q: -len(asked[j].prompts[q])) for j in part}
        while live := [j for j in part if left[j]]:
            n = min(max(1, rows // len(live)), max(len(left[j]) for j in live))
            now = [left[j][:n] for j in live]
            params = {k: v.to(model.device) for k, v in stack([asked[j].params for j in live]).items()}
            said = _written(model, params, [asked[j] for j in live], now, n, how, pad, stop)
            for j, questions, answers in zip(live, now, said, strict=True):
                for q, answer in zip(questions, answers, strict=False):
                    out[j][q] = answer
                del left[j][:n]
    return out


def _written(
    model: Adapted, params: Params, asked: Sequence[Asked], now: Sequence[Sequence[int]], n: int, how: Decoding, pad: int,
    stop: Sequence[int],
) -> list[list[list[int]]]:  # fmt: skip
    """New tokens of n rows of each model. A model with fewer prompts repeats its first one."""
    filled = [[*questions, *[questions[0]] * (n - len(questions))] for questions in now]
    prompts = [a.prompts[q] for a, questions in zip(asked, filled, strict=True) for q in questions]
    seeds = [a.seeds[q] for a, questions in zip(asked, filled, strict=True) for q in questions]
    width = max(map(len, prompts))
    ids = torch.tensor([[*[pad] * (width - len(p)), *p] for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode(), model.serving(params, len(asked), n):
        base: Any = model.base
        found = base.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=how.new_tokens,
            do_sample=False,  # draws are made by the last processor
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=list(stop) or None,
            logits_processor=how.processors(torch.tensor(seeds, device=model.device), width),
        )
    lines = [_ended(line, stop) for line in found[:, width:].tolist()]
    return [lines[i * n : (i + 1) * n] for i in range(len(asked))]


def _ended(line: list[int], stop: Sequence[int]) -> list[int]:
    """A row up to its end of sequence; what follows is padding."""
    return line[: next((i for i, t in enumerate(line) if t in stop), len(line))]


def _ends(base: Any) -> list[int]:
    """The tokens at which this base stops by its own configuration."""
    found = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    return [] if found is None else [found] if isinstance(found, int) else list(found)
