"""Exports where they are used: a command for vLLM and SGLang, and the hub, as a local stand-in of its API sees it."""

from __future__ import annotations

import base64
import json
import shlex
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from cli import command, environment, fedlora, write_recipe
from test_generation import recipe

import fedlora as fl
from fedlora.errors import ConfigError
from fedlora.serving import serve


class Hub(BaseHTTPRequestHandler):
    """Takes every repository and every small file; `kept` holds what came."""

    kept: dict[str, Any]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.say({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            self.kept["repo"] = json.loads(body)
            return self.say({"url": f"http://{self.headers['Host']}/someone/model", "name": "someone/model"})
        if self.path.startswith("/api/models/someone/model/preupload/"):
            files = [f | {"uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.say({"files": files})
        if self.path.startswith("/api/models/someone/model/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.say(
                {
                    "commitUrl": f"http://{self.headers['Host']}/someone/model/commit/1",
                    "commitOid": "1",
                    "hookOutput": "",
                }
            )
        return self.say({"validated": True})

    def do_GET(self) -> None:
        self.say({"id": "someone/model", "sha": "0", "siblings": []})

    def say(self, what: Any, code: int = 200) -> None:
        text = json.dumps(what).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, dict[str, Any]]]:
    Hub.kept = {}
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Hub.kept
        server.shutdown()


def test_push_uploads_what_export_writes(
    hub: tuple[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fl.run(write_recipe(tmp_path), sets=["federation.rounds=1"])
    client = fl.load(tmp_path / "run").federation.data.ids[0]
    [folder] = fl.load(tmp_path / "run").export(tmp_path / "out", [client])
    address, kept = hub
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    words = command(
        "push", tmp_path / "run", "someone/model", "-c", client
    )  # a process of its own: the hub's client reads these once
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = kept.pop("repo")
    assert made.get("private") is True or made.get("visibility") == "private"
    want = {f"{folder.name}/{p.name}": p.read_bytes() for p in folder.iterdir()}
    assert kept == want and f"{folder.name}/adapter_model.safetensors" in want
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    said = subprocess.run(words, env=environment(), capture_output=True, text=True).stderr
    assert "the hub did not take 'someone/model'" in said and "Traceback" not in said


@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_the_command_names_every_clients_adapter(server: Any, tmp_path: Path) -> None:
    fl.run(recipe(tmp_path, generation={"scores": []}))
    fedlora("export", tmp_path / "run", "-o", tmp_path / "out", "--all-clients", "--serve", server)
    words = shlex.split((tmp_path / "out/serve.sh").read_text().splitlines()[1])
    rest = words[words.index("--lora-modules" if server == "vllm" else "--lora-paths") + 1 :]
    pairs = (
        [(m["name"], m["path"]) for m in map(json.loads, rest)]
        if server == "vllm"
        else [tuple(p.split("=")) for p in rest]
    )
    assert pairs == [(c, str(tmp_path / "out" / c)) for c in ("s0", "s1", "s2")]
    assert all((Path(p) / "adapter_model.safetensors").is_file() for _, p in pairs)
    assert words[words.index("--max-lora-rank") + 1] == ("8" if server == "vllm" else "2")  # vLLM takes some ranks only


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(ConfigError, match="this run's task is classification"):
        serve.check("vllm", "classification", False)
    with pytest.raises(ConfigError, match="adapters beside --serve"):
        serve.check("vllm", "causal-lm", True)
