"""MLflow, in a local store: `mlflow ui --backend-store-uri sqlite:///RUN/mlflow/mlflow.db`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .tracker import Tracker, flat

EXPERIMENT = "fedlora"
MOST = 6000  # characters of a parameter's value in MLflow's store


class MLflow(Tracker):
    """An SQLite store in `folder`. A resumed run goes on with the same MLflow run."""

    name: ClassVar[str] = "mlflow"
    packages: ClassVar[tuple[str, ...]] = ("mlflow", "sqlalchemy", "alembic")

    def __init__(self, folder: Path, done: int, title: str, recipe: Mapping[str, Any]):
        from mlflow.tracking import MlflowClient

        super().__init__(folder, done, title, recipe)
        folder.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(f"sqlite:///{folder.absolute() / 'mlflow.db'}")
        known = self.client.get_experiment_by_name(EXPERIMENT)
        artifacts = (folder.absolute() / "artifacts").as_uri()
        experiment = self.client.create_experiment(EXPERIMENT, artifacts) if known is None else known.experiment_id
        earlier = self.client.search_runs([experiment], max_results=1) if done else []
        if earlier:
            self.id = earlier[0].info.run_id
            return
        self.id = self.client.create_run(experiment, run_name=title).info.run_id
        for key, value in flat(recipe).items():
            text = value if isinstance(value, str) else json.dumps(value)
            self.client.log_param(self.id, key, text[:MOST])

    def say(self, tag: str, value: float, round: int) -> None:
        self.client.log_metric(self.id, tag, value, step=round)

    def end(self, summary: dict[str, Any]) -> None:
        self.client.set_terminated(self.id)
