"""Files as people have them: what Excel writes in half of Europe, workbooks, JSON lists, packed files, folders of texts."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from fedlora.data.columns import strings
from fedlora.data.labels import classes
from fedlora.data.lines import LINE, place, shown
from fedlora.data.sources import read
from fedlora.errors import ConfigError, DataError

TEXT = "text;label\nMüller, 38.5 °C;ja\nkein Befund;nein\n"


def rows(table: pa.Table) -> dict[str, list[Any]]:
    return {n: table.column(n).to_pylist() for n in shown(table)}


# delimiters -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-8-sig", "utf-16"])
def test_what_excel_writes_in_half_of_europe(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(TEXT.replace("\n", "\r\n").encode(encoding))
    said = {"text": ["Müller, 38.5 °C", "kein Befund"], "label": ["ja", "nein"]}
    assert rows(read(path, encoding=encoding)) == said
    if encoding == "utf-8-sig":
        assert rows(read(path)) == said  # a mark of UTF-8 needs no word
    else:
        with pytest.raises(
            DataError, match=f"set data.encoding to .*{'utf-16' if encoding == 'utf-16' else 'latin-1'}"
        ):
            read(path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found(delimiter: str, tmp_path: Path) -> None:
    """Also where texts and even the names of the columns hold the others."""
    body = [["a text; or | two,\tor more", "label"], ["x, y; z", "1"], ["p|q\tr", "2"], ["lines\nand; lines", "3"]]
    path = tmp_path / "r.csv"
    with open(path, "w", newline="") as f:
        csv.writer(f, delimiter=delimiter).writerows(body)
    found = read(path)
    assert shown(found) == body[0]
    assert rows(found) == {body[0][0]: [r[0] for r in body[1:]], "label": [1, 2, 3]}


def test_a_delimiter_in_a_name_is_none(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("text, as said;label\nfine;1\nwell, well;2\n")
    assert rows(read(path)) == {"text, as said": ["fine", "well, well"], "label": [1, 2]}


def test_a_delimiter_may_be_said(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("a;b~c\n1;2~3\n")
    assert rows(read(path, delimiter="~")) == {"a;b": ["1;2"], "c": [3]}
    path.write_text('a\tb\n"1;\t2"\t3\n')
    assert rows(read(path, delimiter="tab")) == {"a": ["1;\t2"], "b": [3]}


def test_one_column_needs_no_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text('text\nfine\n"well, well"\n')
    assert rows(read(path)) == {"text": ["fine", "well, well"]}


@pytest.mark.parametrize("content", ["a,b;c\n1,2;3\n4,5;6\n", "a,b;c\n1,2\n3;4\n"])
def test_a_delimiter_that_cannot_be_told_is_an_error(content: str, tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text(content)
    with pytest.raises(
        DataError, match=r"data.delimiter: the first line of .* holds commas and semicolons, and .* data.delim"
    ):
        read(path)


def test_a_row_of_other_width_says_line_and_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("text;label\nfine;1\na; b;2\n")
    with pytest.raises(DataError, match=r"line 3: 3 fields, expected 2 .* quote the texts that hold semicolons"):
        read(path)


# lines ----------------------------------------------------------------------------------------------------------------

FIELD = st.text(st.sampled_from('ab," \n\r;é'), max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(FIELD, FIELD), min_size=1, max_size=8), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_every_row_knows_its_line(body: list[tuple[str, str]], end: str, blank: bool) -> None:
    """Whatever texts hold: the line is where Python's csv module begins to read the row."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["x", "y"])
    wanted = []
    for r in body:
        if blank:
            out.write(end)
        wanted.append(len(io.StringIO(out.getvalue(), newline=None).read().split("\n")))
        writer.writerow(r)
    from fedlora.data.separated import separated

    table = separated("r.csv", out.getvalue().encode(), ",", True)
    assert table.column(LINE).to_pylist() == wanted
    assert place(table, 0) == f"r.csv, line {wanted[0]}"


def test_lines_survive_a_choice_of_rows_and_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text(
            'id,text\n1,"two\nlines"\n2,x\n3,"a\n\nb"\n4,y\n'.replace("1,", f"{name}1,")
        )
    found = read(tmp_path, limit=5, seed=3)
    line_of = {"1": 2, "2": 4, "3": 5, "4": 8}
    for i in range(5):
        id = str(found.column("id")[i].as_py())
        assert f"line {line_of[id[-1]]}" in place(found, i)
    assert {place(found, i).partition(",")[0] for i in range(5)} == {str(tmp_path / "a.csv"), str(tmp_path / "b.csv")}


