"""What all tests share: no network, one thread, the data folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", FLWR_TELEMETRY_ENABLED="0")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and small pretrained weights, or a skip."""
    folder = Path(os.environ.get("FEDLORA_SHARED", Path(__file__).parents[1] / "../shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}; set FEDLORA_SHARED to where it is")
    return folder


@pytest.fixture(autouse=True, scope="session")
def any_processor() -> Iterator[None]:
    """Recipes that leave model.dtype open compute in fp32 on every machine; test_dtype.py tests what they do without this."""
    from fedlora.recipe import device

    with pytest.MonkeyPatch.context() as m:  # for fixtures of modules too
        m.setattr(device, "PRODUCTS", ())
        yield


@pytest.fixture(autouse=True)
def bases_stay(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Law over every run of every test: nothing of the frozen base changes, no weight and no buffer, in any bit."""
    module = sys.modules.get("fedlora.federation.run")
    if module is None:  # this test makes no run
        yield
        return
    run = module.Federation.run

    def watched(f: Any, *args: Any, **more: Any) -> Any:
        before = {n: v.clone() for n, v in f.model.base.state_dict().items()}
        try:
            return run(f, *args, **more)
        finally:
            after = f.model.base.state_dict()
            assert after.keys() == before.keys()
            assert [n for n, v in before.items() if not torch.equal(v, after[n])] == []

    monkeypatch.setattr(module.Federation, "run", watched)
    yield
