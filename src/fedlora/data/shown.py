"""One row as a language model reads it, with what is scored and what is not."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from .examples import Tokens
from .federated import FederatedData


def example(tokenizer: Any, data: FederatedData) -> tuple[tuple[str, bool], ...]:
    """The first training row in pieces: the text of each, special tokens included, and whether it carries loss.

    Empty where no part of a row is left out of the loss: labels of rows or words, and plain text.
    """
    rows = data.splits["train"].rows
    x = data.examples
    if not isinstance(x, Tokens) or x.prompt is None or not len(rows):
        return ()
    batch = x.collate(rows[:1])
    ids, scored = batch["input_ids"][0].tolist(), (batch["labels"][0] != -100).tolist()
    parts = groupby(zip(ids, scored, strict=True), key=lambda pair: pair[1])
    return tuple((str(tokenizer.decode([i for i, _ in part])), is_scored) for is_scored, part in parts)
