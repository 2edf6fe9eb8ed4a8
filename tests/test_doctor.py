"""The data doctor: each odd thing is planted in a file, and what is said is compared with what was planted.

Kills: a finding that counts other rows, names another place, or is silent; a clean file that is called odd.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli import rows, write_csv, write_recipe

import fedlora as fl
from fedlora.data.doctor import Finding, folded

pytestmark = pytest.mark.filterwarnings(
    r"ignore:.* the head's outputs are drawn anew from run.seed:UserWarning", "ignore:data.max_length:UserWarning"
)


def look(
    folder: Path, table: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label", "who"), **sections: Any
) -> Any:
    """The findings by kind, of a file with these rows; and the facts."""
    write_recipe(folder)
    write_csv(folder / "rows.csv", table, header)
    recipe = write_recipe(folder, **{"partition": {"kind": "iid", "clients": 2}, **sections})
    checked = fl.check(recipe, measure=False)
    found: dict[str, list[Finding]] = {}
    for f in checked.data.findings:
        found.setdefault(f.kind, []).append(f)
    return found, checked


def distinct(n: int) -> list[tuple[str, str, str]]:
    """Rows whose texts are all different."""
    return [(f"{t} w{i}", label, who) for i, (t, label, who) in enumerate(rows(n))]


def lines(folder: Path, *numbers: int) -> tuple[str, ...]:
    """Places in the file, whose first line has the names of the columns."""
    return tuple(f"{folder}/rows.csv, line {n}" for n in numbers)


def test_clean_data_have_nothing_odd(tmp_path: Path) -> None:
    found, checked = look(tmp_path, distinct(120))
    assert not found
    assert checked.data.rows == {"source": 120}
    assert "nothing odd" in repr(checked)


def test_empty_and_blank_texts(tmp_path: Path) -> None:
    data = distinct(120)
    for i, t in ((4, ""), (50, ""), (9, "   "), (99, "\t")):
        data[i] = (t, *data[i][1:])
    found, _ = look(tmp_path, data)
    assert set(found) == {"empty", "blank"}
    assert (found["empty"][0].count, found["empty"][0].places) == (2, lines(tmp_path, 6, 52))
    assert (found["blank"][0].count, found["blank"][0].places) == (2, lines(tmp_path, 11, 101))


def test_duplicates_and_leaks_are_counted_against_the_split(tmp_path: Path) -> None:
    """Oracle: sets of texts over the rows of each side, which the federation says."""
    from fedlora.recipe import Recipe, build

    data = distinct(100)
    data += [data[i] for i in range(0, 60, 3)]
    found, _ = look(tmp_path, data)
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    fed = build.data_of(recipe, build.tokenizer_of(recipe))
    side = {s: [data[i][0] for i in r.rows] for s, r in fed.splits.items()}
    assert found["duplicates"][0].count == len(side["train"]) - len(set(side["train"]))
    leaks = {s: sum(t in set(side["train"]) for t in side[s]) for s in ("validation", "test")}
    assert sorted(f.count for f in found["leak"]) == sorted(n for n in leaks.values() if n)
    assert "labels-differ" not in found


def test_equal_texts_with_different_labels(tmp_path: Path) -> None:
    data = distinct(120)
    data[7] = (data[3][0], "sea" if data[3][1] != "sea" else "food", "x")
    found, _ = look(tmp_path, data)
    (f,) = found["labels-differ"]
    assert (f.count, f.places) == (2, lines(tmp_path, 5, 9))


def test_labels_that_differ_in_spelling_alone(tmp_path: Path) -> None:
    data = distinct(120)
    for i, label in ((0, "Sport"), (3, "sport "), (6, "N/A"), (9, "na"), (12, "  Null")):
        data[i] = (data[i][0], label, "x")
    found, _ = look(tmp_path, data)
    (alike,) = found["labels-alike"]
    assert all(repr(x) in alike.text for x in ("Sport", "sport ", "sport")) and alike.count == 3
    (missing,) = found["labels-missing"]
    assert all(repr(x) in missing.text for x in ("N/A", "na", "  Null")) and missing.count == 3
    assert folded(" A  b ") == folded("a B") != folded("ab")


@pytest.mark.parametrize(
    ("label", "word"),
    [
        (lambda i: f"2024-{i % 12 + 1:02d}-{i % 28 + 1:02d}", "dates"),
        (lambda i: f"{i % 28 + 1}.{i % 12 + 1}.2024", "dates"),
        (lambda i: f"id{i}", "names or numbers of rows"),
        (lambda i: str(i % 55), "quantity"),
        (lambda i: "a very long description of what has been seen " * 2 + str(i % 9), "texts"),
    ],
)
def test_a_column_that_is_no_label(label: Any, word: str, tmp_path: Path) -> None:
    found, _ = look(tmp_path, [(t, label(i), w) for i, (t, _, w) in enumerate(distinct(120))])
    assert list(found) == ["no-label"]  # and nothing is said of its classes
    assert word in found["no-label"][0].text and "data.label" in found["no-label"][0].text


def test_numbers_may_be_classes(tmp_path: Path) -> None:
    found, _ = look(tmp_path, [(t, str(i % 5), w) for i, (t, _, w) in enumerate(distinct(120))])
    assert not found


def test_classes_with_few_rows(tmp_path: Path) -> None:
    data = [*distinct(120), ("a rare one", "rare", "x")]
    found, checked = look(tmp_path, data)
    assert "1 of 4 classes" in found["few-rows"][0].text and "'rare' 1" in found["few-rows"][0].text
    assert "'rare'" in found["untested"][0].text
    assert len(checked.run.label_names) == 4


def test_lengths_are_those_before_a_cut(tmp_path: Path) -> None:
    """The word tokenizer makes a token of a word, and adds two."""
    words = [3] * 60 + [8] * 59 + [40]
    data = [(" ".join(["the"] * (n - 1) + [f"w{i}"]), ["sea", "food"][i % 2], "x") for i, n in enumerate(words)]
    _, checked = look(tmp_path, data, data={"max_length": 10})
    t = checked.data.tokens
    assert (t.median, t.most, t.longest) == (5, 10, 42)
    assert t.cut == pytest.approx(1 / 120)


def test_pairs_that_share_a_passage(tmp_path: Path) -> None:
    data = [(f"passage {i // 4}", f"question {i}", ["sea", "food"][i % 2]) for i in range(120)]
    pairs = {"text": ["passage", "question"]}
    found, _ = look(tmp_path, data, ("passage", "question", "label"), data=pairs)
    (f,) = found["group"]
    assert "partition.group=passage" in f.text and f.count > 10


def test_a_file_is_named_once() -> None:
    assert str(Finding("x", "odd", 9, ("a b.csv, line 7", "a b.csv, line 9"))) == "odd (a b.csv, lines 7, 9, ...)"
    assert str(Finding("x", "odd", 2, ("row 7", "row 9"))) == "odd (rows 7, 9)"
    assert str(Finding("x", "odd", 2, ("a.csv, line 7", "b.csv, line 9"))) == "odd (a.csv, line 7, b.csv, line 9)"
    assert str(Finding("x", "odd", 1, ("row 7",))) == "odd (row 7)" and str(Finding("x", "odd", 1)) == "odd"