def test_errors_name_the_line_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text('text,label\n"two\nlines",x\n\nb,\n')
    with pytest.raises(DataError, match=r"column 'label' is empty in .*r.csv, line 5 \(1 of 2 rows are\)"):
        classes(read(path), "label")
    path.write_text('text,label\n"two\nlines",x\nb,q\n')
    with pytest.raises(DataError, match=r"label 'q' \(.*r.csv, line 4, 1 rows in all\)"):
        classes(read(path), "label", ["x", "y"])
    lines = tmp_path / "r.jsonl"
    lines.write_text('{"text": "a"}\n\n{"text": null}\n')
    with pytest.raises(DataError, match=r"no value in .*r.jsonl, line 3 \("):
        strings(read(lines), "text", "data.text")
    parquet.write_table(pa.table({"text": ["a", None]}), tmp_path / "r.parquet")
    with pytest.raises(DataError, match=r"no value in .*r.parquet, row 2 \("):
        strings(read(tmp_path / "r.parquet"), "text", "data.text")


# JSON lists -----------------------------------------------------------------------------------------------------------


def test_a_json_list_is_read_as_its_lines_are(tmp_path: Path) -> None:
    body = [{"text": "a\n], b", "tags": ["x"]}, {"text": 'say "é"', "tags": []}]
    (tmp_path / "r.json").write_text(json.dumps(body, indent=2))
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, body)))
    found = read(tmp_path / "r.json")
    assert rows(found) == rows(read(tmp_path / "r.jsonl")) == {k: [r[k] for r in body] for k in body[0]}
    assert [place(found, i).rpartition(" ")[2] for i in (0, 1)] == ["2", "8"]
    (tmp_path / "r.json").write_text("\n".join(json.dumps(b, indent=1) for b in body))  # objects over several lines
    assert rows(read(tmp_path / "r.json")) == rows(found)
    assert [place(read(tmp_path / "r.json"), i).rpartition(" ")[2] for i in (0, 1)] == ["1", "7"]
    (tmp_path / "r.json").write_text("\n".join(map(json.dumps, body)))
    assert rows(read(tmp_path / "r.json")) == rows(found)  # one object a line under this ending, as before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('[\n{"a": 1},\n{"a": 2,}\n]', r"line 3: not JSON"),
        ('[\n{"a": 1},\n3\n]', r"line 3: a int, not an object"),
        ('[\n{"a": 1}\n{"a": 2}\n]', r"line 3: no comma and no end of the list"),
        ('[\n{"a": 1},\n{"a": 2}\n', r"line 4: no comma and no end of the list"),
        ('[\n{"a": 1},\n', r"line 3: the list does not end; was the file cut off"),
        ('[\n{"a": 1}\n]\n{"a": 2}', r"line 4: something follows the end"),
        ('[\n{"a": 1},\n{"a": {"b": 1}}\n]', r"line 3: .*expected one type in each column"),
        ("[]", r"has no rows"),
        ("null", r"line 1: a NoneType, not an object"),  # pyarrow ends the process here
        ('{"a": 1}\nnull', r"line 2: a NoneType, not an object"),
        ('{\n"a": 1\n}\n{"a": 2', r"line 4: not JSON"),
        ("[" * 100_000, r"line 1: not JSON"),
    ],
)
def test_json_lists_that_are_none(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(DataError, match=says):
        read(tmp_path / "r.json")


# packed files ---------------------------------------------------------------------------------------------------------


def test_gzip_and_zip(tmp_path: Path) -> None:
    (tmp_path / "r.csv.gz").write_bytes(gzip.compress(TEXT.encode("cp1252")))
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as z:
        z.writestr("deep/r.csv", TEXT.encode("cp1252"))
        z.writestr("__MACOSX/deep/._r.csv", b"\x00")
    said = {"text": ["Müller, 38.5 °C", "kein Befund"], "label": ["ja", "nein"]}
    for name in ("r.csv.gz", "r.zip"):
        found = read(tmp_path / name, encoding="cp1252")
        assert rows(found) == said
    assert place(found, 1) == f"{tmp_path}/r.zip/deep/r.csv, line 3"
    assert rows(read(tmp_path, encoding="cp1252"))["label"] == said["label"] * 2  # in a folder too


def test_packed_files_that_are_damaged(tmp_path: Path) -> None:
    whole = gzip.compress(TEXT.encode() * 50)
    (tmp_path / "r.csv.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"no whole gz file .*cut off"):
        read(tmp_path / "r.csv.gz")
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as z:
        z.writestr("a.csv", TEXT)
        z.writestr("b.csv", TEXT)
    with pytest.raises(DataError, match=r"holds 2 files: a.csv, b.csv; expected one; unpack it"):
        read(tmp_path / "two.zip")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "two.zip").read_bytes()[:60])
    with pytest.raises(DataError, match="no whole zip file"):
        read(tmp_path / "cut.zip")


