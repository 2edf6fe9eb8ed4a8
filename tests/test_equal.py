"""Comparisons at equal work: every run is read up to where all have used equally much."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from cli import fedlora, write_recipe

import fedlora as fl
from fedlora.data.batches import LocalWork
from fedlora.errors import StateError
from fedlora.federation.records import EvalLine
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods import METHODS
from fedlora.report import budgets, write_comparison
from fedlora.report.comparison import at_equal_rows, side_by_side
from fedlora.report.read import Records, records
from fedlora.report.tables import compare_rows


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HomLoRA for eight rounds; PF2LoRA, whose step draws four minibatches, for four; FedSA, whose messages are half as large."""
    folder = tmp_path_factory.mktemp("equal")
    for name, rounds, more in (("homlora", 8, {}), ("pf2lora", 4, {"rank_personal": 1}), ("fedsa", 8, {})):
        f = tiny.federation(
            METHODS[name](rank=2, **more), folder / name, plan=LocalWork(steps=3, epochs=None, batch_size=1),
            sampling=Sampling(rounds=rounds), evaluation=Evaluation(every=1, views=("personal", "global")), name=name,
        )  # fmt: skip
        f.run()
    return folder


def read(folder: Path) -> list[Records]:
    return [records(folder / n) for n in ("homlora", "pf2lora", "fedsa")]


def test_what_a_client_uses_is_counted(runs: Path) -> None:
    """By hand: three steps of a row a round, four times the rows where a step draws four minibatches."""
    hom, pf2, fedsa = read(runs)
    for r, draws in ((hom, 1), (pf2, 4), (fedsa, 1)):
        last = max(t.round for t in r.timings)
        for n in (1, last):
            assert budgets.used(r, "steps")[n] == 3 * n  # type: ignore[index]
            assert budgets.used(r, "rows")[n] == 3 * draws * n  # type: ignore[index]
        assert budgets.used(r, "bytes")[last] == r.summary["bytes"]["total"] / 4  # type: ignore[index]
        assert budgets.used(r, "tokens")[last] == sum(t.tokens for t in r.timings) / 4  # type: ignore[index]


@pytest.mark.parametrize(("what", "last"), [("steps", (4, 4, 4)), ("rows", (8, 2, 8))])
def test_runs_are_cut_at_the_least_total(what: Any, last: tuple[int, ...], runs: Path) -> None:
    """Steps: PF2LoRA's 12. Rows: the 24 of the others, which PF2LoRA has seen after two rounds. What is told is what the lines of those
    rounds say: the best of them on validation, and its test score."""
    cut, least = budgets.equal(read(runs), what)
    assert least == {"steps": 12, "rows": 24}[what]
    for whole, r, n in zip(read(runs), cut, last, strict=True):
        assert max(x.round for x in r.lines) == n and r.summary is not None and r.summary["rounds"] == n
        evals = [x for x in whole.lines if isinstance(x, EvalLine) and x.stage is None and x.round <= n]
        best = max(
            (x for x in evals if (x.view, x.split) == ("personal", "validation")),
            key=lambda x: (x.mean["accuracy"], -x.round),
        )
        [test] = [x for x in evals if (x.view, x.split, x.round) == ("personal", "test", best.round)]
        assert (r.summary["chosen_round"], r.summary["test"]) == (best.round, test.mean["accuracy"])
        assert r.summary["bytes"]["total"] == whole.bytes_by_round()[n]
    rows = compare_rows(cut)
    assert all(r[f"{what}_each"] == least for r in rows)


def test_equal_bytes_give_half_messages_twice_the_rounds(runs: Path) -> None:
    cut, least = budgets.equal(read(runs), "bytes")
    for whole, r in zip(read(runs), cut, strict=True):
        spent = budgets.used(whole, "bytes")
        n = max(x.round for x in r.lines)
        assert spent is not None and spent[n] <= least * (1 + 1e-9) < spent.get(n + 1, float("inf"))


