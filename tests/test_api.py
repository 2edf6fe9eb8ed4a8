"""The Python face: own module, own data, own method; the same as the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cli import write_recipe
from torch import Tensor, nn

import fedlora as fl
from fedlora.errors import ConfigError
from fedlora.methods.average import HomLoRA
from fedlora.tree import Key


class Sensor(nn.Module):
    """A user's own network: two inputs, no transformers anywhere."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.left, self.right, self.out = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g) * 0.5

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(torch.tanh(self.left(a) + self.right(b)))


def sensors(n: int = 240) -> dict[str, np.ndarray]:
    r = np.random.default_rng(0)
    a, b = r.normal(size=(n, 6)).astype(np.float32), r.normal(size=(n, 4)).astype(np.float32)
    return {"a": a, "b": b, "labels": (a[:, 0] + b[:, 1] > 0).astype(np.int64) + (a[:, 1] > 1)}


def own(method: fl.Method, folder: Path, **options: Any) -> fl.Federation:
    data = fl.from_arrays(sensors(), kind="dirichlet", clients=5, alpha=0.5, min_size=20, seed=0)
    model = fl.adapt(Sensor(), targets=["left", "right"], head=["out"], call=lambda m, x: m(x["a"], x["b"]))
    given = {"plan": fl.Plan(steps=4, batch_size=8), "sampling": fl.Sampling(rounds=4)} | options
    return fl.Federation(model, fl.Classification(3), data, method, folder, **given)


def test_own_module_and_data(tmp_path: Path) -> None:
    summary = own(fl.HomLoRA(rank=2, optimizer=fl.AdamW(3e-2)), tmp_path / "r", sampling=fl.Sampling(rounds=15)).run()
    lines = [json.loads(x) for x in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    first = next(x for x in lines if x["kind"] == "eval" and x["split"] == "test")
    assert summary["test"] > first["mean"]["accuracy"] + 0.15
    assert summary["parameters"]["trainable"] == 2 * (8 + 6) + 2 * (8 + 4) + 8 * 3 + 3
    base = Sensor()
    fitted = own(fl.HomLoRA(rank=2), tmp_path / "q").model.base
    # The base never moves.
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), fitted.parameters(), strict=True))


def test_every_shipped_method_runs_on_an_own_module(tmp_path: Path) -> None:
    for name in ("fedsa", "ffa", "local", "pf2lora", "hetlora", "share-b", "fedavg-ft", "centralized"):
        summary = own(fl.METHODS[name](rank=4), tmp_path / name, sampling=fl.Sampling(rounds=1)).run()
        assert summary["rounds"] == 1


@dataclass(frozen=True)
class SharesHalf(HomLoRA):
    """A user's own method: only the first layer's adapter travels."""

    name: ClassVar[str] = "shares-half"
    title: ClassVar[str] = "Half"

    def shares(self, k: Key) -> bool:
        return k.layer == "left"


def test_own_method(tmp_path: Path) -> None:
    f = own(SharesHalf(rank=2, head="personal"), tmp_path / "r")
    f.run()
    loaded = f.store.load_server()
    assert loaded is not None
    assert {k.layer for k in loaded[1]} == {"left"}
    kept = [f.store.load_client(id, 4) or {} for id in f.data.ids]
    assert all({k.layer for k in p if "~" not in k.adapter} == {"right", "out"} for p in kept)
    key = Key("lora", "right", "B")
    assert not torch.equal(kept[0][key], kept[1][key])


def test_own_regression(tmp_path: Path) -> None:
    columns = sensors()
    columns["labels"] = (columns["a"][:, 0] - columns["b"][:, 0]).astype(np.float32)

    class Line(Sensor):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 1)
            torch.nn.init.constant_(self.out.weight, 0.1)

    data = fl.from_arrays(columns, clients=3)
    model = fl.adapt(Line(), targets=["left", "right"], head=["out"])
    f = fl.Federation(
        model,
        fl.Regression(),
        data,
        fl.HomLoRA(rank=3, optimizer=fl.AdamW(2e-2)),
        tmp_path / "r",
        plan=fl.Plan(10, None, 16),
        sampling=fl.Sampling(8),
    )
    summary = f.run()
    assert summary["metric"] == "pearson"
    assert summary["test"] > 0.8


def test_watch_hears_everything(tmp_path: Path) -> None:
    class Ear(fl.Watch):
        heard: ClassVar[list[str]] = []

        def __getattribute__(self, name: str) -> Any:
            if name in fl.Watch.__dict__ and not name.startswith("_"):
                type(self).heard.append(name)
            return super().__getattribute__(name)

    own(fl.HomLoRA(rank=2), tmp_path / "r").run(Ear())
    assert Ear.heard[0] == "start"
    assert Ear.heard[-1] == "end"
    assert Ear.heard.count("round_done") == 4
    rare = {"lowered", "resumed"}  # where memory runs out (test_memory.py), and after an interruption
    assert set(Ear.heard) == {n for n in vars(fl.Watch) if not n.startswith("_")} - rare


def test_a_recipe_from_python_is_the_command_line(tmp_path: Path) -> None:
    """fl.run on a mapping, a Recipe and a file: one and the same result; load opens it."""
    recipe = write_recipe(tmp_path)
    summaries = []
    raw: Mapping[str, Any] = fl.Recipe.load(recipe).resolved()
    for i, given in enumerate((recipe, raw, fl.Recipe.load(recipe))):
        summaries.append(fl.run(given, output=tmp_path / f"r{i}"))
    for s in summaries:
        s.pop("seconds"), s.pop("peak_memory_bytes")
    assert summaries[0] == summaries[1] == summaries[2]
    lines = [(tmp_path / f"r{i}/metrics.jsonl").read_bytes() for i in range(3)]
    assert lines[0] == lines[1] == lines[2]
    opened = fl.load(tmp_path / "r0")
    said = opened.predict(["the goal"], client="c1")
    assert said[0].answer in ("food", "sea", "sport")
    deltas = opened.deltas("c1")
    assert {k.part for k in deltas} >= {"A", "B"}
    assert opened.export(tmp_path / "peft")[0].joinpath("adapter_config.json").exists()
    assert not torch.equal(
        opened.deltas(None, "last")[next(k for k in deltas if k.part == "B")],
        opened.deltas("c1", "last")[next(k for k in deltas if k.part == "B")],
    )


def test_errors_are_the_same(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method.rank: got 0"):
        fl.run(write_recipe(tmp_path), sets=["method.rank=0"])
    with pytest.raises(ConfigError, match=r"from_arrays.kindd: got 3, expected an argument"):
        fl.from_arrays(sensors(), kindd=3)
    with pytest.raises(AttributeError, match="no attribute 'FedSALora'"):
        _ = fl.FedSALora


def test_public_names_exist() -> None:
    for name in fl.__all__:
        assert getattr(fl, name) is not None
        assert name in dir(fl)
