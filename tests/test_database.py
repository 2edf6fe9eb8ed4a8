"""Rows that a database gives: SQLite always, PostgreSQL where its server is installed."""

from __future__ import annotations

import datetime
import decimal
import os
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.data.columns import column, strings
from fedlora.data.labels import classes
from fedlora.data.lines import place, shown
from fedlora.data.sources import read
from fedlora.errors import ConfigError, DataError

pytest.importorskip("sqlalchemy")
QUERY = "SELECT text, label FROM notes ORDER BY id"


@pytest.fixture
def notes(tmp_path: Path) -> str:
    """The address of a database with three notes."""
    base = sqlite3.connect(tmp_path / "notes.db")
    base.execute("CREATE TABLE notes (id INTEGER, text TEXT, label TEXT, n REAL)")
    body = [(1, "a, 50 % :x", "yes", 1.5), (2, "b", "no", None), (3, None, "no", 2.0)]
    base.executemany("INSERT INTO notes VALUES (?, ?, ?, ?)", body)
    base.commit()
    base.close()
    return f"sqlite:///{tmp_path}/notes.db"


def test_the_rows_of_a_query(notes: str) -> None:
    found = read(notes, query="SELECT text, label, n FROM notes WHERE text LIKE '%:x' OR id = 2 ORDER BY id")
    assert {n: found.column(n).to_pylist() for n in shown(found)} == {
        "text": ["a, 50 % :x", "b"], "label": ["yes", "no"], "n": [1.5, None],
    }  # fmt: skip
    assert place(found, 1) == "the query's row 2"
    assert read([notes], query=QUERY, limit=2).num_rows == 2
    with pytest.raises(DataError, match=r"column 'text' has no value in the query's row 3 \(1 of 3"):
        strings(read(notes, query=QUERY), "text", "data.text")


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELECT text FROM notes WHERE id > 9", r"gives no rows \(columns \['text'\]\), expected at least one"),
        ("SELECT txt FROM notes", r"cannot run 'SELECT txt FROM notes'; it says: no such column: txt"),
        ("SELEC 1", r"it says: near \"SELEC\": syntax error"),
        ("SELECT text, label AS text FROM notes", r"more than one column 'text', .* rename one with AS"),
        ("DELETE FROM notes", "attempt to write a readonly database"),
        ("PRAGMA user_version = 3", "readonly|expected a query that gives rows"),
    ],
)
def test_queries_that_give_nothing(query: str, says: str, notes: str) -> None:
    with pytest.raises(DataError, match=says):
        read(notes, query=query)
    assert read(notes, query=QUERY).num_rows == 3  # nothing is lost


def test_a_query_without_the_columns(notes: str) -> None:
    with pytest.raises(DataError, match=r"data.label: no column 'labl' among the columns \['text', 'label'\]"):
        column(read(notes, query=QUERY), "labl", "data.label")


def test_addresses_of_no_database(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"note.db does not exist"):
        read(f"sqlite:///{tmp_path}/note.db", query=QUERY)
    assert not list(tmp_path.iterdir())  # SQLite would make one
    with pytest.raises(DataError, match=r"no database is called 'oracel'; expected e.g. sqlite:"):
        read("oracel://host/name", query=QUERY)
    (tmp_path / "r.db").write_bytes(b"this is no database at all" * 40)
    with pytest.raises(DataError, match="file is not a database"):
        read(f"sqlite:///{tmp_path}/r.db", query=QUERY)
    with pytest.raises(ConfigError, match=r"data.query: got None, expected a query beside a database"):
        read(f"sqlite:///{tmp_path}/r.db")
    with pytest.raises(ConfigError, match=r"data.query: got .* expected null, as data.source is no database"):
        read("r.csv", query=QUERY)


@pytest.mark.parametrize("url", ["postgresql://me:hunter2@host/name", "postgresql://me@host/name?password=hunter2"])
def test_a_password_is_neither_kept_nor_shown(url: str) -> None:
    with pytest.raises(ConfigError, match=r"an address without a password.* PGPASSWORD") as e:
        read(url, query=QUERY)
    assert "hunter2" not in str(e.value)


