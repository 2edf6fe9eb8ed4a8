"""What the commands for real sites print, for whoever reads it in a log, hours later."""

from __future__ import annotations

import datetime as dt
import re
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("flwr")

import fedlora.flower  # noqa: F401  (switches Flower's telemetry off)
from fedlora.cli import main
from fedlora.cli.deployment import _say
from fedlora.cli.progress import Bars, Log
from fedlora.cli.tables import status
from fedlora.deploy.site import Holding
from fedlora.errors import ConfigError
from fedlora.federation.records import EvalLine, TrainLine
from fedlora.flower.keys import DAYS
from fedlora.recipe import Recipe


def trained(round: int, refused: dict[str, str]) -> TrainLine:
    nothing: dict[str, dict[str, int]] = {"up": {}, "down": {}}
    return TrainLine(round, 0.5, ["a", "b", "c"], {}, 9, refused, nothing)


def test_keys_says_who_gets_what_and_until_when_it_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert main(["federation", "keys", "a", "b", "--host", "fl.example.org", "-o", str(folder)]) == 0
    said = capsys.readouterr().out
    for id in ("a", "b"):
        (line,) = [x for x in said.splitlines() if x.startswith(f"give to {id}, over a channel you trust: ")]
        file = Path(line.partition(": ")[2])
        assert file == folder / "bundles" / f"{id}.tar.gz" and file.stat().st_mode & 0o777 == 0o600
        with tarfile.open(file) as tar:
            tar.extractall(tmp_path / id, filter="data")
        own = tmp_path / id / id
        assert (own / "ca.pem").read_bytes() == (folder / "ca.pem").read_bytes()
        assert (own / f"{id}.key").read_bytes() == (folder / "clients" / f"{id}.key").read_bytes()
        assert (own / f"{id}.key").stat().st_mode & 0o077 == 0
        about = (own / "README.txt").read_text(encoding="utf-8")
        assert re.match(
            rf"Keys with which the site {id} takes part .* fl.example.org: .* until \d{{4}}-\d\d-\d\d\.\n", about
        )
        assert {p.name for p in own.iterdir()} == {"README.txt", "ca.pem", f"{id}.key"}
    last = dt.datetime.now(dt.UTC) + dt.timedelta(days=DAYS)
    days = {f"{d:%Y-%m-%d}" for d in (last, last - dt.timedelta(days=1))}  # midnight may pass while this runs
    assert set(re.findall(r"valid until (\d{4}-\d\d-\d\d)", said)) <= days
    assert said.count("valid until") == 2
    assert "keep secret" in said and str(folder / "ca.key") in said


def test_lines_have_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    _say(False)("site a joins")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d site a joins\n", capsys.readouterr().err)
    _say(True)("nothing")
    assert capsys.readouterr().err == ""


def test_a_log_has_a_line_a_round() -> None:
    heard: list[str] = []
    log = Log(heard.append, "accuracy")
    log.start("triage", 1, 3)
    log.round_start(2, 3)
    log.record(trained(2, {"c": "late"}))
    log.evaluating(2)
    score = {"accuracy": 0.75}
    log.record(EvalLine(2, "personal", "test", {}, score, score, score))
    log.round_done(2, {"bytes": 2048, "train_seconds": 3.0, "eval_seconds": 1.0})
    log.end({})
    assert heard[0] == "triage: 3 rounds, going on after round 1"
    assert heard[1] == "round 2 of 3: waiting for 3 client(s) to train"
    assert "round 2 of 3: personal test accuracy 0.7500" in heard
    (done,) = [x for x in heard if "done:" in x]
    assert done.startswith("round 2 of 3 done: 2 client(s), 1 refused or late, loss 0.5000, ")


