"""Trackers: each holds the numbers of metrics.jsonl, read back by the tracker's own reader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli import write_recipe

import fedlora as fl
from fedlora.errors import ConfigError
from fedlora.federation.trackers import TRACKERS, tracker

Numbers = dict[str, list[tuple[int, float]]]


def tensorboard(folder: Path) -> Numbers:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {t: [(e.step, e.value) for e in events.Scalars(t)] for t in events.Tags()["scalars"]}


def mlflow(folder: Path) -> Numbers:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedlora")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.data.params["method.name"] == "fedsa" and run.info.status == "FINISHED"
    names = run.data.metrics
    return {n: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, n)) for n in names}


def wandb(folder: Path) -> Numbers:
    from wandb.proto import wandb_internal_pb2

    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    out: Numbers = {}
    for data in leveldb(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            for name, value in items.items():
                if not name.startswith("_"):
                    out.setdefault(name, []).append((items["_step"], value))
    return out


def leveldb(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format, in which W&B writes offline runs: blocks of 32 KiB, behind a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow", "ignore:The ``noload``"
)  # MLflow's own use of SQLAlchemy
@pytest.mark.parametrize("read", [tensorboard, mlflow, wandb])
def test_a_tracker_holds_the_numbers_of_the_run(read: Any, tmp_path: Path) -> None:
    name = read.__name__
    pytest.importorskip(name)
    fl.run(write_recipe(tmp_path), sets=[f"run.trackers=[{name}]"])
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    train = [(x["round"], pytest.approx(x["loss"])) for x in lines if x["kind"] == "train"]
    tested = [
        (x["round"], pytest.approx(x["mean"]["accuracy"]))
        for x in lines
        if x["kind"] == "eval" and (x["view"], x["split"]) == ("personal", "test")
    ]
    found = read(tmp_path / "run" / name)
    assert found["train/loss"] == train and found["personal_test/accuracy_mean"] == tested


@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_tracker_that_is_not_installed_names_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=r"run.trackers: got .* pip install 'fedlora\[trackers\]'"):
        fl.run(write_recipe(tmp_path), sets=[f"run.trackers=[{name}]"])


def test_own_callbacks_see_what_trackers_see(tmp_path: Path) -> None:
    """The public way to another tracker."""

    class Mine(fl.Tracker):
        def __init__(self) -> None:
            self.sent, self.seen = 0, []

        def say(self, tag: str, value: float, round: int) -> None:
            self.seen.append((tag, round))

    mine = Mine()
    fl.run(write_recipe(tmp_path), sets=["federation.rounds=1"], watch=mine)
    assert ("train/loss", 1) in mine.seen and ("personal_test/accuracy_mean", 0) in mine.seen
