"""No tensor stays behind when the model is on an accelerator. See pretend.py: no accelerator is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from test_contract import TABLE

SCRIPT = Path(__file__).with_name("pretend.py")


def test_local_work_stays_on_its_device() -> None:
    """Of every method of the contract; one process does them all."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert {name: found[name] for name in TABLE} == dict.fromkeys(TABLE, "")