# workbooks ------------------------------------------------------------------------------------------------------------


def workbook(path: Path, **sheets: list[list[Any]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, body in sheets.items():
        sheet = book.create_sheet(name)
        for row in body:
            sheet.append(row)
    book.save(path)
    return path


def test_a_workbook(tmp_path: Path) -> None:
    import datetime

    day = datetime.datetime(2024, 5, 1)
    body = [[None], ["text", "label", "when", "mixed", "half"], ["a", 1, day, 1, 1], [], ["b", 2, day, "x", 2.5]]
    found = read(workbook(tmp_path / "r.xlsx", Data=body))
    assert rows(found) == {
        "text": ["a", "b"], "label": [1, 2], "when": [day, day], "mixed": ["1", "x"], "half": [1.0, 2.5],
    }  # fmt: skip
    assert [place(found, i) for i in (0, 1)] == [f"{tmp_path}/r.xlsx, sheet 'Data', row {n}" for n in (3, 5)]


def test_a_workbook_with_several_sheets(tmp_path: Path) -> None:
    path = workbook(tmp_path / "r.xlsx", North=[["text"], ["n"]], South=[["text"], ["s"]])
    with pytest.raises(
        DataError, match=r"data.sheet: .* holds 2 sheets: 'North', 'South'; expected one, or data.sheet"
    ):
        read(path)
    assert rows(read(path, sheet="South")) == {"text": ["s"]}
    with pytest.raises(DataError, match=r"has no sheet 'Soth'; did you mean 'South'"):
        read(path, sheet="Soth")


def test_workbooks_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cell B1 is blank, expected the name of the column"):
        read(workbook(tmp_path / "r.xlsx", S=[["text", None], ["a", "b"]]))
    with pytest.raises(DataError, match=r"sheet 'S' is empty"):
        read(workbook(tmp_path / "r.xlsx", S=[[None]]))
    with pytest.raises(DataError, match=r"no value in .*sheet 'S', row 3 \("):
        strings(read(workbook(tmp_path / "r.xlsx", S=[["text", "n"], ["a", 1], ["#N/A", 2]])), "text", "data.text")
    (tmp_path / "r.xlsx").write_bytes((tmp_path / "r.xlsx").read_bytes()[:300])
    with pytest.raises(DataError, match="is no whole workbook"):
        read(tmp_path / "r.xlsx")
    (tmp_path / "old.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    with pytest.raises(DataError, match=r"Excel 97 to 2003, expected .xlsx"):
        read(tmp_path / "old.xls")


# folders of texts -----------------------------------------------------------------------------------------------------


def test_a_folder_of_texts_with_labels_by_folder(tmp_path: Path) -> None:
    for split, label, n in (("train", "pos", 2), ("train", "neg", 1), ("test", "pos", 1)):
        (tmp_path / split / label).mkdir(parents=True)
        for i in range(n):
            (tmp_path / split / label / f"{i}.txt").write_text(f'{split} {label}\nnumber {i}, "open')
    found = read(tmp_path / "train")
    assert rows(found) == {
        "text": ['train neg\nnumber 0, "open', 'train pos\nnumber 0, "open', 'train pos\nnumber 1, "open'],
        "label": ["neg", "pos", "pos"],
    }
    assert place(found, 2) == str(tmp_path / "train/pos/1.txt")
    assert rows(read(tmp_path, split="test"))["text"] == ['test pos\nnumber 0, "open']
    (tmp_path / "train/note.txt").write_text("I have no label")
    with pytest.raises(DataError, match=r"note.txt lies beside the folders .* whose names are labels"):
        read(tmp_path / "train")


def test_a_readme_beside_tables_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("about these data")
    assert rows(read(tmp_path)) == {"text": ["about these data"]}
    (tmp_path / "r.csv").write_text("text\na\n")
    assert rows(read(tmp_path)) == {"text": ["a"]}


# addresses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["https://example.org/r.csv", ["HTTP://example.org"], "s3://bucket/r.parquet"])
def test_addresses_are_refused_as_they_are(source: Any) -> None:
    name = source if isinstance(source, str) else source[0]
    with pytest.raises(ConfigError, match=f"data.source: got '{name}', expected a file here.* fetch it first"):
        read(source)
