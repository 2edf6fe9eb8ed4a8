"""The run folder: whole or not at all, verified when read, nothing lost.

Planted bugs these tests kill: no digest check; client state of a dropped round taken up; metrics not cut back; the state
before the newest pruned too early; a full disk that leaves half a file.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import StateError
from fedlora.federation.store import Store
from fedlora.tree import Key, Params

A = Key("lora", "layer.0", "A")


def leaves(x: float) -> Params:
    return {A: torch.full((2, 3), x), Key("lora", "", "steps"): torch.tensor(7)}


def same(a: Params | None, b: Params) -> bool:
    return a is not None and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rounds(s: Store, n: int, start: int = 0) -> None:
    """Commit rounds start .. n-1, each with one client and one line."""
    for r in range(start, n):
        s.save_client("c", r, leaves(r))
        s.save_server(r + 1, leaves(10 + r), {"note": r}, s.append_metrics([{"round": r + 1}]))


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    s = Store(tmp_path)
    rounds(s, 3)
    round, params, notes = Store(tmp_path).load_server() or (0, {}, {})
    assert (round, notes) == (3, {"note": 2})
    assert same(params, leaves(12))
    assert same(s.load_client("c", 3), leaves(2))
    assert s.load_client("other", 3) is None
    assert Store(tmp_path / "new").load_server() is None


def test_a_site_keeps_what_a_server_may_go_back_to(tmp_path: Path) -> None:
    """A server has two states. Whichever it goes on from, the leaves that it names are at the site, and little else."""
    s = Store(tmp_path, keep="all")
    accepted: list[int] = []
    for r, taken in enumerate([True, False, True, True, False, False, True, True, False, True]):
        s.save_client("a", r, leaves(r))
        s.forget("a", accepted[-1] if accepted else None, r)
        accepted += [r] if taken else []
        for named in accepted[-2:]:
            assert same(s.load_round("a", named), leaves(named))
        assert len(list(s.client_folder("a").iterdir())) <= 3


@pytest.mark.parametrize("id", ["", "..", "a/b", "C", "c", "ü" * 200, "x" * 300, "nul", "a b\n", "c.", "-" * 81])
def test_any_id_is_a_client(id: str, tmp_path: Path) -> None:
    """Ids that are no file names, and ids that some file systems hold to be equal."""
    s = Store(tmp_path)
    s.save_client(id, 0, leaves(1))
    s.save_client("another", 0, leaves(2))
    assert same(s.load_client(id, 1), leaves(1))
    folders = {s.client_folder(i).as_posix().casefold() for i in ("C", "c", id, id + "x")}
    assert len(folders) >= 3
    assert all(p.is_relative_to(tmp_path / "clients") for p in tmp_path.rglob("*.safetensors"))


def test_a_dropped_round_leaves_no_trace(tmp_path: Path) -> None:
    """Client files and metrics lines of a round that was not committed are not taken up."""
    s = Store(tmp_path)
    rounds(s, 2)
    s.save_client("c", 2, leaves(99))
    s.append_metrics([{"round": 3}])
    again = Store(tmp_path)
    again.rewind()
    assert (again.load_server() or (0,))[0] == 2
    assert same(again.load_client("c", 2), leaves(1))
    assert [json.loads(x)["round"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_nothing_committed_means_no_lines(tmp_path: Path) -> None:
    s = Store(tmp_path)
    s.append_metrics([{"round": 0}])
    s.rewind()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("keep", ["last", "all"])
def test_old_states_are_pruned(keep: Any, tmp_path: Path) -> None:
    s = Store(tmp_path, keep)
    rounds(s, 6)
    servers = sorted(p.stem for p in (tmp_path / "server").iterdir())
    clients = sorted(p.stem for p in s.client_folder("c").iterdir())
    assert servers == (["000005", "000006"] if keep == "last" else [f"{r:06d}" for r in range(1, 7)])
    assert clients == (["000003", "000004", "000005"] if keep == "last" else [f"{r:06d}" for r in range(6)])


def flips(data: bytes) -> list[bytes]:
    """The file with one bit changed, at many places; cut off; empty; longer."""
    step = max(1, len(data) // 60)
    changed = [data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :] for i in range(0, len(data), step)]
    return [*changed, data[:-1], data[: len(data) // 2], b"", data + b"x"]


def test_a_damaged_client_state_is_never_loaded(tmp_path: Path) -> None:
    s = Store(tmp_path)
    rounds(s, 1)
    (path,) = s.client_folder("c").glob("*.safetensors")
    good = path.read_bytes()
    for bad in flips(good):
        path.write_bytes(bad)
        with pytest.raises(
            StateError, match=r"checksum does not match: it was cut off or changed .* Restore this file"
        ):
            s.load_client("c", 1)
    path.write_bytes(good)
    assert same(s.load_client("c", 1), leaves(0))


def test_a_client_state_in_the_wrong_place_is_refused(tmp_path: Path) -> None:
    s = Store(tmp_path)
    for id in ("a", "b"):
        s.save_client(id, 0, leaves(1))
    (s.client_folder("a") / "000000.safetensors").replace(s.client_folder("b") / "000000.safetensors")
    with pytest.raises(StateError, match="holds the state of client 'a', not of 'b'"):
        s.load_client("b", 1)


def test_a_damaged_newest_server_state_falls_back_by_one_round(tmp_path: Path) -> None:
    """With everything that round needs: client states and lines."""
    s = Store(tmp_path)
    rounds(s, 3)
    newest = tmp_path / "server/000003.safetensors"
    for bad in flips(newest.read_bytes())[::7]:
        newest.write_bytes(bad)
        with pytest.warns(UserWarning, match="Going on from round 2, the one before"):
            round, params, _ = Store(tmp_path).load_server() or (0, {}, {})
        assert round == 2
        assert same(params, leaves(11))
    with pytest.warns(UserWarning, match="checksum"):
        s.rewind()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert same(s.load_client("c", 2), leaves(1))
    (tmp_path / "server/000002.safetensors").write_bytes(b"")
    with pytest.raises(StateError, match="checksum"):
        s.load_server()


def test_cut_metrics_are_noticed(tmp_path: Path) -> None:
    s = Store(tmp_path)
    rounds(s, 2)
    (tmp_path / "metrics.jsonl").write_bytes(b"{}\n")
    with pytest.raises(StateError, match=r"has 3 bytes, the committed rounds wrote \d+"):
        s.rewind()


def test_a_folder_belongs_to_one_recipe(tmp_path: Path) -> None:
    recipe = {"train": {"lr": 0.1, "steps": 3}, "run": {"seed": 0, "threads": 1}}
    s = Store(tmp_path / "run")
    with s.lock():
        s.claim("aaa", recipe)
        s.claim("aaa", recipe)
    other = {"train": {"lr": 0.2, "steps": 3}, "run": {"seed": 1, "threads": 2}}
    with (
        s.lock(),
        pytest.raises(
            StateError, match=r"belongs to recipe aaa, not to bbb \(differs in train.lr 0.1 there, 0.2 here, run.seed"
        ),
    ):
        s.claim("bbb", other)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("mine")
    mine = Store(tmp_path / "home")
    with mine.lock(), pytest.raises(StateError, match=r"holds other files \(thesis.tex\) and no run"):
        mine.claim("aaa", recipe)
    assert (tmp_path / "home/thesis.tex").read_text() == "mine"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        Store(tmp_path).lock(),
        pytest.raises(StateError, match="another process is running in this folder"),
        Store(tmp_path).lock(),
    ):
        pass
    with Store(tmp_path).lock():  # free again
        pass


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write of a round fails in turn; what was committed stays, and the round can be done again."""
    s = Store(tmp_path)
    rounds(s, 2)
    real = os.replace
    for failing in range(3):
        count = iter(range(100))

        def full(a: Any, b: Any, failing: int = failing, count: Any = count) -> None:
            if next(count) == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(a, b)

        monkeypatch.setattr(os, "replace", full)
        try:
            rounds(s, 4, 2)
        except StateError as e:
            assert "the disk is full; free some space and resume: committed rounds are kept" in str(e)
        else:
            pytest.fail("the write should have failed")
        monkeypatch.setattr(os, "replace", real)
        s = Store(tmp_path)
        s.rewind()
        done = (s.load_server() or (0,))[0]
        assert done >= 2
        assert not list(tmp_path.rglob("*.tmp"))
        assert same(s.load_client("c", done), leaves(done - 1))
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == done
    rounds(s, 4, done)
    assert same((s.load_server() or (0, {}))[1], leaves(13))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device(tmp_path: Path) -> None:
    s = Store(tmp_path)
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StateError, match="the disk is full"):
        s.append_metrics([{"round": 1}])


