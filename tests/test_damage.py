"""Whatever happens to a run folder: the run goes on and ends in the same bits, or it says which file is damaged and what to do.

Two laws. A run that is killed, or whose disk is full, at any file-system event can be taken up again and ends as if nothing had
happened. A run whose files were deleted, cut, changed or emptied does so too, or ends with a StateError that names the file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedlora.data.batches import LocalWork
from fedlora.data.examples import Arrays, Rows, Tokens, Words
from fedlora.data.federated import FederatedData
from fedlora.errors import StateError
from fedlora.federation import inputs, summary
from fedlora.federation.callbacks import Callback
from fedlora.federation.records import EvalLine, Line, parse
from fedlora.federation.run import Federation
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.federation.store import Store
from fedlora.federation.summary import chosen_round
from fedlora.files import sealed
from fedlora.methods import METHODS
from fedlora.methods.contract import Method
from fedlora.model.adapted import Adapted
from fedlora.training.optimizers import SGD
from fedlora.training.tasks.classification import Classification
from fedlora.tree import Key, Params

RECIPE = {"method": {"name": "x"}, "run": {"seed": 0}}


def scored_plainly(self: Classification, found: Any) -> Any:
    """A score without scikit-learn, whose many measures take most of the time of a small run."""
    for p in found:
        right = float((p.values == p.labels).mean())
        yield {"n": len(p.losses), "loss": float(p.losses.mean()), "accuracy": right}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """A run of some milliseconds: a plain score, and a disk that need not be waited for."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Classification, "scores", scored_plainly)
        m.setattr(summary, "environment", lambda f: {"python": "3"})
        m.setattr(os, "fsync", lambda fd: None)
        yield


class Net(nn.Module):
    """Two small layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        g = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g) * 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))[..., :2]


def federation(folder: Path, method: str = "fedsa", labels: int = 0, **more: Any) -> Federation:
    """Three clients, two of which train in each of 3 rounds. labels: how far they are rotated."""
    g = np.random.default_rng(0)
    columns = {"x": g.normal(size=(12, 4)).astype(np.float32), "labels": (np.arange(12) + labels) % 2}
    rows = Rows(np.array([0, 4, 8, 12]), np.arange(12))
    data = FederatedData(Arrays(columns), ["a", "b", "c"], {"train": rows, "validation": rows}, ("no", "yes"))
    model = Adapted(Net(), {"target": ["first", "second"]}, call=lambda net, batch: net(batch["x"]))
    made: Method = METHODS[method](rank=4, optimizer=SGD(0.2), head="frozen")
    settings: dict[str, Any] = {"sampling": Sampling(rounds=3, clients_per_round=2), "seed": 3, "block": 3}
    return Federation(model, Classification(2), data, made, folder, plan=LocalWork(1, None, 2), evaluation=Evaluation(every=3),
                      recipe=RECIPE, recipe_hash="0123456789ab", **settings | more)  # fmt: skip


class Stop(Callback):
    """Ends a run in the middle of a round (1-based)."""

    def __init__(self, round: int):
        self.at, self.now = round, 0

    def round_start(self, round: int, clients: int) -> None:
        self.now = round

    def clients_done(self, n: int) -> None:
        if self.now == self.at:
            raise KeyboardInterrupt


Ending = tuple[dict[str, Params], bytes]


def ending(folder: Path) -> Ending:
    """What a finished run leaves: the server's leaves and every client's, and the records."""
    s = Store(folder)
    loaded = s.load_server()
    assert loaded is not None and loaded[0] == 3
    states = {"server": loaded[1]} | {c: s.load_client(c, 3) or {} for c in "abc"}
    return states, (folder / "metrics.jsonl").read_bytes()


def same(a: Ending, b: Ending) -> bool:
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(
        a[0][n].keys() == b[0][n].keys() and all(torch.equal(a[0][n][k], b[0][n][k]) for k in a[0][n]) for n in a[0]
    )  # fmt: skip


def outcome(folder: Path, method: str, whole: Ending) -> str:
    """Resume; "same" or the StateError's text. Everything else fails the test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            federation(folder, method).run()
            assert same(ending(folder), whole), folder
    except StateError as e:
        return str(e)
    return "same"


