"""fedlora watch: the page follows the run, and is for this machine alone."""

from __future__ import annotations

import http.client
import json
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from cli import command, environment, fedlora
from test_contract import TABLE
from test_docs import block

from fedlora.cli import main
from fedlora.errors import ConfigError, StateError
from fedlora.federation.callbacks import Callback
from fedlora.federation.setting import Sampling
from fedlora.files import sealed

pytest.importorskip("plotly")
from fedlora.report.live import Live, live_page

ROOT = Path(__file__).parents[1]


def asked(live: Live, path: str = "/", host: str | None = None, method: str = "GET") -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", live.server_address[1], timeout=20)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


@pytest.fixture(scope="module")
def halted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after two of three rounds."""
    folder = tmp_path_factory.mktemp("live") / "run"

    class Stop(Callback):
        def round_start(self, round: int, clients: int) -> None:
            if round == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fed(folder).run(Stop())
    return folder


def fed(folder: Path) -> Any:
    return tiny.federation(TABLE["fedsa"].method, folder, sampling=Sampling(rounds=3))


@pytest.fixture
def live(halted: Path, tmp_path: Path) -> Iterator[Live]:
    shutil.copytree(halted, tmp_path / "run")
    with Live(tmp_path / "run") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_page_follows_the_run(live: Live) -> None:
    """Its state changes when a round is done, and only then; the new page has the new round."""
    before = json.loads(asked(live, "/state")[1])["version"]
    first = asked(live)[1]
    assert before == json.loads(asked(live, "/state")[1])["version"]
    assert "2 rounds." in first and "This run is not finished." in first and json.dumps(before) in first
    heard = []

    class Ear(Callback):
        def round_done(self, round: int, facts: dict[str, Any]) -> None:
            heard.append(json.loads(asked(live, "/state")[1])["version"])

    fed(live.folder).run(Ear())
    assert len(heard) == 1 and heard[0] != before  # before the run is at its end
    after = json.loads(asked(live, "/state")[1])["version"]
    second = asked(live)[1]
    assert after != before and json.dumps(after) in second
    assert "3 rounds." in second and "This run is not finished." not in second


def test_a_deployment_says_who_is_there(live: Live) -> None:
    """And what sites have sent is text."""
    status = {"state": "training", "round": 3, "rounds": 3, "clients": {"c0": "training"}, "sites": {"north": ["c0", "c1"]},
              "failed": {"<script>x": "no\x1b answer"}, "updated": time.time() - 5}  # fmt: skip
    sealed.write(live.folder / "status.json", status)
    page = asked(live)[1]
    assert "Who is there" in page and "cannot join: no\\x1b answer" in page
    assert "<script>x" not in page and "&lt;script&gt;x" in page
    tile = live_page(live.folder)["tiles"][0]
    assert (tile.value, tile.note[:12]) == ("training", "round 3 of 3")


def test_it_is_for_this_machine_alone(live: Live) -> None:
    """Bound to loopback; another site's name for this machine is refused; nothing but its pages can be read or changed."""
    assert live.server_address[0] == "127.0.0.1"
    assert asked(live, host="evil.example.org")[0] == 403
    assert asked(live, host="evil.example.org:80")[0] == 403
    assert asked(live, host=f"localhost:{live.server_address[1]}")[0] == 200
    for path in ("/recipe.json", "/../recipe.json", "/metrics.jsonl", "//etc/passwd", "/state/x"):
        assert asked(live, path)[0] == 404
    assert asked(live, method="POST")[0] == 501
    status, text, headers = asked(live)
    assert status == 200 and "default-src 'self'" in headers["Content-Security-Policy"]
    assert "http://" not in text.replace("http://www.w3.org", "") and 'src="plotly.js"' in text
    assert asked(live, "/plotly.js")[2]["Content-Type"].startswith("text/javascript")


def test_a_run_that_cannot_be_read_keeps_its_page(live: Live) -> None:
    good = asked(live)[1]
    (live.folder / "recipe.json").write_text("{", encoding="utf-8")
    assert asked(live)[1] == good


def test_wrong_folders_and_addresses(halted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StateError, match=r"no run folder"):
        Live(tmp_path)
    with pytest.raises(StateError, match=r"no such folder; give a run folder"):
        Live(halted / "recipe.json")
    with Live(halted) as taken, pytest.raises(ConfigError, match=r"--listen: got .*, expected a free address"):
        Live(halted, "127.0.0.1", taken.server_address[1])
    assert main(["watch", str(halted), "--listen", "nowhere"]) == 2
    assert "--listen: got 'nowhere', expected host:port" in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "none")]) == 1


def test_the_commands_of_the_docs(live: Live, tmp_path: Path) -> None:
    """Those of docs/runs.md under "Looking at runs", in their order; watch is asked for its page and then stopped."""
    text = block((ROOT / "docs/runs.md").read_text(encoding="utf-8"), "test: looking")
    folder = tmp_path / "home"
    shutil.copytree(live.folder, folder / "runs/notes")
    names = []
    for line in text.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "fedlora"
        names.append(arguments[0])
        if arguments[0] != "watch":
            assert fedlora(*arguments, cwd=folder).stdout.strip()
            continue
        with subprocess.Popen(
            command(*arguments), cwd=folder, stdout=subprocess.PIPE, text=True, env=environment()
        ) as running:
            assert running.stdout is not None
            url = re.findall(r"http://127\.0\.0\.1:\d+/", running.stdout.readline())[0]
            with urllib.request.urlopen(url, timeout=20) as answer:
                assert "2 rounds." in answer.read().decode()
            running.send_signal(signal.SIGINT)
            assert running.wait(20) == 0
    assert names == ["ls", "status", "watch", "doctor"]
