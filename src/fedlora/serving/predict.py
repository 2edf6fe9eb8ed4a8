"""Text in, answer out: what the model of a client, or the global one, says of a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import DataError
from ..federation.run import Federation
from ..training.task import Prediction, Serving
from ..tree import Params, stack

__all__ = ["Prediction", "predict_texts"]


def predict_texts(
    f: Federation,
    tokenizer: Any,
    deltas: Params,
    texts: Sequence[str | Sequence[str]],
    max_length: int,
    new_tokens: int = 64,
) -> list[Prediction]:
    """What the model with model-ready `deltas` says of each text, pair of texts, or list of words. Raises DataError for none."""
    if not texts:
        raise DataError("predict: got no text, expected at least one; give it as an argument or with --file")
    there = {k: v.to(f.model.device) for k, v in stack([deltas]).items()}
    return f.task.answer(Serving(f.model, there, tokenizer, f.task.names(f.data), max_length, new_tokens), texts)