Stopped = dict[str, tuple[Path, Ending]]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """By method: a run that was stopped in its third round, and how it ends."""
    found = {}
    for method in ("fedsa", "pf2lora"):
        folder = tmp_path_factory.mktemp(method)
        federation(folder / "whole", method).run()
        with contextlib.suppress(KeyboardInterrupt):
            federation(folder / "stopped", method).run(Stop(3))
        found[method] = folder / "stopped", ending(folder / "whole")
    return found


# killed -----------------------------------------------------------------------------------------------------------------
EVENTS = ("open", "fsync", "replace", "mkdir", "unlink")
Real = Callable[..., Any]


@contextlib.contextmanager
def before_each_event(monkeypatch: pytest.MonkeyPatch, do: Callable[[], None]) -> Iterator[None]:
    """Call `do` before every file-system event of a run; what `do` does itself does not count."""
    inside = [False]

    def wrapped(real: Real) -> Real:
        def call(*a: Any, **k: Any) -> Any:
            if not inside[0]:
                inside[0] = True
                try:
                    do()
                finally:
                    inside[0] = False
            return real(*a, **k)

        return call

    with monkeypatch.context() as m:
        for name in EVENTS:
            m.setattr(os, name, wrapped(getattr(os, name)))
        yield


def moments(f: Federation, to: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Run to the end; copies of the folder as a kill before each of its file-system events would have left it."""
    taken: list[Path] = []

    def take() -> None:
        taken.append(to / str(len(taken)))
        if f.store.root.exists():
            shutil.copytree(f.store.root, taken[-1])

    with before_each_event(monkeypatch, take), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        f.run()
    return taken


@pytest.mark.parametrize("method", ["fedsa", "pf2lora"])
def test_a_run_that_is_killed_at_any_event_goes_on(
    method: str, stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the claim to the end."""
    left = moments(federation(tmp_path / "run", method), tmp_path / "left", monkeypatch)
    assert len(left) > 60 and same(ending(tmp_path / "run"), stopped[method][1])
    for folder in left:
        assert outcome(folder, method, stopped[method][1]) == "same", folder


@pytest.mark.parametrize("method", ["fedsa", "pf2lora"])
def test_a_resume_that_is_killed_at_any_event_goes_on(
    method: str, stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in round 3, with the newest state damaged: going back one round is interrupted anywhere, and still exact."""
    shutil.copytree(stopped[method][0], tmp_path / "run")
    newest = tmp_path / "run/server/000002.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    left = moments(federation(tmp_path / "run", method), tmp_path / "left", monkeypatch)
    assert len(left) > 20 and same(ending(tmp_path / "run"), stopped[method][1])
    for folder in left:
        assert outcome(folder, method, stopped[method][1]) == "same", folder


def test_a_disk_that_is_full_at_any_event_is_named(
    stopped: Stopped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, failed = 1, True
    while failed:
        folder, count = tmp_path / str(at), [0]

        def full(count: list[int] = count, at: int = at) -> None:
            count[0] += 1
            if count[0] == at:
                raise OSError(errno.ENOSPC, "No space left on device")

        try:
            with before_each_event(monkeypatch, full):
                federation(folder).run()
            failed = count[0] >= at  # a file that is no longer needed and could not be deleted, or a folder above
        except StateError as e:
            assert "the disk is full; free some space and resume" in str(e)
        assert outcome(folder, "fedsa", stopped["fedsa"][1]) == "same", at
        at += 3
    assert at > 60


# damaged ----------------------------------------------------------------------------------------------------------------
DAMAGES: dict[str, Callable[[Path], object]] = {
    "deleted": lambda p: p.unlink(),
    "cut": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size * 2 // 3]),
    "changed at the start": lambda p: p.write_bytes(flipped(p.read_bytes(), 1 / 50)),
    "changed": lambda p: p.write_bytes(flipped(p.read_bytes(), 1 / 2)),
    "changed at the end": lambda p: p.write_bytes(flipped(p.read_bytes(), 49 / 50)),
    "emptied": lambda p: p.write_bytes(b""),
}
DERIVED = {".lock", "summary.json"}  # made anew in every run


def flipped(data: bytes, where: float) -> bytes:
    i = int(len(data) * where)
    return data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("method", ["fedsa", "pf2lora"])
def test_damage_is_mended_exactly_or_named(method: str, damage: str, stopped: Stopped, tmp_path: Path) -> None:
    folder, whole = stopped[method]
    files = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in DERIVED]
    assert len(files) > 12
    said: dict[str, str] = {}
    for file in files:
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        DAMAGES[damage](copy / file)
        said[str(file)] = outcome(copy, method, whole)
        assert said[str(file)] == "same" or file.name in said[str(file)], (file, said[str(file)])
        shutil.rmtree(copy)
    again = {f for f, s in said.items() if s == "same"}
    newest = {str(f) for f in files if f.parts[0] == "server"} | {
        "recipe.json",
        "recipe.yaml",
        "environment.json",
        "partition.json",
        "timings.jsonl",
    }
    assert newest <= again, said  # what can be recovered is
    assert "metrics.jsonl" not in again or damage == "changed at the end"  # its last round can be trained again


def test_the_leaves_of_the_newest_round_can_be_trained_again(stopped: Stopped, tmp_path: Path) -> None:
    """And those that both kept states need cannot; a folder of leaves that is gone is noticed at once."""
    folder, whole = stopped["fedsa"]
    header = sealed.header_of(folder / "server/000002.safetensors")
    assert header is not None
    trained = {c for c, r in header["leaves"].items() if r == 1}
    assert len(trained) == 2 and header["leaves"].keys() == {"a", "b", "c"}
    for client, round in header["leaves"].items():
        copy = tmp_path / client
        shutil.copytree(folder, copy)
        (Store(copy).client_folder(client) / f"{round:06d}.safetensors").unlink()
        if client in trained:
            with pytest.warns(UserWarning, match="Going on from round 1, the one before"):
                federation(copy).run()
            assert same(ending(copy), whole)
        else:
            with pytest.raises(
                StateError, match=f"personal leaves of client '{client}' after round 1 are gone; restore"
            ):
                federation(copy).run()
    shutil.rmtree(folder / "clients")
    try:
        with pytest.raises(StateError, match="clients"):
            federation(folder).run()
    finally:
        shutil.copytree(tmp_path / "a" / "clients", folder / "clients", dirs_exist_ok=True)


def test_states_that_are_gone_are_not_begun_anew(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        federation(tmp_path).run(Stop(3))
    shutil.rmtree(tmp_path / "server")
    with pytest.raises(
        StateError, match=r"server: holds no state, but clients and timings.jsonl show that rounds were"
    ):
        federation(tmp_path).run()


def test_an_old_state_in_the_place_of_a_new_one_is_noticed(tmp_path: Path) -> None:
    s = Store(tmp_path)
    for r in range(2):
        s.save_client("c", r, {Key("lora", "", "A"): torch.full((2,), float(r))})
    shutil.copy(s.client_folder("c") / "000000.safetensors", s.client_folder("c") / "000001.safetensors")
    with pytest.raises(StateError, match="holds the state after round 1, not 2; restore it"):
        s.load_client("c", 2)


def test_torn_timings_are_dropped_and_said(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        federation(tmp_path).run(Stop(3))
    file = tmp_path / "timings.jsonl"
    file.write_bytes(file.read_bytes() + b'{"round": 3, "tra')
    with pytest.warns(UserWarning, match=r"timings.jsonl: cut off or changed in line 3: 1 dropped, 2 left"):
        federation(tmp_path).run()
    assert [x["round"] for x in sealed.lines(file)[0]] == [1, 2, 3]
    file.write_bytes(file.read_bytes().replace(b'"round": 2', b'"round": 4'))
    assert sealed.lines(file)[1] == [2]  # a digit that was changed


# what a run is computed from --------------------------------------------------------------------------------------------
def test_other_data_or_weights_are_refused(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        federation(tmp_path).run(Stop(2))
    with pytest.raises(
        StateError, match=r"started with other files: changed has the labels \(data.source\); put them back"
    ):
        federation(tmp_path, labels=1).run()
    other = federation(tmp_path)
    other.model.base.first.weight.data[2, 3] += 1e-3
    with pytest.raises(
        StateError, match=r"changed has the weights of the base \(model.name\); put them back as they were, or"
    ):
        other.run()
    federation(tmp_path).run()


def test_fingerprints_see_every_value_and_every_place() -> None:
    """Against the bytes themselves: a change anywhere, a swap of rows, another shape; also beyond the part that is hashed whole."""
    g = torch.Generator().manual_seed(0)
    base = nn.Linear(300, 200)
    base.weight.data = torch.randn(200, 300, generator=g)
    first = inputs.base(base)
    seen = {first}
    for k in (0, 16_383, 16_384, 40_000, 59_999):
        value = base.weight.data.view(-1)[k].clone()
        base.weight.data.view(-1)[k] = torch.nextafter(value, torch.tensor(9.0))
        seen.add(inputs.base(base))
        base.weight.data.view(-1)[k] = value
    base.weight.data = base.weight.data.flip(0)
    seen.add(inputs.base(base))
    base.weight.data = base.weight.data.flip(0).view(300, 200)
    seen.add(inputs.base(base))
    assert len(seen) == 8
    base.weight.data = base.weight.data.view(200, 300)
    assert inputs.base(base) == first
    assert inputs.base(nn.Linear(3, 2).to(torch.bfloat16)) and inputs.base(nn.BatchNorm1d(3))


def test_fingerprints_see_the_labels_of_words(tmp_path: Path) -> None:
    """A label of a word that no token stands for is scored too."""
    f = federation(tmp_path)
    words = Words(np.zeros(24, np.int64), np.arange(0, 25, 2), np.ones(24, bool))
    rows = Tokens(np.arange(12, dtype=np.int32), np.arange(13), tags=np.zeros(12, np.int64), words=words)
    f.data = replace(f.data, examples=rows, outputs=("O", "B"))
    first = inputs.of(f)
    one = np.eye(24, dtype=np.int64)[5]
    for other in (replace(rows, tags=one[:12]), replace(rows, words=replace(words, labels=one))):
        f.data = replace(f.data, examples=other)
        again = inputs.of(f)
        assert [k for k in first if first[k] != again[k]] == ["labels"]


# whose ------------------------------------------------------------------------------------------------------------------
def test_nobody_else_reads_a_run(tmp_path: Path) -> None:
    federation(tmp_path / "run").run()
    modes = {
        p.relative_to(tmp_path).as_posix(): p.stat().st_mode & 0o077 for p in tmp_path.rglob("*") if p.name != ".lock"
    }
    assert len(modes) > 12
    assert not any(modes.values()), {n: oct(m) for n, m in modes.items() if m}


def test_a_claim_that_was_cut_short_is_nobodys(tmp_path: Path) -> None:
    """What earlier versions left when they were killed, too: the recipe and no claim."""
    with Store(tmp_path / "a").lock():
        Store(tmp_path / "a").claim("aaa", RECIPE)
    half = tmp_path / "b"
    half.mkdir()
    (half / "recipe.yaml").write_bytes((tmp_path / "a/recipe.yaml").read_bytes())
    (half / ".recipe.json.tmp").write_text("{")
    Store(half).claim("aaa", RECIPE)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/recipe.yaml").write_text("of: somebody else\n")
    with pytest.raises(StateError, match="holds other files"):
        Store(tmp_path / "c").claim("aaa", RECIPE)


# evaluations ------------------------------------------------------------------------------------------------------------
def test_an_evaluation_that_misses_clients_is_not_chosen() -> None:
    def line(round: int, x: float, missing: int = 0) -> Line:
        made = EvalLine(round, "personal", "validation", {}, {"accuracy": x}, {}, {}, missing)
        assert ("missing" in made.to_json()) == (missing > 0)  # the lines of whole evaluations stay as they were
        assert parse(made.to_json()) == made
        return made

    assert chosen_round([line(1, 0.5), line(2, 0.9, 1), line(3, 0.6)], "accuracy") == (3, "validation")
    assert chosen_round([line(1, 0.5, 2), line(2, 0.9, 3)], "accuracy") == (1, "validation")  # nothing better to go by


def test_records_stay_plain_json(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "b": {"ü": "x"}}
    for big in (value, value | {"many": list(range(50_000))}, {}):
        sealed.write(tmp_path / "x.json", big)
        assert sealed.read(tmp_path / "x.json") == big
        assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")).items() >= big.items()
    (tmp_path / "x.json").write_text(json.dumps(value))
    with pytest.raises(StateError, match="has no checksum"):
        sealed.read(tmp_path / "x.json")