def test_a_sites_words_are_no_markup() -> None:
    """A closing tag that nobody opened would end whoever prints it."""
    from io import StringIO

    from rich.console import Console

    text = StringIO()
    with Bars(Console(file=text, width=200), "accuracy") as bars:
        bars.start("triage", 0, 3)
        bars.record(trained(1, {"a[/]": "full [/bold] [red]disk[/red]"}))
    assert "refused the upload of a[/]: full [/bold] [red]disk[/red]" in text.getvalue()
    table = status(
        {"run": "r", "state": "waiting", "done": 0, "rounds": 3, "metric": None, "bytes": {"up": 0, "down": 0}, "age": 1.0,
         "have": 1, "need": 2, "clients": {"a": "idle"}, "sites": {"a[/b]": ["a[/b]"]}, "failed": {"c[/d]": "no [/e]"}}
    )  # fmt: skip
    Console(file=text, width=200).print(table)
    assert all(x in text.getvalue() for x in ("a[/b]", "c[/d]", "no [/e]"))


def test_a_site_may_say_the_encoding_of_its_files() -> None:
    recipe = Recipe.from_dict(
        {"name": "r", "model": {"name": "minilm"}, "method": {"name": "fedsa"},
         "data": {"source": "x.csv", "text": "t", "label": "l", "classes": ["a", "b"]}}
    )  # fmt: skip
    given = recipe.resolved()
    assert Holding("a", "mine.csv", {"encoding": "cp1252"}).recipe(given).data.encoding == "cp1252"
    assert Holding("a", "mine.csv", {}).recipe(given).data.encoding == "utf-8"
    with pytest.raises(ConfigError, match="encodings"):
        Holding("a", "mine.csv", {"encodings": "cp1252"}).recipe(given)


def test_how_its_rows_are_written_is_the_sites_own_matter() -> None:
    """No order says it, not even of a server that is trusted: a query is asked of the site's database."""
    from fedlora.deploy.policy import SHAPE, Policy

    recipe = Recipe.from_dict(
        {"name": "r", "model": {"name": "minilm"}, "method": {"name": "fedsa"},
         "data": {"source": "sqlite:///theirs.db", "query": "DROP", "text": "t", "label": "l", "classes": ["a", "b"],
                  "format": "tsv", "delimiter": ";", "sheet": "theirs", "missing": "drop"}}
    )  # fmt: skip
    given = recipe.resolved()
    usual = {
        "format": "auto",
        "delimiter": "auto",
        "sheet": None,
        "query": None,
        "missing": "refuse",
        "encoding": "utf-8",
    }
    assert usual.keys() == set(SHAPE)
    own = {"format": "csv", "delimiter": "|", "sheet": "mine", "missing": "drop", "encoding": "cp1252"}
    for said in ({}, own):
        for policy in (None, Policy().with_columns(said)):
            data = Holding("a", "mine.csv", said, policy=policy).recipe(given).data
            assert {k: getattr(data, k) for k in SHAPE} == usual | said
    asks = {"query": "SELECT text, label FROM notes"}
    mine = Holding("a", "sqlite:///mine.db", asks, policy=Policy().with_columns(asks)).recipe(given).data
    assert (mine.source, mine.query) == ("sqlite:///mine.db", asks["query"])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data", "https://example.org/r.csv"], "--data: got 'https://example.org/r.csv', expected a file here"),
        (["--data", "sqlite:///r.db"], "--query: got None, expected a query beside a database"),
        (["--data", "sqlite:///r.db", "--query", "q", "--data", "sqlite:///s.db"], "files, or one database alone"),
        (
            ["--data", "postgresql://a:hunter2@h/b", "--query", "q"],
            "'postgresql://a:***@h/b', expected an address without",
        ),
        (["--data", "r.csv", "--query", "q"], "--query: got 'q', expected null"),
        (["--data", "r.csv", "--delimiter", ";;"], "data.delimiter: got ';;', expected auto, tab, or one character"),
        (["--data", "r.csv", "--missing", "maybe"], "data.missing: got 'maybe', expected 'refuse' or 'drop'"),
        (["--data", "r.csv", "--encoding", "klingon"], "data.encoding: got 'klingon', expected a character encoding"),
    ],
)
def test_a_site_hears_at_once_what_is_wrong_with_its_data(
    flags: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.csv").write_text("text,label\n")
    assert main(["client", "--id", "a", "--server", "localhost:1", "--insecure", *flags]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert says in said and "hunter2" not in said
    assert not Path("fedlora-state").exists()
