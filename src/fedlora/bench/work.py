"""The work that every system of a benchmark does: the same model, start, texts and minibatches, derived from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..methods import METHODS
from ..model.adapted import Batch
from ..seeds import np_rng
from ..training.optimizers import AdamW
from ..training.task import Task
from ..training.tasks import made

LR, RANK, ALPHA, CLASSES = 1e-3, 8, 16.0, 20


@dataclass(frozen=True)
class Regime:
    """K clients, local steps, rows of a minibatch."""

    name: str
    clients: int
    steps: int
    batch: int


REGIMES = {
    r.name: r
    for r in (
        Regime("small", 32, 2, 4),
        Regime("middle", 16, 4, 8),
        Regime("large", 8, 8, 16),
        Regime("wide", 32, 4, 8),
    )
}
USUAL = ("small", "middle", "large")  # wide is for accelerators


@dataclass(frozen=True)
class Work:
    """One federated round of a method (HomLoRA: A, B of rank 8 on the model's default targets, and the head), many times over."""

    model: str = "minilm"
    task: str = "classification"
    method_name: str = "homlora"
    source: str = "demo"
    text: str = "text"
    max_length: int = 64
    regime: Regime = REGIMES["middle"]
    threads: int = 2
    seed: int = 0
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Work:
        return Work(**{**raw, "regime": Regime(**raw["regime"])})

    @cached_property
    def rows(self) -> list[list[int]]:
        """Tokens of each text; labels play no part in speed and are drawn."""
        from ..checkpoints.pretrained import load_tokenizer
        from ..data.columns import strings
        from ..data.sources import read

        if self.source == "demo":
            from ..data.demo import corpus

            texts = corpus().column("text").to_pylist()
        else:
            texts = strings(read(self.source), self.text, "--text")
        texts = [texts[i] for i in np_rng(self.seed, "bench texts").permutation(len(texts))[:4000]]
        found: list[list[int]] = load_tokenizer(self.model)(texts, truncation=True, max_length=self.max_length)[
            "input_ids"
        ]
        return found

    def batches(self, round: int) -> list[list[Batch]]:
        """[client][step, draw], each batch padded to its longest row, as a collator does."""
        r, g, draws = self.regime, np_rng(self.seed, "bench", round), self.method().draws
        out, goal = [], self.goal()
        for _ in range(r.clients):
            mine = []
            for _ in range(r.steps * draws):
                rows = [self.rows[i] for i in g.integers(0, len(self.rows), r.batch)]
                length = max(map(len, rows))
                ids, mask = np.zeros((r.batch, length), np.int64), np.zeros((r.batch, length), np.int64)
                for j, row in enumerate(rows):
                    ids[j, : len(row)], mask[j, : len(row)] = row, 1
                named = {"input_ids": ids, "attention_mask": mask, "labels": goal.drawn(ids, mask, g)}
                mine.append({n: torch.from_numpy(v) for n, v in named.items()})
            out.append(mine)
        return out

    def goal(self) -> Task:
        """The task, with CLASSES outputs where they have names."""
        return made(self.task, CLASSES)

    def method(self) -> Any:
        """With its own defaults beside rank, learning rate and plain averaging, where it has these."""
        kind: Any = METHODS[self.method_name]
        said = {"rank": RANK, "alpha": ALPHA, "weights": "uniform", "optimizer": AdamW(LR)}
        return kind(**{n: v for n, v in said.items() if n in {f.name for f in fields(kind)}})


def tokens(batches: list[list[Batch]]) -> int:
    """Real tokens, padding not counted."""
    return sum(int(b["attention_mask"].sum()) for mine in batches for b in mine)
