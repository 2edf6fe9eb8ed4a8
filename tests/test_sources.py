"""Where rows come from: every kind of source gives the same table, and what is wrong is named with its place."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from fedlora.data.columns import strings
from fedlora.data.labels import classes, reals
from fedlora.data.sources import CLIENT, read
from fedlora.errors import ConfigError, DataError

ROWS = {"text": ["a, b", 'say "x"', "line\nbreak", "ümlaut"], "label": [0, 1, 1, 0]}


def write(path: Path, rows: dict[str, list[Any]] = ROWS) -> Path:
    """The rows in the format of the path's ending."""
    names = list(rows)
    body = list(zip(*rows.values(), strict=True))
    if path.suffix == ".parquet":
        parquet.write_table(pa.table(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, r, strict=True))) + "\n" for r in body), encoding="utf-8")
    else:
        tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if path.suffix == ".tsv" else {}
        with open(path, "w", newline="", encoding="utf-8") as f:
            csv.writer(f, **tabs).writerows([names, *body])
    return path


def same(table: pa.Table, rows: dict[str, list[Any]] = ROWS) -> None:
    assert {n: table.column(n).to_pylist() for n in rows} == rows


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_formats_give_the_same_table(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows.{ending}")
    same(read(path))
    same(read(str(tmp_path / "ro*")))
    same(read(tmp_path))
    same(read([str(path), str(path)]), {k: v * 2 for k, v in ROWS.items()})
    odd = path.rename(tmp_path / "rows.data")
    same(read(odd, format=ending))
    with pytest.raises(DataError, match=r"ends in '.data', expected one of .csv"):
        read(odd)


def test_a_tsv_has_no_quoting(tmp_path: Path) -> None:
    """As GLUE's files: a quotation mark is a character."""
    rows = {"text": ['say "x', "a, b"], "label": [0, 1]}
    same(read(write(tmp_path / "r.tsv", rows)), rows)


def test_data_sets_of_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    d = datasets.Dataset.from_dict(ROWS, features=features)
    same(read(d))
    ids, names = classes(read(d), "label")
    assert (list(ids), names) == (ROWS["label"], ("no", "yes"))
    d.save_to_disk(str(tmp_path / "one"))
    same(read(tmp_path / "one"))
    datasets.DatasetDict({"train": d, "dev": d.select([1])}).save_to_disk(str(tmp_path / "both"))
    same(read(tmp_path / "both"))
    assert read(tmp_path / "both", split="dev").num_rows == 1
    with pytest.raises(DataError, match=r"has no split 'deev', it has train, dev; did you mean 'dev'"):
        read(tmp_path / "both", split="deev")


def test_hub_ids_are_tried_and_fail_clearly() -> None:
    with pytest.raises(
        DataError, match=r"'someone/some-data' is no file or folder here and cannot be loaded from the hub"
    ):
        read("someone/some-data")


def test_one_client_per_file(tmp_path: Path) -> None:
    for name in ("north", "south"):
        write(tmp_path / f"{name}.csv")
    assert read(tmp_path, client="file").column(CLIENT).to_pylist() == ["north"] * 4 + ["south"] * 4
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        write(tmp_path / folder / "notes.jsonl")
    found = read([str(tmp_path / "a/notes.jsonl"), str(tmp_path / "b/notes.jsonl")], client="file")
    assert set(found.column(CLIENT).to_pylist()) == {"a/notes", "b/notes"}


def test_splits_of_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet")
    write(tmp_path / "train-00001-of-00002.parquet")
    write(tmp_path / "test.parquet", {"text": ["z"], "label": [1]})
    assert read(tmp_path, split="train").num_rows == 8
    assert read(tmp_path, split="test").num_rows == 1
    with pytest.raises(DataError, match=r"no file of .* is named after the split 'tset'; did you mean 'test'"):
        read(tmp_path, split="tset")


def test_limit_is_a_random_choice_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"n": list(range(200))})
    a, b, c = (read(path, limit=20, seed=s).column("n").to_pylist() for s in (0, 0, 1))
    assert a == b == sorted(a)
    assert a != c
    assert len(set(a)) == 20
    assert read(path, limit=999).num_rows == 200


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("r.csv", b"", r"is empty \(0 bytes\)"),
        ("r.csv", b"text,label\n", r"has no rows \(columns \['text', 'label'\]\)"),
        ("r.csv", b"text,label\na,1\nb,2,3\n", r"line 3: 3 fields, expected 2 .* quote the texts that hold commas"),
        ("r.csv", b"text,text\na,b\n", r"more than one column 'text'"),
        ("r.csv", b"text,label\ncaf\xe9,1\n", r"is not utf-8: byte 14 \(line 2\) is 0xe9; set data.encoding"),
        ("r.tsv", b"text\tlabel\na\t1\nb\n", r"line 3: 1 fields, expected 2"),
        ("r.jsonl", b'{"a": 1}\n{"a": \n', r"line 2: not JSON"),
        ("r.jsonl", b'{"a": 1}\n[2]\n', r"line 2: a list, not an object"),
        ("r.jsonl", b'{"a": 1}\n{"a": {"b": 2}}\n', r"line 2: .*expected one type in each column"),
        ("r.parquet", b"PAR1 nonsense", r"no whole Parquet file"),
    ],
)
def test_malformed_files(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        read(tmp_path / name)


def test_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "rows.csv")
    with pytest.raises(
        DataError, match=r"row.csv does not exist, expected a file or folder; .*did you mean 'rows.csv'"
    ):
        read(tmp_path / "row.csv")
    with pytest.raises(DataError, match=r"no file matches .*x\*.csv"):
        read(str(tmp_path / "x*.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        read(tmp_path / "empty")
    write(tmp_path / "more.csv", {"txt": ["a"], "label": [1]})
    with pytest.raises(DataError, match=r"rename or add 'text', 'txt'"):
        read(tmp_path)


def test_encodings(tmp_path: Path) -> None:
    for encoding in ("latin-1", "utf-16", "utf-8-sig"):
        (tmp_path / "r.csv").write_bytes("text,label\nümlaut,1\n".encode(encoding))
        assert read(tmp_path / "r.csv", encoding=encoding).column("text").to_pylist() == ["ümlaut"]
    with pytest.raises(ConfigError, match="an encoding that Python knows"):
        read(tmp_path / "r.csv", encoding="klingon")


# columns and labels -----------------------------------------------------------------------------------------------------


def test_columns_say_which_row() -> None:
    t = pa.table({"text": ["a", None, "c"], "n": [1, 2, 3], "nested": [[1], [2], [3]]})
    with pytest.raises(DataError, match=r"no column 'txt' among the columns .*did you mean 'text'"):
        strings(t, "txt", "data.text")
    with pytest.raises(DataError, match=r"column 'text' has no value in row 2 \(1 of 3 rows are empty\)"):
        strings(t, "text", "data.text")
    with pytest.raises(DataError, match=r"holds list<.*>, expected text"):
        strings(t, "nested", "data.text")
    assert strings(t, "n", "data.text") == ["1", "2", "3"]


def test_labels() -> None:
    ids, names = classes(pa.table({"y": ["b", "a", "b"]}), "y")
    assert (list(ids), names) == ([1, 0, 1], ("a", "b"))
    ids, names = classes(pa.table({"y": [10, 2, 10]}), "y")
    assert (list(ids), names) == ([1, 0, 1], ("2", "10"))  # numbers in the order of numbers
    ids, _ = classes(pa.table({"y": ["b"]}), "y", ("a", "b"))
    assert list(ids) == [1]
    with pytest.raises(DataError, match=r"label 'z' \(row 2, 1 rows in all\) is not in data.classes"):
        classes(pa.table({"y": ["a", "z"]}), "y", ("a", "b"))
    with pytest.raises(DataError, match=r"holds 0.5 in row 2, expected classes"):
        classes(pa.table({"y": [1.0, 0.5]}), "y")
    assert list(reals(pa.table({"y": [1, 2]}), "y")) == [1.0, 2.0]
    with pytest.raises(DataError, match=r"holds inf in row 2, expected a finite number"):
        reals(pa.table({"y": [1.0, float("inf")]}), "y")
    with pytest.raises(DataError, match=r"holds string, expected numbers"):
        reals(pa.table({"y": ["a"]}), "y")


def test_an_open_quotation_mark_is_named(tmp_path: Path) -> None:
    """pyarrow would read the rest of the file as one text."""
    path = tmp_path / "r.csv"
    path.write_text('text,label\na,0\n"b,1\nc,0\n')
    with pytest.raises(DataError, match=r"line 3: a quotation mark opens a text here and none closes it"):
        read(path)
    path.write_text('text,label\n"a ""x"", b",0\nc,1\n')
    same(read(path), {"text": ['a "x", b', "c"], "label": [0, 1]})


def test_columns_that_cannot_be_told_apart_and_empty_classes(tmp_path: Path) -> None:
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(DataError, match="2 columns are called 'text'"):
        strings(twice, "text", "data.text")
    path = tmp_path / "r.csv"
    path.write_text("text,label\na,x\nb,\nc,y\n")
    with pytest.raises(DataError, match=r"column 'label' is empty in .*r.csv, line 3 \(1 of 3 rows are\)"):
        classes(read(path), "label")


def test_dates_are_classes_and_huge_numbers_are_not(tmp_path: Path) -> None:
    import datetime

    days = [datetime.date(2020, 1, d) for d in (2, 1, 2)]
    found, names = classes(pa.table({"label": pa.array(days)}), "label")
    assert list(names) == ["2020-01-01", "2020-01-02"] and list(found) == [1, 0, 1]
    with pytest.raises(DataError, match="expected classes"):
        classes(pa.table({"label": [1e30, 2.0]}), "label")
    with pytest.raises(DataError, match="float32"):
        reals(pa.table({"label": [1e300, 2.0]}), "label")


def test_a_codec_that_is_no_encoding_of_text_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv")
    with pytest.raises((ConfigError, DataError), match="encoding"):
        read(path, encoding="base64")


# the hub --------------------------------------------------------------------------------------------------------------
def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request, not the six of `datasets`; then only earlier downloads are read, and the error names the remedy."""
    datasets = pytest.importorskip("datasets")
    import httpx
    import huggingface_hub
    from huggingface_hub import constants

    from fedlora import hub

    hub._answers.cache_clear()
    asked = []

    class Dead:
        def head(self, url: str, timeout: float) -> None:
            asked.append((url, timeout))
            raise httpx.ConnectError("no network")

    def load_dataset(*_: object, **__: object) -> None:
        assert datasets.config.HF_HUB_OFFLINE, "datasets would ask, and ask again"
        raise ConnectionError("nothing is in the cache")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Dead)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"the hub does not answer, and no .*; name a copy .* --set data\.source=FILE"
    ) as e:
        read("nyu-mll/glue", subset="sst2")
    assert "\n" not in str(e.value)
    assert asked == [(constants.ENDPOINT, hub.SECONDS)]
    assert hub.SECONDS <= 5
    assert datasets.config.HF_HUB_OFFLINE is False  # as it was


def test_a_data_set_that_is_a_script_is_read_from_the_hubs_parquet_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name: str, subset: str | None = None, **options: Any) -> Any:
        calls.append((name, subset, options))
        if "revision" not in options:
            raise RuntimeError(f"Dataset scripts are no longer supported, but found {name}.py")
        return datasets.Dataset.from_dict(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    same(read("old/script", subset="en"))
    assert [c[2].get("revision") for c in calls] == [None, "refs/convert/parquet"]
    assert calls[0][1] == "en"
    assert calls[1][1] is None
    assert calls[1][2] == {
        "data_dir": "en", "split": None, "revision": "refs/convert/parquet", "trust_remote_code": False
    }  # fmt: skip


def test_a_hub_that_answers_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it answers; and with HF_HUB_OFFLINE nobody is asked."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from huggingface_hub import constants

    from fedlora.hub import reachable

    asked = []

    class Refuses(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(403)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not reachable()
        assert asked == []
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert reachable()
        assert len(asked) == 1
        server.shutdown()
