"""The example that trains by hand and with fedlora gives the same numbers, and its training is no idle one."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example() -> Any:
    spec = spec_from_file_location("fedavg_by_hand", ROOT / "examples/fedavg_by_hand.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_fedavg_by_hand_and_with_fedlora_are_equal(example: Any, tmp_path: Path) -> None:
    mine, losses, furthest = example.compare(tmp_path / "run")
    assert len(mine) == example.ROUNDS
    np.testing.assert_allclose(losses, mine, rtol=1e-5)
    assert furthest < 1e-5
    assert mine[-1] < mine[0] - 0.01


def test_the_clients_of_the_example_differ(example: Any) -> None:
    """In size, so that the weights of the average matter, and in their classes."""
    data = example.some_data()
    assert len(set(data.splits["train"].sizes.tolist())) > 1
    shares = [np.bincount(data.examples.labels[data.splits["train"][k]], minlength=3) for k in range(example.CLIENTS)]
    assert max(s.max() / s.sum() for s in shares) > 0.5
