"""Which round's models are served: those whose scores the summary tells, or the last ones; never one beside the other's scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from fedlora.data.batches import LocalWork
from fedlora.errors import StateError
from fedlora.evaluation.predictions import predict
from fedlora.federation.engine import Schedule
from fedlora.federation.run import Federation
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.federation.store import BEST, Store
from fedlora.methods import METHODS
from fedlora.serving.export import models_of
from fedlora.training.optimizers import AdamW

CASES: dict[str, dict[str, Any]] = {
    "fedsa": {"head": "personal"},
    "pf2lora": {},
    "hetlora": {"rank_min": 2},
    "fedavg-ft": {"optimizer": AdamW(0.15)},  # more, and its tuning multiplies the last bits of a sum
    "local": {"head": "personal"},
    "slora": {"density": 0.2, "sparse_rounds": 3, "base": "reset"},
}


def made(name: str, folder: Path, rounds: int = 7, **more: Any) -> Federation:
    """A run that gets better and then worse, since its learning rate only rises; not every client takes part in a round."""
    m = METHODS[name](**{"rank": 4, "optimizer": AdamW(0.8)} | CASES[name] | more)
    return tiny.federation(
        m, folder, sampling=Sampling(rounds=rounds, clients_per_round=3), schedule=Schedule("constant", 1.0),
        plan=LocalWork(3, None, 5), evaluation=Evaluation(every=1, views=("personal", "global")),
    )  # fmt: skip


def evals(folder: Path, round: int, stage: str | None = None) -> Mapping[str, Mapping[str, float]]:
    """Client -> test scores of the personal view at a round, as recorded."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    [found] = [
        x for x in lines
        if (x["kind"], x.get("view"), x.get("split"), x["round"]) == ("eval", "personal", "test", round) and x.get("stage") == stage
    ]  # fmt: skip
    return found["clients"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_models_are_of_the_round_whose_scores_stand_beside_them(name: str, tmp_path: Path) -> None:
    """Each client's served model has on its test rows the loss that was recorded for that very round."""
    summary = made(name, tmp_path).run()
    best = summary["chosen_round"]
    assert 0 < best < 7  # else this test says nothing
    f = made(name, tmp_path)  # opened anew, as a command does
    for which, round in (("best", best), ("last", 7), ("best", best)):
        of, models = models_of(f, list(f.data.ids), which)  # type: ignore[arg-type]
        assert (of.round, of.best) == (round, best) and f"round {round}, the {which}" in str(of)
        rows = [f.data.splits["test"][k] for k in range(4)]
        said = predict(f.model, f.task, f.data, models, range(4), rows)
        want = evals(tmp_path, round)
        for id, p in zip(f.data.ids, said, strict=True):
            assert float(np.mean(p.losses)) == pytest.approx(want[id]["loss"], rel=2e-3), (which, id)


def test_a_hand_over_does_not_take_the_place_of_its_round(tmp_path: Path) -> None:
    """Where the last round of stage 1 is the best one, its own model is served, not what the hand-over made of it."""
    f = made("slora", tmp_path, rounds=4, sparse_rounds=2, rank=1)
    f.run()
    best = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))["chosen_round"]
    assert best == 2, "the round after which the method hands over"
    before, after = evals(tmp_path, 2), evals(tmp_path, 2, "handover")
    assert any(abs(before[c]["loss"] - after[c]["loss"]) > 1e-3 for c in before)
    [model] = models_of(f, ["c0"])[1]
    [said] = predict(f.model, f.task, f.data, [model], [0], [f.data.splits["test"][0]])
    assert float(np.mean(said.losses)) == pytest.approx(before["c0"]["loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["fedsa", "slora"])
def test_the_best_round_survives_a_crash_at_any_commit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after a state is committed and before the best round's is kept, and resumed: the same bytes as without."""
    made(name, tmp_path / "whole").run()
    whole = (tmp_path / "whole" / BEST).read_bytes()
    hold = Store._hold
    for nth in range(1, 6):
        folder, calls = tmp_path / f"{nth}", iter(range(1, 100))

        def crash(self: Store, *a: Any, nth: int = nth, calls: Any = calls) -> None:
            if next(calls) == nth:
                raise KeyboardInterrupt
            hold(self, *a)

        monkeypatch.setattr(Store, "_hold", crash)
        try:
            made(name, folder).run()
        except KeyboardInterrupt:
            monkeypatch.setattr(Store, "_hold", hold)
            made(name, folder).run()
        monkeypatch.setattr(Store, "_hold", hold)
        assert (folder / BEST).read_bytes() == whole
        ids = list(made(name, folder).data.ids)
        for a, b in zip(
            models_of(made(name, folder), ids)[1], models_of(made(name, tmp_path / "whole"), ids)[1], strict=True
        ):
            tiny.close(a, b, 0.0)


def test_only_the_best_round_is_kept_beside_what_resuming_needs(tmp_path: Path) -> None:
    f = made("fedsa", tmp_path)
    f.run()
    assert len(list((tmp_path / "server").glob("*.safetensors"))) == 2
    for folder in (tmp_path / "clients").glob("*/*"):
        assert len(list(folder.glob("*.safetensors"))) <= 4


def test_a_best_round_that_is_damaged_is_said(tmp_path: Path) -> None:
    f = made("fedsa", tmp_path)
    f.run()
    data = (tmp_path / BEST).read_bytes()
    (tmp_path / BEST).write_bytes(data[:-7])
    with pytest.raises(StateError, match=r"best.safetensors: its checksum does not match"):
        models_of(f, [None])
    assert models_of(f, [None], "last")[0].round == 7
    (tmp_path / BEST).unlink()
    with pytest.raises(StateError, match=r"best.safetensors: is gone"):
        models_of(f, [None])