def test_no_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StateError, match="writing is not permitted"), Store(tmp_path / "x").lock():
        pass


KILLED = """
import os, sys, torch
from fedlora.federation.store import Store
from fedlora.tree import Key
at, count = int(sys.argv[2]), [0]
def dying(name):
    real = getattr(os, name)
    def call(*a, **k):
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), 9)
        return real(*a, **k)
    return call
s = Store(sys.argv[1])
for name in ("replace", "fsync", "open"):
    setattr(os, name, dying(name))
with s.lock():
    s.rewind()
    if s.load_server() is None:  # as in a run, whose start is committed before any client trains
        s.save_server(0, {Key("lora", "x", "A"): torch.full((4,), 9.0)}, {}, s.append_metrics([{"round": 0}]))
    done = s.load_server()[0]
    for r in range(done, 3):
        s.save_client("c", r, {Key("lora", "x", "A"): torch.full((4,), float(r))})
        s.save_server(r + 1, {Key("lora", "x", "A"): torch.full((4,), float(10 + r))}, {}, s.append_metrics([{"round": r + 1}]))
"""


@pytest.mark.parametrize("first, step", [(2, 18), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_killed_at_every_system_call(first: int, step: int, tmp_path: Path) -> None:
    """kill -9 before the n-th write, sync or rename; a second process finishes, with the same files.

    Each moment is a process that imports torch: every ninth in the quick suite, every single one in the slow.
    """
    script = tmp_path / "killed.py"
    script.write_text(KILLED)

    def go(folder: Path, at: int) -> int:
        return subprocess.run([sys.executable, str(script), str(folder), str(at)], check=False, timeout=60).returncode

    def content(folder: Path) -> dict[str, bytes]:
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    assert go(tmp_path / "whole", 0) == 0
    whole = content(tmp_path / "whole")
    at = first
    while go(tmp_path / str(at), at) == -9:
        assert go(tmp_path / str(at), 0) == 0
        left = content(tmp_path / str(at))
        assert whole.items() <= left.items(), at
        assert all(name.startswith("server/") for name in left.keys() - whole.keys())  # killed before it was pruned
        at += step
    assert at > 10
