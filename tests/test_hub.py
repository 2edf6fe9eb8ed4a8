"""What the hub refuses, and a hub that is not there: one line, within seconds."""

from __future__ import annotations

import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from cli import command, environment, write_recipe
from huggingface_hub import errors

from fedlora import hub

REQUEST = httpx.Request("GET", "https://huggingface.co/acme/model")


def chained(inner: Exception) -> OSError:
    """As transformers wraps what the hub's library says."""
    try:
        raise OSError(
            "We have no connection or you have passed local_files_only, so force the download\nand more"
        ) from inner
    except OSError as e:
        return e


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        (errors.GatedRepoError("no", response=httpx.Response(403, request=REQUEST)), "hf auth login"),
        (errors.RepositoryNotFoundError("no", response=httpx.Response(404, request=REQUEST)), "none of this name"),
        (errors.LocalEntryNotFoundError("no"), "does not answer"),
        (ValueError("odd"), "We have no connection"),
    ],
)
def test_the_reason_is_one_line_that_says_what_to_do(inner: Exception, said: str) -> None:
    line = hub.reason(chained(inner), "acme/model")
    assert said in line and "\n" not in line


def test_a_silent_hub_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    class Silent:
        def head(self, *_: object, **__: object) -> None:
            asked.append(1)
            raise httpx.ConnectTimeout("slow")

    monkeypatch.setattr(huggingface_hub, "get_session", Silent)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://silent.invalid")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.time, "monotonic", lambda: 30.0)
    assert not any(hub.reachable() for _ in range(3))
    assert len(asked) == 1
    monkeypatch.setattr(hub.time, "monotonic", lambda: 90.0)
    assert not hub.reachable()
    assert len(asked) == 2


def test_a_gated_model_says_how_to_log_in(tmp_path: Path) -> None:
    class Gated(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    recipe = write_recipe(tmp_path, model={"name": "acme/gated"})
    with HTTPServer(("127.0.0.1", 0), Gated) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            command("check", recipe),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=environment() | where,
        )
        server.shutdown()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("acme/gated'") == 1 and "it is gated" in done.stderr and "hf auth login" in done.stderr
