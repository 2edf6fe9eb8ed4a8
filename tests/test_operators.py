"""What whoever runs a server works with: the log, metrics, and the files of examples/deploy."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import socket
import subprocess
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import click
import pytest
import tiny
from typer.main import get_command

pytest.importorskip("flwr")
pytest.importorskip("prometheus_client")

from test_contract import TABLE
from test_deploy import RECIPE, sites

from fedlora.cli import main
from fedlora.cli.app import app
from fedlora.cli.journal import LogFormat, all_of, into, line
from fedlora.cli.metrics import Metrics
from fedlora.cli.progress import Log
from fedlora.data.federated import roster
from fedlora.deploy.notes import Note
from fedlora.deploy.packets import Packet
from fedlora.deploy.remote import Remote, Terms
from fedlora.errors import ConfigError
from fedlora.federation.callbacks import Several
from fedlora.federation.setting import Sampling

DEPLOY = Path(__file__).parents[1] / "examples/deploy"


def scraped(port: int) -> dict[str, float]:
    """Every sample by its name and labels, read as Prometheus reads it."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as r:
        text = r.read().decode()
    return {
        s.name + "".join(f" {v}" for _, v in sorted(s.labels.items())): s.value
        for f in text_string_to_metric_families(text)
        for s in f.samples
    }


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A deployment without a network, in which one client sends nonsense in round 2; its log, its metrics and its records."""
    folder = tmp_path_factory.mktemp("operators")
    method = TABLE["fedsa"].method
    link = sites(method, folder)

    def bad(reply: Packet) -> Packet:
        return Packet(reply.kind, reply.header, dict.fromkeys(reply.parts, b"nonsense"))

    inner = link.exchange

    def exchange(packets: Any, deadline: float) -> Any:
        for node, reply in inner(packets, deadline):
            late = isinstance(reply, Packet) and reply.kind == "train" and reply.header["round"] == 1 and node == 0
            yield node, bad(reply) if late else reply

    link.exchange = exchange
    say = into(folder / "logs/server.log", LogFormat.json, print)
    metrics = Metrics("127.0.0.1", 0)
    heard = all_of(say, metrics.hear)
    terms = Terms(clients=len(link.sites), poll=0.0)
    fed = tiny.federation(
        method, folder / "run", data=roster([], {"train": []}), sampling=Sampling(rounds=3),
        runtime=lambda f, watch: Remote(f, watch, link, terms, RECIPE, heard),
    )  # fmt: skip
    summary = fed.run(Several(Log(say, "accuracy"), metrics))
    samples = scraped(metrics.port)
    metrics.close()
    text = (folder / "logs/server.log").read_text(encoding="utf-8")
    records = [json.loads(x) for x in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"log": [json.loads(x) for x in text.splitlines()], "metrics": samples, "records": records,
            "summary": summary, "port": metrics.port, "sites": len(link.sites)}  # fmt: skip


def test_the_log_tells_what_the_records_tell(logged: dict[str, Any]) -> None:
    """Rounds, bytes, losses, scores, joins and refusals, each once and with its time."""
    log, trains = logged["log"], [x for x in logged["records"] if x["kind"] == "train"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", x["time"]) for x in log)
    of = lambda event: [x for x in log if x["event"] == event]  # noqa: E731
    assert len(of("join")) == logged["sites"]
    for said, train in zip(of("round"), trains, strict=True):
        assert said["round"] == train["round"] and said["loss"] == pytest.approx(train["loss"])
        assert said["bytes_up"] == sum(train["bytes"]["up"].values())
        assert said["bytes_down"] == sum(train["bytes"]["down"].values())
        assert said["refused"] == len(train["refused"])
    refused = [(x["client"], x["round"]) for x in of("refused")]
    assert refused == [(c, t["round"]) for t in trains for c in t["refused"]] and len(refused) == 1
    evals = [x for x in logged["records"] if x["kind"] == "eval"]
    assert [(x["round"], x["view"], x["split"], x["scores"]) for x in of("score")] == [
        (e["round"], e["view"], e["split"], e["mean"]) for e in evals
    ]
    assert log[-1]["event"] == "done" and log[-1]["test"] == logged["summary"]["test"]


def test_metrics_are_sums_of_the_records(logged: dict[str, Any]) -> None:
    m, trains = logged["metrics"], [x for x in logged["records"] if x["kind"] == "train"]
    assert m["fedlora_round"] == m["fedlora_rounds"] == 3 and m["fedlora_done"] == 1
    for d in ("up", "down"):
        assert m[f"fedlora_bytes_total {d}"] == sum(sum(t["bytes"][d].values()) for t in trains)
    assert m["fedlora_uploads_total refused"] == 1
    assert m["fedlora_uploads_total accepted"] == sum(len(t["clients"]) for t in trains) - 1
    assert m["fedlora_joins_total"] == logged["sites"]
    last = [x for x in logged["records"] if x["kind"] == "eval" and x["view"] == "personal" and x["split"] == "test"][
        -1
    ]
    assert m["fedlora_score accuracy test personal"] == pytest.approx(last["mean"]["accuracy"])
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{logged['port']}/metrics", timeout=5)


def test_a_line_holds_no_control_characters_and_is_json() -> None:
    nasty = Note("upload of \x1b[31mc\n refused", "refused", client="\x1b[31mc", loss=math.nan)
    said = line(nasty, LogFormat.json)
    assert said.isprintable() and json.loads(said)["loss"] is None and json.loads(said)["client"] == "\x1b[31mc"
    assert "\x1b" not in line(nasty, LogFormat.text)
    assert json.loads(line("plain", LogFormat.json))["event"] == "note"


def test_a_file_that_is_moved_away_is_made_again(tmp_path: Path) -> None:
    file = tmp_path / "logs/server.log"
    say = into(file, LogFormat.text, print)
    say("one")
    file.rename(tmp_path / "old.log")
    say("two")
    assert file.read_text().endswith("two\n") and (tmp_path / "old.log").read_text().endswith("one\n")


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--log-file: got .*, expected a file that can be written"):
        into(tmp_path, LogFormat.text, print)
    heard: list[str] = []
    file = tmp_path / "server.log"
    say = into(file, LogFormat.text, heard.append)
    file.unlink()
    file.mkdir()
    say("one")
    say("two")
    assert len(heard) == 1 and "lines of the log are lost" in heard[0]


def test_the_server_says_all_problems_of_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cli import write_recipe

    recipe = write_recipe(tmp_path)
    options = [
        "--set",
        "data.classes=[food, sea, sport]",
        "--insecure",
        "--listen",
        "127.0.0.1:0",
        "--log-file",
        str(tmp_path),
    ]
    assert main(["server", str(recipe), *options, "--metrics", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert "--log-file" in said and "--metrics: got 'nowhere', expected host:port" in said
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--metrics: got '127.0.0.1:{port}', expected a free address"):
            Metrics("127.0.0.1", port)


@pytest.mark.parametrize("unit", ["fedlora-server.service", "fedlora-client.service"])
def test_units(unit: str, tmp_path: Path) -> None:
    """The command's options exist; systemd itself finds nothing odd, where it is installed."""
    text = (DEPLOY / unit).read_text(encoding="utf-8")
    (start,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    program, name, *arguments = shlex.split(start)
    assert program == "/opt/fedlora/bin/fedlora"
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, arguments)  # raises for an option that is none
    with pytest.raises(click.UsageError):
        command.make_context(name, [*arguments, "--nonsense"])
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed: the unit's own words are not checked")
    (tmp_path / unit).write_text(text.replace(program, "/bin/true"), encoding="utf-8")
    done = subprocess.run([analyze, "verify", str(tmp_path / unit)], capture_output=True, text=True, check=False)
    own = [x for x in done.stderr.splitlines() if unit in x]
    assert not own, own


def test_the_container_file() -> None:
    """Its instructions exist, it does not end as root, and its extras and its command are ours."""
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    code = re.sub(r"\\\n", " ", "\n".join(x for x in text.splitlines() if not x.startswith("#")))
    steps = [x.split(None, 1) for x in code.splitlines() if x.strip()]
    known = {"FROM", "RUN", "USER", "WORKDIR", "VOLUME", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    assert steps[0][0] == "FROM" and {s for s, _ in steps} <= known
    assert [x for s, x in steps if s == "USER"][-1] not in ("root", "0")
    for s, x in steps:
        if s in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(x), list)
        if s == "RUN":
            subprocess.run(["sh", "-n", "-c", x], check=True)
    project = tomllib.loads((DEPLOY.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"fedlora\[([a-z,]+)\]", code)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert json.loads(next(x for s, x in steps if s == "ENTRYPOINT"))[0] in project["scripts"]
    told = " ".join(x.lstrip("# ").removesuffix("\\") for x in text.splitlines()[3:6] if x.startswith("#"))
    arguments = shlex.split(told)
    name = arguments.index("server")
    get_command(app).commands["server"].make_context("server", arguments[name + 1 :])  # type: ignore[attr-defined]
