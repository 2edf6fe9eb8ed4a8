"""Bad input, one by one: a clear error or a stated fall-back, no traceback, nothing lost. All through the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli import fedlora, rows, write_csv, write_recipe


def refused(folder: Path, *says: str, sets: tuple[str, ...] = (), code: int = 2, **sections: Any) -> str:
    """The recipe is refused by `check` and by `run` alike, with these words, and leaves no run folder."""
    recipe = write_recipe(folder, **sections)
    flags = [x for s in sets for x in ("--set", s)]
    for command in ("check", "run"):
        said = " ".join(fedlora(command, recipe, *flags, code=code).stderr.split())
        for text in says:
            assert text in said
    assert not (folder / "run").exists()
    return said


def test_missing_recipe(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    said = fedlora("run", tmp_path / "recipes.yaml", code=2).stderr
    assert "no such file" in said
    assert "recipe.yaml" in said


def test_missing_file(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    refused(tmp_path, "row.csv does not exist", "did you mean 'rows.csv'", data={"source": str(tmp_path / "row.csv")})


def test_wrong_column(tmp_path: Path) -> None:
    refused(tmp_path, "no column 'txt'", "did you mean 'text'", data={"text": "txt"})


def test_all_errors_at_once(tmp_path: Path) -> None:
    """Of the recipe, each naming field, value and remedy."""
    said = refused(
        tmp_path, "method.rank: got 0", "train.lr: got -1", "partition.kind: got 'dirichle'", "did you mean 'dirichlet'",
        "model.targets: got 'quer[', expected auto, names of layers, or a regular expression",
        "federation.rounds: got 0", "method.alhpa", "problems in the configuration",
        method={"rank": 0, "alhpa": 3}, train={"lr": -1}, partition={"kind": "dirichle"}, federation={"rounds": 0}, model={"targets": "quer["},
    )  # fmt: skip
    assert said.count(" - ") >= 5


def test_data_and_model_errors_together(tmp_path: Path) -> None:
    """What shows only when files are opened is collected as well."""
    refused(
        tmp_path,
        "no column 'txt'",
        "'quary' matches no layer",
        "did you mean 'query'",
        data={"text": "txt"},
        model={"targets": ["quary"]},
    )


def test_label_only_in_test(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    write_csv(tmp_path / "test.csv", [*rows(12, 1), ("the planet", "space", "site-1")])
    refused(
        tmp_path,
        "label 'space' (",
        "test.csv, line 14, 1 rows in all) occurs only here",
        data={"test": str(tmp_path / "test.csv")},
    )


def test_empty_client_is_filled(tmp_path: Path) -> None:
    """A draw that leaves clients empty: they take rows of the largest, as stated."""
    recipe = write_recipe(
        tmp_path, partition={"kind": "dirichlet", "alpha": 0.01, "clients": 8, "min_size": 3}, federation={"rounds": 1}
    )
    fedlora("run", recipe, "-q")
    facts = json.loads((tmp_path / "run/partition.json").read_text())
    assert min(sum(facts["sizes"][s][k] for s in facts["sizes"]) for k in range(8)) >= 3
    assert min(facts["sizes"]["train"]) >= 1


def test_more_clients_than_rows(tmp_path: Path) -> None:
    refused(
        tmp_path,
        "500 clients with at least min_size=1 rows each need 500 rows, the data has 120",
        partition={"clients": 500, "min_size": 1},
    )


def test_one_class_clients_train_and_are_scored(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, partition={"kind": "classes", "classes": 1, "clients": 3})
    fedlora("run", recipe, "-q")
    facts = json.loads((tmp_path / "run/partition.json").read_text())
    assert [sum(c > 0 for c in row) for row in facts["histogram"]["train"]] == [1, 1, 1]
    assert json.loads((tmp_path / "run/summary.json").read_text())["test"] is not None


def test_one_class_data(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    write_csv(tmp_path / "one.csv", [r for r in rows(60) if r[1] == "sea"])
    refused(
        tmp_path,
        "column 'label' holds only 'sea', expected two or more classes",
        data={"source": str(tmp_path / "one.csv")},
    )


def test_not_utf8(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    text = "text,label,who\n" + "".join(f"caf\xe9 {t},{label},{w}\n" for t, label, w in rows(60))
    (tmp_path / "latin.csv").write_bytes(text.encode("latin-1"))
    source = str(tmp_path / "latin.csv")
    refused(tmp_path, "is not utf-8: byte 18 (line 2) is 0xe9; set data.encoding", data={"source": source})
    fedlora("check", write_recipe(tmp_path, data={"source": source, "encoding": "latin-1"}))


def test_nan_loss_drops_the_round_and_keeps_the_rest(tmp_path: Path) -> None:
    """Training that explodes: the round is dropped with its reason, what was committed stays and can be served."""
    write_recipe(tmp_path, federation={"rounds": 2})
    fedlora("run", tmp_path / "recipe.yaml", "-q", "-o", tmp_path / "fine")
    recipe = write_recipe(tmp_path, federation={"rounds": 60}, train={"optimizer": "sgd", "lr": 1e30, "steps": 4})
    said = " ".join(fedlora("run", recipe, "-q", code=1).stderr.split())
    assert "0 acceptable uploads of 4" in said
    assert "non-finite" in said
    assert "lower train.lr, set train.clip" in said
    assert "earlier rounds are kept" in said
    from fedlora.federation.store import Store

    assert Store(tmp_path / "run").load_server() is not None


@pytest.mark.parametrize("rank", [0, -1, 64, 1.5, "eight"])
def test_rank(rank: Any, tmp_path: Path) -> None:
    says = "rank 64 exceeds the layer" if rank == 64 else f"method.rank: got {rank!r}"
    refused(tmp_path, says, method={"rank": rank})


def test_output_folder_of_another_recipe(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, federation={"rounds": 1})
    fedlora("run", recipe, "-q")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    said = " ".join(fedlora("run", recipe, "--set", "method.rank=4", code=1).stderr.split())
    assert "belongs to recipe" in said
    assert "method.rank 2 there, 4 here" in said
    assert {p: p.read_bytes() for p in before} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/photo.jpg").write_bytes(b"x")
    assert "holds other files (photo.jpg)" in fedlora("run", recipe, "-o", tmp_path / "mine", code=1).stderr
    assert os.listdir(tmp_path / "mine") == ["photo.jpg"] or set(os.listdir(tmp_path / "mine")) == {
        "photo.jpg",
        ".lock",
    }


def test_tampered_state(tmp_path: Path) -> None:
    """A changed client state is refused by name; a damaged newest server state costs one round, not the run."""
    recipe = write_recipe(tmp_path, federation={"rounds": 3})
    fedlora("run", recipe, "-q")
    run = tmp_path / "run"
    newest = sorted((run / "server").iterdir())[-1]
    good = {p: p.read_bytes() for p in (newest, run / "metrics.jsonl")}
    newest.write_bytes(good[newest][: len(good[newest]) // 2])
    said = fedlora("resume", run)
    assert "Going on from round 2, the one before" in " ".join(said.stderr.split())
    assert {p: p.read_bytes() for p in good} == good
    client = next(iter(sorted((run / "clients").rglob("000002.safetensors"))))
    data = bytearray(client.read_bytes())
    data[-3] ^= 1
    client.write_bytes(bytes(data))
    said = fedlora("predict", run, "goal", "--client", "c0", "--round", "last", code=None)
    others = [fedlora("predict", run, "goal", "--client", c, "--round", "last", code=None) for c in ("c1", "c2", "c3")]
    bad = [x for x in (said, *others) if x.returncode]
    assert len(bad) == 1
    assert client.name in bad[0].stderr
    assert "checksum does not match" in bad[0].stderr


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or os.geteuid() != 0, reason="needs root to mount a small disk")
def test_full_disk(tmp_path: Path) -> None:
    """A disk of 40 kB fills up in mid-run: the error says so; on a larger disk the run goes on to the same end."""
    import shutil
    import subprocess

    recipe = write_recipe(tmp_path, federation={"rounds": 6})
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(small)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small disk")
    try:
        said = " ".join(fedlora("run", recipe, "-q", "-o", small / "run", code=1).stderr.split())
        assert "the disk is full; free some space and resume: committed rounds are kept" in said
        shutil.copytree(small / "run", tmp_path / "copy")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    fedlora("resume", tmp_path / "copy", "-q")
    fedlora("run", recipe, "-q", "-o", tmp_path / "whole")
    assert (tmp_path / "copy/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["resume", "nowhere"], "nowhere: no such run folder"),
        (["report", "."], "holds no recipe.yaml"),
        (["compare", "."], "no run folder here or below"),
        (["run"], "give a recipe, or a finished run with --from"),
        (["rnu", "x"], "No such command 'rnu'"),
        (["run", "x.yaml", "--sett", "a"], "No such option '--sett'"),
    ],
)
def test_wrong_arguments(arguments: list[str], says: str, tmp_path: Path) -> None:
    said = fedlora(*arguments, code=None, cwd=tmp_path)
    assert said.returncode in (1, 2)
    assert says in said.stderr


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [1,\n", "\x00", "name: x\nname: y\n", "42"])
def test_a_file_that_is_no_recipe(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    said = fedlora("run", path, code=2).stderr
    assert "r.yaml" in said or "problem" in said


def test_a_recipe_is_not_a_folder(tmp_path: Path) -> None:
    assert "a folder" in fedlora("run", tmp_path, code=2).stderr
