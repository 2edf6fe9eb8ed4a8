"""`make reliability` takes its whole path; the counts themselves are laws of other tests, or are made by that command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "bench/reliability.py"


def counted(folder: Path, *parts: str) -> tuple[dict[str, Any], str]:
    """(results, page) of these parts, in little."""
    page = folder / "page.md"
    page.write_text("# Reliability\n\nFirst.\n\n## Attackers\n\nLast.\n", encoding="utf-8")
    command = [
        sys.executable,
        str(SCRIPT),
        *parts,
        "--quick",
        "--results",
        str(folder / "found.json"),
        "--page",
        str(page),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# Reliability\n\nFirst.\n\n<!-- counted") and text.endswith("## Attackers\n\nLast.\n")
    return json.loads((folder / "found.json").read_text(encoding="utf-8")), text


def test_damage_and_strangers_are_counted(tmp_path: Path) -> None:
    """A file has each damage once for each of its kind, and no damage gives other results; results are kept between calls."""
    pytest.importorskip("flwr")
    found, page = counted(tmp_path, "damage")
    table = found["damage"]["table"]
    assert {"recipe.json", "metrics.jsonl", "server's states", "clients' states"} <= table.keys()
    assert all(cell[2] == 0 and sum(cell[:2]) > 0 for row in table.values() for cell in row.values())
    assert "| metrics.jsonl |" in page
    found, page = counted(tmp_path, "connections")
    assert found["damage"]["table"] == table and found["connections"]["answered"] == 20
    assert "## Strangers at the door" in page and "| metrics.jsonl |" in page


@pytest.mark.slow
def test_every_part_takes_its_path(tmp_path: Path) -> None:
    found, page = counted(tmp_path)
    assert found["kills"]["kills"] >= 20 and found["kills"]["exact"] == found["kills"]["runs"] > 0
    assert found["events"]["exact"] == found["events"]["events"] > 60
    assert all(x["cases"] == 20 for x in found["fuzz"].values() if isinstance(x, dict))
    assert found["soak"]["rounds"] > 0 and found["soak"]["lost"] > 0
    assert page.count("\n## ") == 7
