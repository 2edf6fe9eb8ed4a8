"""A private run that is killed, wherever and however often, spends the same budget and ends in the same bits.

Its noise, its cohorts and its adaptive clip norm are functions of the seed and of what was committed, so a round that was cut off
releases the same when it is done again, and is charged once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_damage import before_each_event, federation, moments, quick

from fedlora.errors import BudgetError
from fedlora.federation.guards import GUARDS
from fedlora.federation.run import Federation
from fedlora.federation.setting import Sampling
from fedlora.federation.store import Store
from fedlora.files import sealed
from fedlora.tree import Params

__all__ = ["quick"]  # a fixture that every test here uses
KILLS = 50
ROUNDS = 12


def private(folder: Path, **more: Any) -> Federation:
    """Three clients with a coin each, noise, and a clip norm that follows the median."""
    guard = GUARDS["dp"](noise=1.0, norm=0.1, delta=1e-3, quantile=0.5, **more)
    sampling = Sampling(rounds=ROUNDS, clients_per_round=0.7, cohort="poisson", guards=(guard,))
    return federation(folder, "homlora", sampling=sampling)


Ending = tuple[Params, bytes, Any, Any]


def ending(folder: Path) -> Ending:
    """The server's leaves with the clip norm, the records, the ledger, and what the summary says of privacy."""
    loaded = Store(folder).load_server()
    assert loaded is not None and loaded[0] == ROUNDS
    said = Store(folder).read_json("summary.json")["privacy"]
    return loaded[1], (folder / "metrics.jsonl").read_bytes(), sealed.read(folder / "privacy.json"), said


def same(a: Ending, b: Ending) -> bool:
    leaves = a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items())
    return leaves and a[1:] == b[1:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ending:
    """How a run ends that nobody kills."""
    folder = tmp_path_factory.mktemp("whole")
    private(folder).run()
    return ending(folder)


def charged(folder: Path) -> dict[str, int]:
    """Round -> times it was charged."""
    return (sealed.read(folder / "privacy.json") or {}).get("charges", {})


def test_a_private_run_killed_at_any_of_50_places_goes_on(
    whole: Ending, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill before a file-system event leaves is a copy of the folder at that moment; 50 of them over the whole run.

    In each of them every round whose result is there has been charged already."""
    left = moments(private(tmp_path / "run"), tmp_path / "left", monkeypatch)
    assert len(left) >= KILLS and same(ending(tmp_path / "run"), whole)
    for i in range(KILLS):
        folder = left[i * len(left) // KILLS]
        done = (Store(folder).load_server() or (0,))[0] if folder.exists() else 0
        assert {str(r) for r in range(done)} <= charged(folder).keys(), folder
        private(folder).run()
        assert same(ending(folder), whole), folder


class Killed(BaseException):
    """Nothing in the library catches it."""


@contextlib.contextmanager
def dying(at: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Raise before the event `at`, and before every one that follows while the stack unwinds: a dead process writes nothing."""
    count = [0]

    def die() -> None:
        count[0] += 1
        if count[0] >= at:
            raise Killed

    with before_each_event(monkeypatch, die):
        yield


def test_one_private_run_that_is_killed_50_times_spends_once(
    whole: Ending, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same folder taken up again and again; it dies twice at each event, then at the next one."""
    folder, kills = tmp_path / "run", 0
    while True:
        try:
            with dying(kills // 2 + 1, monkeypatch):
                private(folder).run()
        except Killed:
            kills += 1
            assert all(n == 1 for n in charged(folder).values())
            continue
        break
    assert kills >= KILLS, kills
    assert same(ending(folder), whole)


def test_a_killed_run_cannot_go_past_its_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget pays for two rounds; wherever the run is killed, the third is never trained."""
    budget = 1.0001 * private(tmp_path / "none").private.mechanism.epsilon(2, 1e-3)  # type: ignore[union-attr]
    for at in range(5, 60, 6):
        folder = tmp_path / str(at)
        with contextlib.suppress(Killed, BudgetError), dying(at, monkeypatch):
            private(folder, epsilon=budget).run()
        with pytest.raises(BudgetError, match="round 3 would bring"):
            private(folder, epsilon=budget).run()
        assert (Store(folder).load_server() or (0,))[0] == 2 and charged(folder) == {"0": 1, "1": 1}


SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_privacy_killed import private
folder, at, count = Path(sys.argv[2]), int(sys.argv[3]), [0]
run = private(folder)
def dying(real):
    def call(*a, **k):
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), 9)
        return real(*a, **k)
    return call
for name in ("open", "fsync", "replace", "mkdir", "unlink"):
    setattr(os, name, dying(getattr(os, name)))
run.run()
"""


@pytest.mark.slow
def test_a_private_run_killed_50_times_by_the_system(tmp_path: Path) -> None:
    """kill -9, a process each time, in one folder; the run that nobody kills is made by such a process too."""
    script = tmp_path / "killed.py"
    script.write_text(SCRIPT)

    def go(folder: Path, at: int) -> int:
        command = [sys.executable, str(script), str(Path(__file__).parent), str(folder), str(at)]
        return subprocess.run(command, check=False, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode

    assert go(tmp_path / "whole", 0) == 0
    kills = 0
    while (code := go(tmp_path / "run", kills // 2 + 1)) == -9:
        kills += 1
    assert code == 0 and kills >= KILLS
    assert same(ending(tmp_path / "run"), ending(tmp_path / "whole"))
    shutil.rmtree(tmp_path / "run")
