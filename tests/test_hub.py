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
        (errors.LocalEntryNotFoundError("no"), "HF_HUB_OFFLINE is set, and no earlier download"),  # as conftest sets it
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


@pytest.mark.parametrize(("field", "place"), [("model.name", ""), ("data.source", "datasets/")])
def test_what_is_gated_says_how_to_log_in(field: str, place: str, tmp_path: Path) -> None:
    class Gated(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    recipe = write_recipe(tmp_path)
    with HTTPServer(("127.0.0.1", 0), Gated) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        where = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            command("check", recipe, "--no-measure", "--set", f"{field}=acme/gated"),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=environment() | where,
        )
        server.shutdown()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("acme/gated'") == 1 and len(done.stderr.splitlines()) == 2
    assert (
        f"it is gated: accept its terms at {address}/{place}acme/gated, then log in with hf auth login" in done.stderr
    )


def test_a_name_that_is_never_resolved_does_not_hold_a_command_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver may wait for ever, whatever the request's own limit is."""
    import huggingface_hub

    over = threading.Event()

    class Stuck:
        def head(self, *_: object, **__: object) -> None:
            over.wait()

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://stuck.invalid")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Stuck)
    monkeypatch.setattr(hub, "SECONDS", 0.05)
    try:
        assert not hub.reachable()
    finally:
        over.set()
