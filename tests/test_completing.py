"""What the shell is told after a Tab, asked as zsh asks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cli import command, environment

from fedlora.files import sealed
from fedlora.methods import METHODS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "runs/first"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: first\n")
    sealed.write(run / "partition.json", {"ids": ["north", "south"]})
    return tmp_path


def proposed(words: str) -> str:
    asked = {"_FEDLORA_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": words}
    return subprocess.run(command(), capture_output=True, text=True, check=False, env=environment() | asked).stdout


def test_tab_proposes_fields_methods_runs_and_clients(folder: Path) -> None:
    assert "train.lr=" in proposed("fedlora run a.yaml --set train.l")
    said = proposed("fedlora run a.yaml --set method.name=pf")
    assert [m for m in METHODS if f"method.name={m}" in said] == [m for m in METHODS if m.startswith("pf")]
    assert str(folder / "runs/first") in proposed(f"fedlora resume {folder}/ru")
    said = proposed(f"fedlora predict {folder}/runs/first --client n")
    assert "north" in said and "south" not in said
