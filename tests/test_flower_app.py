"""The plain Flower app under Flower's own commands, and both sides of ours without TLS."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cli import command, environment, model_folder, rows, write_csv
from test_flower import free_port

from fedlora.deploy.audit import digest
from fedlora.deploy.coordinator import told_to_sites
from fedlora.recipe import Recipe

pytest.importorskip("flwr")

APP = Path(__file__).parents[1] / "examples" / "flower-app"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A recipe for two sites, their files, and a small model."""
    model_folder(tmp_path / "model")
    data = [(text, ("calm", "urgent")[int(label == "sea")]) for text, label, _ in rows(120)]
    for i, id in enumerate("ab"):
        write_csv(tmp_path / f"{id}.csv", data[60 * i : 60 * (i + 1)], ("text", "label"))
    recipe = {
        "name": "app",
        "model": {"name": "./model", "dtype": "fp32"},  # what `auto` chooses decides what a site is asked to accept
        "data": {
            "source": "(of the site)",
            "text": "text",
            "label": "label",
            "classes": ["calm", "urgent"],
            "max_length": 16,
        },
        "method": {"name": "fedsa", "rank": 2},
        "train": {"steps": 4, "batch_size": 4, "lr": 0.01, "dropout": False},
        "federation": {"rounds": 2},
        "evaluation": {"every": 2},
        "deployment": {"clients": 2, "deadline": 120},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return tmp_path


def accepted(place: Path, *sets: str) -> str:
    """What a site that nobody sits at is told to accept."""
    return digest(told_to_sites(Recipe.load(place / "recipe.yaml", sets)))


def finished(folder: Path, seconds: float) -> dict[str, object]:
    """summary.json as soon as it is there."""
    end = time.monotonic() + seconds
    while not (folder / "summary.json").exists():
        assert time.monotonic() < end, "the run did not end"
        time.sleep(0.5)
    time.sleep(0.5)
    found: dict[str, object] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    """A fedlora command in the background."""
    return subprocess.Popen(
        command(*arguments), cwd=place, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_the_flower_app_runs_under_flower(place: Path) -> None:
    """flower-superlink, two flower-supernodes, flwr run: Flower's processes, our app."""
    link, *ports = (free_port() for _ in range(3))
    bin_ = Path(sys.executable).parent
    env = environment() | {"FLWR_HOME": str(place / "home"), "FLWR_TELEMETRY_ENABLED": "0"}
    env["PATH"] = f"{bin_}{os.pathsep}{env.get('PATH', '')}"
    (place / "home").mkdir()
    (place / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    shutil.copytree(APP, place / "app")
    logs = open(place / "log", "w")  # noqa: SIM115 - closed below
    processes = []

    def begin(*arguments: str) -> None:
        processes.append(
            subprocess.Popen([*arguments], cwd=place, env=env, stdout=logs, stderr=logs, start_new_session=True)
        )

    try:
        begin(
            str(bin_ / "flower-superlink"),
            "--insecure",
            "--port",
            str(link),
            "--disable-runtime-dependency-installation",
        )
        time.sleep(5)
        for id, port in zip("ab", ports, strict=True):
            config = f'id="{id}" data="{place}/{id}.csv" state="{place}/state" model="{place}/model" accept="{accepted(place)}"'
            begin(str(bin_ / "flower-supernode"), "--insecure", "--superlink", f"127.0.0.1:{link}", "--port", str(port),
                  "--node-config", config)  # fmt: skip
        time.sleep(4)
        done = subprocess.run(
            [str(bin_ / "flwr"), "run", "app", "local", "--run-config", f'recipe="{place}/recipe.yaml" output="{place}/run"'],
            cwd=place, env=env, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        summary = finished(place / "run", 240)
    finally:
        for p in processes:
            os.killpg(p.pid, signal.SIGTERM)
        for p in processes:
            try:
                p.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(p.pid, signal.SIGKILL)
                p.wait()
        logs.close()
    assert summary["rounds"] == 2
    assert json.loads((place / "run" / "partition.json").read_text())["ids"] == ["a", "b"]


@pytest.mark.slow
def test_without_tls_it_must_be_said_on_both_sides(place: Path) -> None:
    port = free_port()
    said = subprocess.run(
        command("server", "recipe.yaml", "--listen", f"127.0.0.1:{port}"), cwd=place, env=environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert said.returncode == 2
    assert "--insecure" in said.stderr

    wards = [(text, label, f"ward{i % 2}") for i, (text, label, _) in enumerate(rows(80))]
    wards = [(text, ("calm", "urgent")[int(label == "sea")], ward) for text, label, ward in wards]
    write_csv(place / "b.csv", wards, ("text", "label", "ward"))
    server = start(
        place,
        "server",
        "recipe.yaml",
        "--listen",
        f"127.0.0.1:{port}",
        "--insecure",
        "-o",
        "run",
        "--set",
        "deployment.clients=3",
    )
    here = ("--server", f"127.0.0.1:{port}", "--insecure", "--model", "model")
    here = (*here, "--accept", accepted(place, "deployment.clients=3"))
    sites = [
        start(place, "client", "--id", "a", *here, "--data", "a.csv", "--state", "state-a"),
        start(place, "client", "--id", "b", *here, "--data", "b.csv", "--clients", "ward", "--state", "state-b"),
    ]
    try:
        text, _ = server.communicate(timeout=240)
    finally:
        for p in (server, *sites):
            if p.poll() is None:
                p.send_signal(signal.SIGINT)
        for p in sites:
            p.communicate(timeout=60)
    assert server.returncode == 0, text
    assert "everybody who reaches this port can take part" in text
    assert finished(place / "run", 5)["rounds"] == 2
    assert json.loads((place / "run" / "partition.json").read_text())["ids"] == ["a", "b/ward0", "b/ward1"]


@pytest.mark.slow  # without processes: test_deploy.py
def test_a_server_killed_by_the_system_goes_on(place: Path) -> None:
    """SIGKILL between rounds, the same command again: clients come back by themselves, no round is lost or doubled."""
    port = free_port()

    here = ("--server", f"127.0.0.1:{port}", "--insecure", "--trust-server")
    line = ("server", "recipe.yaml", "--listen", f"127.0.0.1:{port}", "--insecure", "-o", "run", "--quiet",
            "--set", "federation.rounds=12", "--set", "evaluation.every=12")  # fmt: skip
    sites = [start(place, "client", "--id", id, *here, "--data", f"{id}.csv", "--state", f"state-{id}") for id in "ab"]
    first = start(place, *line)
    second = None
    try:
        end = time.monotonic() + 120
        states = place / "run" / "server"
        while not (states.is_dir() and max((int(p.stem) for p in states.glob("[0-9]*.safetensors")), default=0) >= 3):
            assert time.monotonic() < end
            assert first.poll() is None
            time.sleep(0.05)
        first.kill()
        first.communicate()
        second = start(place, *line)
        text, _ = second.communicate(timeout=240)
        assert second.returncode == 0, text
    finally:
        for p in (first, *([second] if second else [])):
            if p.poll() is None:
                p.kill()
                p.communicate()
        for p in sites:
            p.send_signal(signal.SIGINT)
            p.communicate(timeout=60)
    lines = [json.loads(x) for x in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [x for x in lines if x["kind"] == "train"]
    assert [x["round"] for x in train] == list(range(1, 13))
    assert all(sorted(x["losses"]) == ["a", "b"] for x in train)
