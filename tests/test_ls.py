"""fedlora ls and fedlora doctor: what is here, and in which state."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from cli import fedlora, write_recipe

from fedlora import __version__, kernels
from fedlora.cli import doctor
from fedlora.kernels import library


def test_ls_tells_runs_that_are_done_unfinished_and_damaged(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, federation={"rounds": 1})
    for name in ("deep/done", "half", "broken"):
        fedlora("run", recipe, "-q", "-o", tmp_path / "runs" / name)
    (tmp_path / "runs/half/summary.json").unlink()
    (tmp_path / "runs/broken/summary.json").write_text("{")
    (tmp_path / "runs/no-run").mkdir()
    found = {
        Path(x["folder"]).name: x
        for x in map(json.loads, fedlora("ls", tmp_path / "runs", "--json").stdout.splitlines())
    }
    assert {n: x["state"] for n, x in found.items()} == {"done": "done", "half": "unfinished", "broken": "damaged"}
    summary = json.loads((tmp_path / "runs/deep/done/summary.json").read_text())
    assert (found["done"]["metric"], found["done"]["score"]) == ("accuracy", summary["test"])
    assert found["half"]["score"] is None and (found["half"]["round"], found["half"]["rounds"]) == (1, 1)
    assert all(0 <= x["age_seconds"] < 3600 for x in found.values())
    said = fedlora("ls", tmp_path / "runs").stdout
    assert "deep/done" in said and f"accuracy {summary['test']:.3f}" in said and "summary.json" in said
    assert "no run folder here" in fedlora("ls", tmp_path / "runs/no-run", code=1).stderr
    assert "no such folder" in fedlora("ls", tmp_path / "nowhere", code=1).stderr


def test_doctor_tells_versions_and_what_would_switch_more_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {f.what: f for f in doctor.findings()}
    assert found["fedlora"].found == __version__
    assert f"torch {metadata.version('torch')}" in found["libraries"].found
    assert found["extra report"].on
    real = metadata.version
    gone = {"plotly"}

    def version(name: str) -> str:
        if name in gone:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    poorer = {f.what: f for f in doctor.findings()}
    extra = poorer["extra report"]
    assert (extra.on, extra.found, extra.remedy) == (False, "lacks plotly", 'pip install "fedlora[report]"')
    assert poorer["C compiler"].on is False and "gcc" in poorer["C compiler"].remedy
    assert all(f.remedy for f in poorer.values() if f.what.startswith("extra") and f.on is False)


def test_doctor_says_of_operators_what_runs_use(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"vector", "vector2", "dropout", "dropout2"}  # a processor with AVX-512 and without AMX
    monkeypatch.setattr(library, "unavailable", lambda name="amx": None if name in have else "the CPU has no amx_tile")
    monkeypatch.setattr(kernels, "missing", lambda: None)
    said = {f.what: f for f in doctor.findings()}["compiled operators"]
    assert said.on is True
    assert said.found == "attention, activations and dropout: fp32 on AVX-512, bf16 on AVX-512"
    monkeypatch.setattr(kernels, "missing", lambda: "there is no C compiler")
    said = {f.what: f for f in doctor.findings()}["compiled operators"]
    assert (said.on, said.found) == (False, "there is no C compiler") and "gcc" in said.remedy


def test_doctor_prints_what_it_finds() -> None:
    rows = json.loads(fedlora("doctor", "--json").stdout)
    assert {"what", "found", "on", "remedy"} == set(rows[0])
    assert "bf16 products" in fedlora("doctor").stdout