def test_a_server_that_is_not_there() -> None:
    pytest.importorskip("psycopg")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))  # bound and not listening: refused
        with pytest.raises(DataError, match=r"(?i)connection refused"):
            read(f"postgresql://me@127.0.0.1:{s.getsockname()[1]}/name", query=QUERY)


# PostgreSQL -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a PostgreSQL server of our own, on a socket of a folder of our own."""
    pytest.importorskip("psycopg")
    found = shutil.which("initdb") or next(
        iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))), None
    )
    if found is None:
        pytest.skip("needs the binaries of a PostgreSQL server (initdb, pg_ctl), e.g. Debian's package postgresql")
    bin = Path(found).resolve().parent
    folder = tmp_path_factory.mktemp("pg")
    # PostgreSQL does not run as root.
    who: dict[str, Any] = {}
    if os.geteuid() == 0:
        who = {"user": "nobody"}
        shutil.chown(folder, "nobody")
        for parent in folder.parents:
            if parent.owner() == "root" and parent != Path("/tmp") and str(parent).startswith("/tmp/"):
                parent.chmod(parent.stat().st_mode | 0o011)

    def call(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, **who)
        assert done.returncode == 0, done.stderr + done.stdout

    call(str(bin / "initdb"), "-D", str(folder / "data"), "-U", "fedlora", "--auth=trust", "-E", "UTF8", "--no-sync")
    options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off"
    call(str(bin / "pg_ctl"), "-D", str(folder / "data"), "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql://fedlora@/postgres?host={folder}"
    finally:
        call(str(bin / "pg_ctl"), "-D", str(folder / "data"), "-m", "immediate", "stop")


@pytest.fixture(scope="module")
def filled(server: str) -> str:
    import psycopg

    with psycopg.connect(server) as c:
        c.execute("CREATE TABLE notes (id int, text text, label text, tags text[], price numeric, day date, key uuid)")
        for i, (text, label) in enumerate((("Müller :x 50 %", "yes"), ("b", "no"), (None, "no"))):
            c.execute("INSERT INTO notes VALUES (%s, %s, %s, %s, %s, %s, gen_random_uuid())",
                      (i, text, label, ["x", "y"][:i], decimal.Decimal("1.50"), datetime.date(2024, 5, 1)))  # fmt: skip
    return server


@pytest.mark.slow
def test_a_real_postgresql(filled: str) -> None:
    found = read(filled, query="SELECT *, id::bigint AS wide FROM notes WHERE text LIKE '%:x%' OR id = 1 ORDER BY id")
    assert found.column("text").to_pylist() == ["Müller :x 50 %", "b"]
    assert found.column("tags").to_pylist() == [[], ["x"]]
    assert found.column("day").to_pylist() == [datetime.date(2024, 5, 1)] * 2
    assert found.column("price").to_pylist() == [decimal.Decimal("1.50")] * 2
    assert [len(k) for k in strings(found, "key", "data.text")] == [36, 36]
    assert classes(found, "label")[1] == ("no", "yes")
    with pytest.raises(DataError, match=r"no value in the query's row 3 \("):
        strings(read(filled, query="SELECT text FROM notes ORDER BY id"), "text", "data.text")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("SELECT txt FROM notes", r'it says: column "txt" does not exist'),
        ("SELECT text FROM note", r'it says: relation "note" does not exist'),
        ("DELETE FROM notes RETURNING text", "read-only transaction"),
        ("SELECT text FROM notes WHERE false", "gives no rows"),
        ("SELECT text, label AS text FROM notes", "more than one column 'text'"),
    ],
)
def test_a_real_postgresql_says_no(query: str, says: str, filled: str) -> None:
    with pytest.raises(DataError, match=says):
        read(filled, query=query)
    assert read(filled, query="SELECT id FROM notes").num_rows == 3


@pytest.mark.slow
def test_a_database_that_does_not_exist(server: str) -> None:
    with pytest.raises(DataError, match=r'database "nothing" does not exist'):
        read(server.replace("/postgres?", "/nothing?"), query=QUERY)
