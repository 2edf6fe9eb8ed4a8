"""What methods cost on a model: every method is measured, orders of magnitude are right, and a model that a method cannot
serve is said, not skipped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli import fedlora, model_folder

from fedlora.bench.cost import costs
from fedlora.methods import METHODS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("cost") / "m")


def test_every_method_is_measured(folder: Path) -> None:
    found = {c.method: c for c in costs(str(folder), length=16)}
    assert found.keys() == METHODS.keys()
    home = found["homlora"]
    assert home.seconds > 0 and home.memory > 0
    assert found["ffa"].up < 0.7 * home.up  # B and the head, no A
    assert found["local"].up < 100
    assert found["pf2lora"].memory > home.memory  # the graph of a gradient is kept
    assert found["pf2lora"].seconds > 2 * home.seconds  # four gradients, one of them differentiated again
    assert found["fft"].up > 5 * home.up
    assert found["hetlora"].up < home.up
    assert not any(c.refused for c in found.values())


def test_what_cannot_be_served_is_said(folder: Path) -> None:
    """A rank that no layer of this model has room for."""
    [large] = costs(str(folder), length=16, methods=["fedsa"], options={"rank": 1000})
    assert "rank 1000 exceeds the layer" in large.refused and large.seconds == 0


def test_the_command(folder: Path) -> None:
    done = fedlora("methods", "--cost", str(folder))
    assert done.returncode == 0, done.stderr
    assert "PF2LoRA" in done.stdout and "1.00x" in done.stdout
    done = fedlora("methods", "--cost", str(folder), "--json")
    assert {c["method"] for c in json.loads(done.stdout)} == METHODS.keys()
    done = fedlora("methods", "--cost", str(folder / "nowhere"), code=1)
    assert "does not exist" in done.stderr
    done = fedlora("methods", "--cost", str(folder), "--task", "poetry", code=2)
    assert "expected one of causal-lm, classification, multi-la" in done.stderr
