"""What a terminal shows of a run: steps inside a round, and the bytes of the whole run after it was resumed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import tiny
from rich.console import Console
from test_contract import TABLE

from fedlora.cli.progress import Bars
from fedlora.federation.callbacks import Callback, Several
from fedlora.federation.setting import Sampling
from fedlora.units import size


class Stop(Callback):
    def round_start(self, round: int, clients: int) -> None:
        if round == 3:
            raise KeyboardInterrupt


class Steps(Callback):
    def __init__(self) -> None:
        self.heard: list[tuple[int, int]] = []

    def steps_done(self, done: int, steps: int) -> None:
        self.heard.append((done, steps))


def test_steps_and_bytes(tmp_path: Path) -> None:
    def fed(folder: str) -> tiny.Federation:
        return tiny.federation(TABLE["fedsa"].method, tmp_path / folder, sampling=Sampling(rounds=4), block=2)

    steps = Steps()
    with pytest.raises(KeyboardInterrupt):
        fed("a").run(Several(steps, Stop()))
    plan, sizes = fed("b").plan, sorted(fed("b").data.splits["train"].sizes.tolist(), reverse=True)
    blocks = [plan.count(n, 1) for n in sizes[::2]]  # large clients first, so the first of two has the most steps
    assert steps.heard == [(i + 1, n) for n in [*blocks, *blocks] for i in range(n)]
    bars = Bars(Console(file=io.StringIO()), "accuracy")
    shown: list[str] = []

    class Look(Callback):
        def clients_done(self, n: int) -> None:
            shown.append(str(bars.progress.tasks[1].fields["note"]))

    with bars:
        summary = fed("a").run(Several(bars, Look()))
    assert shown == [f"training, round {r}, step {n} of {n}" for r in (3, 4) for n in blocks]
    assert bars.facts["bytes"] == summary["bytes"]["total"]
    assert bars.progress.tasks[0].fields["note"].endswith(size(summary["bytes"]["total"]))
