"""Classification: one class a text, or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.labels import classes
from ...data.load import Targets, field_of
from ...errors import ConfigError, DataError, Problem
from ..metrics import Predictions, Scores, owners, ratio
from ..task import Task, full

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy over `classes`; labels [N] int64."""

    kind: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"
    named: ClassVar[bool] = True
    weighted: ClassVar[bool] = True
    permutes: ClassVar[bool] = True
    classes: int = 2
    weights: tuple[float, ...] | None = None  # of the classes in the loss, None for equal ones

    def __post_init__(self) -> None:
        bad = []
        if self.classes < 1:
            bad.append(Problem("Classification.classes", self.classes, "an integer >= 1, the number of classes"))
        if self.weights is not None and (len(self.weights) != self.classes or not min(self.weights, default=0) >= 0):
            bad.append(
                Problem("Classification.weights", self.weights, f"a number >= 0 for each of {self.classes} classes")
            )
        if bad:
            raise ConfigError(bad)

    @property
    def outputs(self) -> int:
        return self.classes

    def unfit(self, labels: np.ndarray | None) -> str | None:
        if labels is None:
            return 'there are none, expected a column "labels" with a class for each row; give one'
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            shape = f"{labels.dtype.name} of shape {list(labels.shape)}"
            how = (
                "labels.argmax(1) makes them of one-hot rows"
                if labels.ndim == 2
                else "labels.astype(np.int64) makes them"
            )
            return f"{shape}, expected whole numbers, one for each row; {how}, or choose another task"
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.classes:
            found = f"numbers from {int(labels.min())} to {int(labels.max())}"
            most = max(int(labels.max()) + 1, 2)
            return f"{found}, expected 0 to {self.classes - 1} for {self.classes} classes; write {type(self).__name__}({most}), or number them from 0"
        return None

    def row_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        y = full(output)
        return F.cross_entropy(y, labels, self._weights(y), reduction="none")

    def row_counts(self, labels: Tensor) -> Tensor:
        """A row counts as much as its class weighs, so that the mean is that of torch.nn.CrossEntropyLoss."""
        weights = self._weights(labels)
        return super().row_counts(labels) if weights is None else weights.float()[labels]

    def _weights(self, like: Tensor) -> Tensor | None:
        if self.weights is None:
            return None
        return torch.tensor(
            self.weights, device=like.device, dtype=like.dtype if like.is_floating_point() else torch.float32
        )

    def answers(self, output: Tensor, labels: Tensor) -> Tensor:
        return output.argmax(-1)

    def measures(self, clients: Sequence[Predictions]) -> list[Scores]:
        """As scikit-learn's accuracy_score, f1_score(average="macro") and matthews_corrcoef; the last is 0 where it is
        undefined. All clients are counted at once: of each client and class, rows that are it, are called it, and both."""
        k, whose = len(clients), owners([len(p.losses) for p in clients])
        true = np.concatenate([p.labels for p in clients]).astype(np.int64)
        said = np.concatenate([p.values for p in clients]).astype(np.int64)
        c = int(max(true.max(), said.max())) + 1

        def count(classes: np.ndarray, of: np.ndarray) -> np.ndarray:
            return np.bincount(of * c + classes, minlength=k * c).reshape(k, c).astype(float)

        right = true == said
        t, s, hit = count(true, whose), count(said, whose), count(true[right], whose[right])
        n, hits = t.sum(1), hit.sum(1)
        f1 = ratio(2 * hit, t + s).sum(1) / ((t + s) > 0).sum(1)
        spread = np.sqrt(n**2 - (s**2).sum(1)) * np.sqrt(n**2 - (t**2).sum(1))
        matthews = ratio(hits * n - (t * s).sum(1), spread)
        return [
            {"accuracy": float(a), "macro_f1": float(f), "matthews": float(m)}
            for a, f, m in zip(hits / n, f1, matthews, strict=True)
        ]

    @classmethod
    def of(cls, names: Sequence[str], options: Mapping[str, Any]) -> Classification:
        return cls(len(names), options.get("class_weights"))

    @classmethod
    def grouped(cls, data: Any) -> bool:
        return True

    @classmethod
    def targets(cls, tables: Mapping[int, pa.Table], data: Mapping[str, Any]) -> Targets:
        label = data["label"]
        first, names = classes(tables[0], label, data.get("classes"))
        ids = [first] + [classes(t, label, names, field_of(o))[0] for o, t in tables.items() if o]
        if len(names) < 2:
            raise DataError(f"data.label: column {label!r} holds only {names[0]!r}, expected two or more classes")
        return Targets(ids, ids, names)

    def drawn(self, ids: np.ndarray, mask: np.ndarray, g: np.random.Generator) -> np.ndarray:
        return g.integers(0, self.classes, len(ids))

    def probabilities(self, output: Tensor) -> Tensor | None:
        return output.softmax(-1)

    def say(self, output: Tensor, names: Sequence[str]) -> tuple[str, float | None]:
        p, c = output.softmax(-1).max(-1)
        return names[int(c)], float(p)
