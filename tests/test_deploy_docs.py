"""docs/deploy.md is true: every command in it is run, with this machine in place of the server's."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from cli import command, environment, fedlora, model_folder, rows, write_csv
from test_docs import block
from test_flower import free_port

from fedlora.deploy.audit import digest
from fedlora.deploy.coordinator import told_to_sites
from fedlora.recipe import Recipe

ROOT = Path(__file__).parents[1]
DEPLOY = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
MARKS = ["try", "recipe", "keys", "server", "policy", "client a", "client b", "status", "site"]


def commands(mark: str, port: int, **names: str) -> list[list[str]]:
    """The lines of a block as arguments of fedlora."""
    text = block(DEPLOY, f"test: deploy {mark}").replace("fl.example.org:8443", f"127.0.0.1:{port}")
    text = text.replace("fl.example.org", "127.0.0.1").replace("0.0.0.0:8443", f"127.0.0.1:{port}")
    for old, new in names.items():
        text = text.replace(old, new)
    out = []
    for line in text.replace("\\\n", " ").splitlines():
        command, *arguments = shlex.split(line, comments=True)
        assert command == "fedlora"
        out.append(arguments)
    return out


def test_every_block_is_run() -> None:
    assert re.findall(r"<!-- test: deploy (.*) -->", DEPLOY) == MARKS
    assert DEPLOY.count("```") == 2 * len(MARKS)


@pytest.mark.slow
def test_from_two_empty_machines_to_a_personal_adapter(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    model_folder(tmp_path / "model")
    data = [(text, ("calm", "urgent")[int(label == "sea")]) for text, label, _ in rows(160)]
    write_csv(tmp_path / "a.csv", data[:80], ("text", "label"))
    write_csv(tmp_path / "b.csv", data[80:], ("note", "outcome"))
    recipe = block(DEPLOY, "test: deploy recipe")
    assert "{name: minilm}" in recipe
    # What `auto` chooses decides what a site is asked to accept, and the processes below choose for themselves.
    (tmp_path / "sites.yaml").write_text(recipe.replace("minilm", "./model, dtype: fp32"), encoding="utf-8")
    (tmp_path / "site.yaml").write_text(
        block(DEPLOY, "test: deploy policy").replace("minilm", "./model"), encoding="utf-8"
    )
    accepted = digest(told_to_sites(Recipe.load(tmp_path / "sites.yaml")))
    port = free_port()
    for line in commands("keys", port):
        fedlora(*line, cwd=tmp_path)

    def start(mark: str) -> subprocess.Popen[str]:
        (line,) = commands(mark, port, DIGEST=accepted)
        return subprocess.Popen(
            command(*line), cwd=tmp_path, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    server, a, b = start("server"), start("client a"), start("client b")
    try:
        said, _ = server.communicate(timeout=240)
        assert server.returncode == 0, said
        assert f"--accept {accepted}" in said
    finally:
        for p in (server, a, b):
            p.send_signal(signal.SIGINT) if p.poll() is None else None
        texts = [p.communicate(timeout=30)[0] for p in (a, b)]
    for text in texts:
        assert "round 3 of 3: trained 1 client(s)" in text
        assert "policy of this site (site.yaml)" in text
        assert "stopped; what the server has accepted is kept here" in text
    for line in commands("status", port):
        fedlora(*line, cwd=tmp_path)
    assert (tmp_path / "runs/triage/report.html").exists()
    assert (tmp_path / "shared-adapter/adapter_model.safetensors").exists()
    audit = [json.loads(x)["event"] for x in (tmp_path / "state-a/audit.jsonl").read_text().splitlines()]
    assert audit[:4] == ["start", "accepted", "asked", "sent"]
    (run,) = [p.name for p in (tmp_path / "state-a").iterdir() if p.is_dir()]
    export, predict = commands("site", port, RUN=run)
    fedlora(*export, cwd=tmp_path)
    assert (tmp_path / "adapter-a/hospital-a/adapter_model.safetensors").exists()
    said = fedlora(*predict, cwd=tmp_path).stdout
    assert said.strip().split()[0] in ("calm", "urgent")


@pytest.mark.slow  # the README's own trial is in the quick ones
def test_a_trial_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    import tempfile

    model_folder(tmp_path / "model")
    data = [(text, ("calm", "urgent")[int(label == "sea")]) for text, label, _ in rows(120)]
    write_csv(tmp_path / "a.csv", data, ("text", "label"))
    recipe = block(DEPLOY, "test: deploy recipe").replace("minilm", "./model")
    (tmp_path / "sites.yaml").write_text(recipe, encoding="utf-8")
    before = set(Path(tempfile.gettempdir()).glob("fedlora-*"))
    (line,) = commands("try", 0)
    fedlora(*line, "-o", "run", cwd=tmp_path)
    assert (tmp_path / "run/report.html").exists()
    assert set(Path(tempfile.gettempdir()).glob("fedlora-*")) == before
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [x for x in left.splitlines() if "fedlora.flower.trial" in x and str(tmp_path) in x]
    fedlora("run", "sites.yaml", "--set", "data.source=a.csv", "--set", "partition.clients=2", "-o", "simulated",
            "--set", "run.block=1", cwd=tmp_path)  # fmt: skip
    both = [json.loads((tmp_path / f / "summary.json").read_text()) for f in ("run", "simulated")]
    assert both[0]["test"] == pytest.approx(both[1]["test"], abs=1e-6)
    assert both[0]["bytes"] == both[1]["bytes"]
