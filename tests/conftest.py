"""What all tests share: no network, one thread, the data folder."""

from __future__ import annotations

import os
from pathlib import Path

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
