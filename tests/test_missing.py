"""Rows without a value: refused by default, or left out with counts that are said."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fedlora.data.load import _tables
from fedlora.errors import DataError

ROWS = """text,label,ward
fine,yes,a
,no,a
"two
lines",,b
well,no,
"  ",yes,b
bad,no,a
"""


def read(path: Path, more: tuple[str | None, ...] = (None,), **data: Any) -> pa.Table:
    section = {"source": str(path), "text": "text", "label": "label", "missing": "drop", **data}
    return _tables(section, 0, more)[0]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "r.csv").write_text(ROWS)
    return tmp_path / "r.csv"


def test_rows_are_left_out_and_counted(path: Path) -> None:
    said = rf"3 of 6 rows are left out: 2 without 'text', 1 without 'label'; the first is {path}, line 3"
    with pytest.warns(UserWarning, match=said):
        kept = read(path)
    assert kept.column("text").to_pylist() == ["fine", "well", "bad"]
    with pytest.warns(UserWarning, match="3 of 6"):
        few = read(path, limit=2)  # of the rows that are whole
    assert few.num_rows == 2 and set(few.column("text").to_pylist()) <= {"fine", "well", "bad"}


def test_only_what_the_recipe_names_counts(path: Path) -> None:
    with pytest.warns(UserWarning, match="2 of 6 rows are left out: 2 without 'text'"):
        assert read(path, label=None).num_rows == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(path, label=None, text=None, prompt="text").num_rows == 6  # an empty prompt is one
        assert read(path, missing="refuse").num_rows == 6  # the columns say what is wrong


def test_numbers_lists_and_templates(tmp_path: Path) -> None:
    table = pa.table(
        {"text": ["a", "b", "c"], "label": [1.0, np.nan, None], "words": [["x"], [], None], "s": ["u", None, "v"]}
    )
    with pytest.warns(UserWarning, match="2 of 3 rows .* 2 without 'label'; the first is row 2"):
        assert _tables({"source": table, "text": "text", "label": "label", "missing": "drop"}, 0, ())[0].num_rows == 1
    with pytest.warns(UserWarning, match="1 of 3 rows .* 1 without 'words'"):
        assert _tables({"source": table, "text": "words", "missing": "drop"}, 0, ())[0].num_rows == 2
    with pytest.warns(UserWarning, match="1 of 3 rows .* 1 without 's'"):
        section = {"source": table, "text": "text", "template": "{text} {s}", "missing": "drop"}
        assert _tables(section, 0, ())[0].num_rows == 2
    with pytest.warns(UserWarning, match="1 of 3 rows .* 1 without 's'"):
        assert _tables({"source": table, "text": "text", "missing": "drop"}, 0, ("s",))[0].num_rows == 2


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("text,label\na,\n ,x\n")
    with pytest.raises(
        DataError, match=r"none of 2 rows has a value in every column \(1 without 'text', 1 without 'label'\)"
    ):
        read(tmp_path / "r.csv")
