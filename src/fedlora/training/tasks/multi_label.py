"""Multi-label classification: any number of labels a text, or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ...data.labels import listed
from ...data.load import Targets, field_of
from ...errors import DataError
from ..metrics import Predictions, Scores, owners, ratio
from ..task import Task, full

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class MultiLabel(Task):
    """Binary cross-entropy of every label, its mean over `labels`, as in transformers; labels [N labels] float, 0 or 1.

    A label is said where its probability is above `threshold`.
    """

    kind: ClassVar[str] = "multi-label"
    metric: ClassVar[str] = "micro_f1"
    named: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("threshold",)
    labels: int = 2
    threshold: float = 0.5

    @property
    def outputs(self) -> int:
        return self.labels

    def unfit(self, labels: np.ndarray | None) -> str | None:
        if labels is None or labels.ndim != 2 or labels.shape[1] != self.labels or not np.isin(labels, (0, 1)).all():
            found = "there are none" if labels is None else f"{labels.dtype.name} of shape {list(labels.shape)}"
            return f"{found}, expected 0 or 1 in [rows, {self.labels}]; write MultiLabel(labels) for other numbers of labels"
        return None

    def row_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        y = full(output)
        return F.binary_cross_entropy_with_logits(y, labels.to(y), reduction="none").mean(-1)

    def answers(self, output: Tensor, labels: Tensor) -> Tensor:
        return full(output).sigmoid() > self.threshold

    def measures(self, clients: Sequence[Predictions]) -> list[Scores]:
        """As scikit-learn's f1_score, average "micro" and "macro", and accuracy_score (rows right in every label); an F1
        without labels, said or true, is 0. All clients are counted at once."""
        k, whose = len(clients), owners([len(p.losses) for p in clients])
        true = np.concatenate([p.labels for p in clients]) > 0.5
        said = np.concatenate([p.values for p in clients]).astype(bool)

        def count(what: np.ndarray) -> np.ndarray:
            total = np.zeros((k, what.shape[1]))
            np.add.at(total, whose, what)
            return total

        hit, all_ = count(true & said), count(true) + count(said)
        exact = np.bincount(whose, (true == said).all(1), k) / np.bincount(whose, minlength=k)
        micro, macro = ratio(2 * hit.sum(1), all_.sum(1)), ratio(2 * hit, all_).mean(1)
        return [
            {"micro_f1": float(a), "macro_f1": float(b), "exact_match": float(c)}
            for a, b, c in zip(micro, macro, exact, strict=True)
        ]

    @classmethod
    def of(cls, names: Sequence[str], options: Mapping[str, Any]) -> MultiLabel:
        return cls(len(names), options.get("threshold", 0.5))

    @classmethod
    def config(cls, outputs: int) -> dict[str, Any]:
        return {"num_labels": outputs, "problem_type": "multi_label_classification"}

    @classmethod
    def targets(cls, tables: Mapping[int, pa.Table], data: Mapping[str, Any]) -> Targets:
        found, names = listed(tables, data["label"], data.get("classes"), field_of, "label")
        if not names:
            raise DataError(f"data.label: the lists of column {data['label']!r} are all empty, expected labels in some")
        labels = []
        for ids, offsets in found:
            one = np.zeros((len(offsets) - 1, len(names)), np.float32)
            one[owners(np.diff(offsets).tolist()), ids] = 1
            labels.append(one)
        return Targets(labels, outputs=names)

    def drawn(self, ids: np.ndarray, mask: np.ndarray, g: np.random.Generator) -> np.ndarray:
        return g.integers(0, 2, (len(ids), self.labels)).astype(np.float32)

    def probabilities(self, output: Tensor) -> Tensor:
        return output.sigmoid()

    def say(self, output: Tensor, names: Sequence[str]) -> tuple[str, float | None]:
        p = self.probabilities(output).tolist()
        return ", ".join(n for n, x in zip(names, p, strict=True) if x > self.threshold), None