def test_the_command_and_python_tell_the_same(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, train={"batch_size": 1, "steps": 4}, evaluation={"every": 1}, federation={"rounds": 4},
                          sweep={"method.name": ["homlora", "pf2lora"]}, method={"rank": 4})  # fmt: skip
    runs = tmp_path / "runs"
    fedlora("run", recipe, "-o", runs)
    done = fedlora("compare", runs, "--equal", "rows", "--json")
    rows = {r["method"]: r for r in json.loads(done.stdout)}
    table = fl.compare(runs, equal="rows").set_index("method")
    assert {m: r["test"] for m, r in rows.items()} == table["test"].to_dict() and set(table["rows_each"]) == {16.0}
    said = "rows: every run is read up to its last round within 16 rows a client"
    assert "equal rows: every run up to its last round within 16 rows a client" in done.stderr
    page = (runs / "comparison.html").read_text(encoding="utf-8")
    assert f"Equal {said}" in page and "What a client does" in page
    assert {r["rows_each"] for r in json.loads(fedlora("compare", runs, "--json").stdout)} == {16.0, 64.0}
    assert "16.0" in fedlora("compare", runs, "--to", "csv", "--equal", "rows").stdout


def test_a_page_at_equal_steps_shows_equal_rows_too(runs: Path, tmp_path: Path) -> None:
    """PF2LoRA is read after four rounds in the first table, after two in the second one; without it, one table says it all."""
    whole = read(runs)
    more = at_equal_rows(whole)
    assert more is not None and "within 24 rows a client" in more.text
    by_hand = [budgets.until(r, n) for r, n in zip(whole, (8, 2, 8), strict=True)]
    assert more.table == side_by_side(compare_rows(by_hand))
    write_comparison([r.folder for r in whole], page := tmp_path / "page.html", equal="steps")
    text = page.read_text(encoding="utf-8")
    assert text.index("within 12 steps a client") < text.index("Side by side") < text.index("At equal rows")
    write_comparison([r.folder for r in whole], page, equal="rows")
    assert "At equal rows" not in page.read_text(encoding="utf-8")
    assert at_equal_rows([whole[0], whole[2]]) is None


def test_a_page_says_why_it_has_no_table_at_equal_rows(runs: Path) -> None:
    hom, pf2, _ = read(runs)
    late = replace(pf2, lines=[x for x in pf2.lines if not isinstance(x, EvalLine) or x.round in (0, 4)])
    more = at_equal_rows([hom, late])
    assert more is not None and not more.table and "first evaluated in round 4" in more.text


def test_what_cannot_be_made_equal_is_said(runs: Path, tmp_path: Path) -> None:
    f = tiny.federation(METHODS["homlora"](rank=2), tmp_path / "late", evaluation=Evaluation(every=3), sampling=Sampling(rounds=3),
                        plan=LocalWork(steps=30, epochs=None, batch_size=2), name="late")  # fmt: skip
    f.run()
    with pytest.raises(
        StateError, match=r"late is first evaluated in round 3, which is past 12 steps a client; set evaluation.every"
    ):
        budgets.equal([*read(runs)[:2], records(tmp_path / "late")], "steps")
    one = read(runs)[0]
    old = replace(one, timings=[replace(t, steps=0) for t in one.timings])
    with pytest.raises(StateError, match="has not recorded its steps"):
        budgets.equal([old], "steps")


def test_a_round_is_chosen_among_those_that_are_left(runs: Path) -> None:
    """Of a run whose scores were made to rise to the end, the last one that is left."""
    run = read(runs)[0]
    risen = [replace(x, mean={**x.mean, "accuracy": x.round / 10}) if isinstance(x, EvalLine) else x for x in run.lines]
    for n in range(1, 9):
        cut = budgets.until(replace(run, lines=risen), n).summary
        assert cut is not None and (cut["chosen_round"], cut["test"], cut["rounds"]) == (n, n / 10, n)
