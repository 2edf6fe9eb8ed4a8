"""Examples ready to train on: tokenised text or a user's own arrays, both columnar, plus who holds which rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError


@dataclass(frozen=True)
class Words:
    """The labels of the words of n rows, also of words that no token stands for (they are cut, or have no characters)."""

    labels: np.ndarray  # int64 [total words]
    offsets: np.ndarray  # int64 [n+1]
    seen: np.ndarray  # bool [total words]: whether a token stands for the word

    def at(self, rows: np.ndarray) -> Words:
        """Those of some rows, in their order."""
        sizes = np.diff(self.offsets)[rows]
        ends = np.cumsum(sizes)
        place = np.arange(int(sizes.sum())) + np.repeat(self.offsets[rows] - (ends - sizes), sizes)
        return Words(self.labels[place], np.concatenate([[0], ends]).astype(np.int64), self.seen[place])


@dataclass(frozen=True)
class Tokens:
    """Ragged token rows, tokenised once. n rows, lengths[i] tokens each."""

    flat: np.ndarray  # int32 [total tokens]
    offsets: np.ndarray  # int64 [n+1]
    segment: np.ndarray | None = None  # int32 [n]: where the second text of a pair starts; = length where there is none
    prompt: np.ndarray | None = None  # int32 [n]: leading tokens that carry no loss (causal LM)
    chars: np.ndarray | None = None  # int32 [n]: characters of the scored text (causal LM)
    labels: np.ndarray | None = None  # int64 [n] classes, float32 [n ...] values, None for language modelling
    pad_id: int = 0
    tags: np.ndarray | None = (
        None  # int64 [total tokens]: label of each token, -100 for none; rows have no `labels` then
    )
    words: Words | None = None  # the labels of the words from which `tags` are made

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each row, int64 [b]."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def collate(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Rows padded on the right to the longest: input_ids, attention_mask (token_type_ids) [b L]; labels [b ...],
        or [b L] with -100 where there is no loss, where tokens are labelled or predicted."""
        length = self.lengths(rows)
        width = int(length.max(initial=1))
        at = np.arange(width)[None]  # [1 L]
        inside = at < length[:, None]  # [b L]
        seen = at < np.maximum(length, 1)[:, None]  # a row without tokens is one padding token, which a model can read
        source = np.minimum(self.offsets[rows][:, None] + at, len(self.flat) - 1)
        ids = np.where(inside, self.flat[source], self.pad_id).astype(np.int64)
        batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(seen.astype(np.int64))}
        if self.segment is not None:
            second = inside & (at >= self.segment[rows][:, None])
            batch["token_type_ids"] = torch.from_numpy(second.astype(np.int64))
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[rows])
        elif self.tags is not None:
            batch["labels"] = torch.from_numpy(np.where(inside, self.tags[source], -100))
        else:
            skip = self.prompt[rows] if self.prompt is not None else np.zeros(len(rows), np.int32)
            # Nothing stands before the first token, so it cannot be predicted.
            scored = inside & (at >= np.maximum(skip, 1)[:, None])
            batch["labels"] = torch.from_numpy(np.where(scored, ids, -100))
        return batch


@dataclass(frozen=True)
class Arrays:
    """A user's own examples: equal-length columns [n ...]. The column "labels" holds the targets."""

    columns: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        sizes = {name: len(v) for name, v in self.columns.items()}
        if len(set(sizes.values())) != 1:
            raise DataError(f"Arrays: columns have lengths {sizes}, expected one common length; check the arrays")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @property
    def labels(self) -> np.ndarray | None:
        """The column of targets [n ...], None where there is none."""
        return self.columns.get("labels")

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each row, int64 [m]; 1, since rows of arrays have one length."""
        return np.ones(len(rows), np.int64)

    def collate(self, rows: np.ndarray) -> dict[str, Tensor]:
        """One batch [b ...] of some rows."""
        return {name: torch.from_numpy(np.ascontiguousarray(v[rows])) for name, v in self.columns.items()}


@dataclass(frozen=True)
class Rows:
    """Which rows each client holds, as one flat array (CSR): no Python object per client."""

    offsets: np.ndarray  # int64 [clients+1]
    rows: np.ndarray  # int64 [total]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, k: int) -> np.ndarray:
        return self.rows[self.offsets[k] : self.offsets[k + 1]]

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each client, int64 [clients]."""
        return np.diff(self.offsets)
