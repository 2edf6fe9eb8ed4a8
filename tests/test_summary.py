"""summary.json against the records, worked out anew from them in plain Python; and how much local work a pass is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from fedlora.data.batches import LocalWork
from fedlora.federation.records import EvalLine, Line, Timing, TrainLine
from fedlora.federation.summary import summarise
from fedlora.methods import METHODS
from fedlora.training.metrics import summary

ROUNDS, CLIENTS = 23, 21


def record(draw: np.random.Generator, view: str, split: str, round: int) -> EvalLine:
    """An evaluation of clients that have other numbers of rows and other scores."""
    clients = {f"c{k}": {"n": float(draw.integers(1, 50)), "accuracy": float(draw.random())} for k in range(CLIENTS)}
    s = summary(clients)
    return EvalLine(round, view, split, clients, s["mean"], s["weighted"], s["worst_decile"])


def test_a_summary_is_what_the_records_say(tmp_path: Path) -> None:
    """Every number of it, from 23 rounds of three views: chosen on validation, scored on test, and what it all cost."""
    draw = np.random.default_rng(0)
    lines: list[Line] = []
    timings: list[Timing] = []
    for t in range(ROUNDS + 1):
        if t:
            sent = {d: {k: int(draw.integers(1, 100)) for k in ("adapter", "head", "framing")} for d in ("up", "down")}
            lines.append(TrainLine(t, 1.0, ["c0"], {"c0": 1.0}, 5, {}, sent))
            timings.append(Timing(t, *draw.random(3).tolist(), 7, int(draw.integers(1, 1000))))
        views = [("personal", "validation"), ("personal", "test"), ("global", "test"), ("unseen", "test")]
        lines += [record(draw, view, split, t) for view, split in views]
    f = tiny.federation(METHODS["fedsa"](rank=4), tmp_path)
    server = f.method.init(f.context)
    found = summarise(f, server, lines, timings)

    evals = [x for x in lines if isinstance(x, EvalLine)]

    def scores(view: str, split: str) -> list[EvalLine]:
        return [x for x in evals if (x.view, x.split) == (view, split)]

    def plain(x: EvalLine) -> float:
        return sum(s["accuracy"] for s in x.clients.values()) / CLIENTS

    best = max(scores("personal", "validation"), key=plain)
    assert (found["chosen_round"], found["chosen_on"]) == (best.round, "validation")
    assert found["validation"] == pytest.approx(plain(best))
    for view in ("personal", "global", "unseen"):
        [there] = [x for x in scores(view, "test") if x.round == best.round]
        rows = sum(s["n"] for s in there.clients.values())
        assert found["views"][view]["mean"]["accuracy"] == pytest.approx(plain(there))
        assert found["views"][view]["weighted"]["accuracy"] == pytest.approx(
            sum(s["n"] * s["accuracy"] for s in there.clients.values()) / rows
        )
        worst = sorted(s["accuracy"] for s in there.clients.values())[:3]  # a tenth of 21 clients, rounded up
        assert found["views"][view]["worst_decile"]["accuracy"] == pytest.approx(sum(worst) / 3)
    assert found["test"] == found["views"]["personal"]["mean"]["accuracy"]
    last = [plain(x) for x in scores("personal", "test") if x.round > ROUNDS - 10]
    assert (found["test_last10"], found["last_rounds"]) == (pytest.approx(sum(last) / 10), 10)
    up, down = (sum(sum(x.bytes[d].values()) for x in lines if isinstance(x, TrainLine)) for d in ("up", "down"))
    assert found["bytes"] == {"up": up, "down": down, "total": up + down}
    seconds = sum(t.train_seconds + t.eval_seconds + t.server_seconds for t in timings)
    assert found["seconds"] == pytest.approx(seconds)
    assert found["peak_memory_bytes"] == max(t.peak_memory_bytes for t in timings)
    assert (found["metric"], found["rounds"], found["seed"]) == ("accuracy", server.round, f.seed)


@pytest.mark.parametrize(
    "epochs, rows, draws, steps",
    [(1.0, 17, 1, 5), (1.0, 16, 1, 4), (2.5, 17, 1, 12), (0.7, 17, 1, 4), (0.01, 17, 1, 1), (1.0, 30, 4, 2), (1.0, 3, 4, 1)],
)  # fmt: skip
def test_a_pass_is_all_minibatches_of_four_rows(epochs: float, rows: int, draws: int, steps: int) -> None:
    """By hand: minibatches of a pass (the last may be smaller), times the passes, over those of a step; rounded, at least one."""
    assert LocalWork(None, epochs, 4).count(rows, draws) == steps
