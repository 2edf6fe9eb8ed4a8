"""Regression: one real value a text, or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from ...data.labels import reals
from ...data.load import Targets
from ..metrics import Predictions, Scores
from ..task import Task, full

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Regression(Task):
    """Squared error; labels [N] float."""

    kind: ClassVar[str] = "regression"
    metric: ClassVar[str] = "pearson"

    @property
    def outputs(self) -> int:
        return 1

    def unfit(self, labels: np.ndarray | None) -> str | None:
        if labels is None:
            return 'there are none, expected a column "labels" with a value for each row; give one'
        if labels.ndim != 1 or labels.dtype.kind not in "fiu":
            return f"{labels.dtype.name} of shape {list(labels.shape)}, expected one number for each row"
        if not np.isfinite(labels).all():
            odd = np.flatnonzero(~np.isfinite(labels))
            return f"row {odd[0]} is {labels[odd[0]]} ({len(odd)} such rows), expected numbers; leave these rows out"
        return None

    def row_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        return (full(output).view(len(labels), -1)[:, 0] - labels.to(output)).square()

    def answers(self, output: Tensor, labels: Tensor) -> Tensor:
        return output.reshape(len(labels), -1)[:, 0].double()

    def measures(self, clients: Sequence[Predictions]) -> list[Scores]:
        """A correlation that is undefined (one row, or constant values) is 0, as in scikit-learn's Matthews coefficient."""
        from scipy import stats

        out: list[Scores] = []
        for p in clients:
            assert p.labels is not None and p.values is not None
            constant = len(p.labels) < 2 or np.ptp(p.labels) == 0 or np.ptp(p.values) == 0
            out.append({"pearson": 0.0, "spearman": 0.0} if constant else {
                "pearson": float(stats.pearsonr(p.labels, p.values).statistic),
                "spearman": float(stats.spearmanr(p.labels, p.values).statistic),
            })  # fmt: skip
        return out

    @classmethod
    def config(cls, outputs: int) -> dict[str, Any]:
        return {
            "num_labels": 1,
            "problem_type": "regression",
        }  # without the latter a pipeline puts a sigmoid on the value

    @classmethod
    def targets(cls, tables: Mapping[int, pa.Table], data: Mapping[str, Any]) -> Targets:
        return Targets([reals(t, data["label"]) for t in tables.values()])

    def drawn(self, ids: np.ndarray, mask: np.ndarray, g: np.random.Generator) -> np.ndarray:
        return g.normal(size=len(ids)).astype(np.float32)

    def say(self, output: Tensor, names: Sequence[str]) -> tuple[str, float | None]:
        return f"{float(output.flatten()[0]):.4f}", None
