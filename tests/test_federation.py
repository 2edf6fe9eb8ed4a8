"""A federation's rounds: who takes part, what they see, how they are scored, what is refused.

Kills: cohorts that never change; predictions in another order; labels that are not permuted; prompts that carry loss.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from fedlora.data.batches import LocalWork, batch_of, order, train_batches
from fedlora.errors import ConfigError, TrainingError
from fedlora.evaluation.predictions import predict
from fedlora.federation.callbacks import Callback
from fedlora.federation.records import EvalLine
from fedlora.federation.run import Federation
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.federation.summary import chosen_round, summarise
from fedlora.federation.views import served
from fedlora.methods import METHODS
from fedlora.methods.contract import ServerState
from fedlora.seeds import np_rng
from fedlora.training.optimizers import SGD, AdamW
from fedlora.tree import Params, stack


def lines(f: Federation) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (f.store.root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# who takes part ---------------------------------------------------------------------------------------------------------


def test_uniform_samples_change_and_are_uniform() -> None:
    s = Sampling(rounds=400, clients_per_round=3)
    cohorts = [tuple(s.members(10, 0, t)) for t in range(400)]
    assert all(len(set(c)) == 3 for c in cohorts)
    assert len(set(cohorts)) > 80
    counts = Counter(k for c in cohorts for k in c)
    assert all(85 <= counts[k] <= 155 for k in range(10))  # 120 expected, sd 9
    assert [tuple(s.members(10, 0, t)) for t in range(5)] == cohorts[:5]
    assert tuple(s.members(10, 1, 0)) != cohorts[0] or tuple(s.members(10, 1, 1)) != cohorts[1]


def test_fixed_cohort_and_fractions() -> None:
    fixed = Sampling(rounds=9, clients_per_round=0.3, cohort="fixed")
    assert len({tuple(fixed.members(10, 0, t)) for t in range(9)}) == 1
    assert fixed.size(10) == 3
    assert Sampling().size(7) == 7
    with pytest.raises(ConfigError, match=r"clients_per_round: got 8, expected 1 to 7"):
        Sampling(clients_per_round=8).size(7)


def test_unsampled_clients_keep_their_state(tmp_path: Path) -> None:
    f = tiny.federation(METHODS["fedsa"](rank=2), tmp_path, sampling=Sampling(rounds=6, clients_per_round=1))
    f.run()
    last = {x["clients"][0]: x["round"] - 1 for x in lines(f) if x["kind"] == "train"}
    for id in f.data.ids:
        newest = max((int(p.stem) for p in f.store.client_folder(id).glob("*.safetensors")), default=None)
        assert newest == last.get(id)


def test_unseen_clients_never_train(tmp_path: Path) -> None:
    f = tiny.federation(METHODS["fedsa"](rank=2), tmp_path, data=tiny.data(unseen=1))
    f.run()
    assert {c for x in lines(f) if x["kind"] == "train" for c in x["clients"]} == {"c0", "c1", "c2"}
    assert not f.store.client_folder("c3").exists()
    views = {x["view"]: set(x["clients"]) for x in lines(f) if x["kind"] == "eval"}
    assert views["unseen"] == {"c3"}
    assert views["personal"] == views["global"] == {"c0", "c1", "c2"}


# what they see ----------------------------------------------------------------------------------------------------------


def test_batches_are_passes_over_the_rows() -> None:
    rows = np.arange(10, 17)
    got = order(rows, 7, 3, "x")
    assert [len(b) for b in got] == [3, 3, 1, 3, 3, 1, 3]
    for a in (0, 3):
        assert sorted(np.concatenate(got[a : a + 3])) == list(rows)
    assert not np.array_equal(np.concatenate(got[:3]), np.concatenate(got[3:6]))
    assert all(np.array_equal(a, b) for a, b in zip(got, order(rows, 7, 3, "x"), strict=True))


def test_concept_shift_reaches_training_and_evaluation() -> None:
    data = tiny.data()
    maps = np.array([[1, 2, 0], [0, 1, 2], [2, 0, 1], [1, 0, 2]])
    shifted = dataclasses.replace(data, label_maps=maps)
    for k in range(4):
        rows = data.splits["train"][k]
        seen = batch_of(shifted, np.full(len(rows), k), rows)["labels"].numpy()
        assert np.array_equal(seen, maps[k][data.examples.labels[rows]])
    [batch, *_] = train_batches(shifted, 0, LocalWork(1, None, 50), 1, "p")
    [plain, *_] = train_batches(data, 0, LocalWork(1, None, 50), 1, "p")
    assert torch.equal(batch["labels"], torch.from_numpy(maps[0])[plain["labels"]])


def test_prompts_carry_no_loss() -> None:
    t = tiny.tokens(6, labels=False)
    prompted = dataclasses.replace(t, prompt=np.array([3, 0, 1, 4, 2, 3], np.int32))
    labels = prompted.collate(np.arange(6))["labels"].numpy()
    for i, skip in enumerate((3, 1, 1, 4, 2, 3)):  # the first token has nothing to be predicted from
        n = int(t.offsets[i + 1] - t.offsets[i])
        assert (labels[i, :skip] == -100).all()
        assert (labels[i, skip:n] >= 0).all()
        assert (labels[i, n:] == -100).all()


# how they are scored ----------------------------------------------------------------------------------------------------


def test_predictions_in_blocks_equal_one_row_at_a_time(tmp_path: Path) -> None:
    """Different models, ragged clients, an empty one, two that share a model; against single forward passes."""
    f = tiny.federation(METHODS["homlora"](rank=2), tmp_path)
    g = torch.Generator().manual_seed(0)
    models: list[Params] = [
        {k: torch.randn(v.shape, generator=g) for k, v in f.method.init(f.context).params.items()} for _ in range(3)
    ]
    ready = [f.method.personal(f.context, stack([p]), {}) for p in models]
    served = [{k: v[0] for k, v in p.items()} for p in ready]
    params = [served[0], served[1], served[0], served[2], served[1]]
    clients = [0, 1, 2, 3, 0]
    r = np_rng("rows")
    rows = [r.permutation(120)[:n] for n in (13, 1, 7, 0, 9)]
    for batch_size, block in ((4, 2), (64, 8), (1, 1)):
        found = predict(f.model, f.task, f.data, params, clients, rows, batch_size, block)
        for j, (p, which) in enumerate(zip(found, (0, 1, 0, 2, 1), strict=True)):
            assert len(p.losses) == len(rows[j])
            for i, row in enumerate(rows[j]):
                one = {n: v[None] for n, v in f.data.examples.collate(np.array([row])).items()}
                with torch.no_grad():
                    y = f.model.forward(ready[which], one)[0, 0]
                assert p.values is not None
                assert p.labels is not None
                assert int(p.values[i]) == int(y.argmax())
                assert int(p.labels[i]) == int(one["labels"][0, 0])
                want = float(torch.nn.functional.cross_entropy(y, one["labels"][0, 0]))
                assert p.losses[i] == pytest.approx(want, rel=1e-4)


def test_evaluation_happens_when_it_is_asked_for(tmp_path: Path) -> None:
    m = METHODS["homlora"](rank=2)
    f = tiny.federation(m, tmp_path, sampling=Sampling(rounds=5), evaluation=Evaluation(every=2, views=("personal",)))
    f.run()
    assert sorted({x["round"] for x in lines(f) if x["kind"] == "eval"}) == [0, 2, 4, 5]
    assert {x["view"] for x in lines(f) if x["kind"] == "eval"} == {"personal"}


def test_the_round_is_chosen_on_validation() -> None:
    """Earliest of the best on validation, whatever test says; a loss is better when lower; NaN never is."""
    nan = float("nan")
    scores = {("validation", "accuracy"): [0.1, 0.7, 0.7, 0.6], ("test", "accuracy"): [0.1, 0.2, 0.9, 0.8],
              ("validation", "loss"): [nan, 3.0, 2.0, 2.5], ("test", "loss"): [0.1, 1.0, 1.0, 1.0]}  # fmt: skip
    lines = [
        EvalLine(t, "personal", s, {}, {m: v}, {}, {})
        for (s, m), values in scores.items()
        for t, v in enumerate(values)
    ]
    assert chosen_round(lines, "accuracy") == (1, "validation")
    assert chosen_round(lines, "loss") == (2, "validation")
    assert chosen_round([x for x in lines if x.split == "test"], "accuracy") == (2, "test")
    assert chosen_round([], "accuracy")[0] is None


def test_a_hand_over_and_the_start_are_no_rounds_of_training(tmp_path: Path) -> None:
    """Scores before and after a hand-over are recorded and never chosen; the mean of the last rounds leaves out round 0."""
    high, low = {"accuracy": 0.9}, {"accuracy": 0.1}
    rows = [EvalLine(t, "personal", "validation", {}, low if t else high, {}, {}, stage="handover") for t in (1, 2)]
    rows += [EvalLine(t, "personal", "validation", {}, {"accuracy": t / 10}, {}, {}) for t in (0, 1, 2)]
    rows.insert(0, EvalLine(1, "personal", "validation", {}, high, {}, {}, stage="before"))
    assert chosen_round(rows, "accuracy") == (2, "validation")
    rows += [EvalLine(t, "personal", "test", {}, {"accuracy": t / 10}, {}, {}) for t in range(4)]
    f = tiny.federation(METHODS["fedsa"](rank=4), tmp_path)
    found = summarise(f, f.method.init(f.context), rows, [])
    assert found["test_last10"] == pytest.approx((0.1 + 0.2 + 0.3) / 3) and found["last_rounds"] == 3


def test_the_last_ten_are_the_last(tmp_path: Path) -> None:
    rows = [EvalLine(t, "personal", "test", {}, {"accuracy": float(t)}, {}, {}) for t in range(15)]
    f = tiny.federation(METHODS["fedsa"](rank=4), tmp_path)
    found = summarise(f, f.method.init(f.context), rows, [])
    assert found["test_last10"] == pytest.approx(sum(range(5, 15)) / 10) and found["last_rounds"] == 10


def test_global_view_has_fresh_personal_leaves(tmp_path: Path) -> None:
    """Local-only: the global model is the base, however well clients are trained."""
    f = tiny.federation(METHODS["local"](rank=2, optimizer=AdamW(0.05)), tmp_path)
    f.run()
    views = [x for x in lines(f) if x["kind"] == "eval" and (x["view"], x["split"]) == ("global", "test")]
    assert all(x["clients"] == views[0]["clients"] for x in views)
    own = [x for x in lines(f) if x["kind"] == "eval" and (x["view"], x["split"]) == ("personal", "test")]
    assert own[-1]["mean"]["loss"] < own[0]["mean"]["loss"]


def test_the_cross_matrix_is_every_model_on_everybodys_rows(tmp_path: Path) -> None:
    """Row i is client i's model; its own scores are on the diagonal."""
    f = tiny.federation(
        METHODS["fedsa"](rank=2, head="personal", optimizer=AdamW(2e-2)), tmp_path,
        evaluation=Evaluation(views=("personal", "cross")),
    )  # fmt: skip
    f.run()
    [cross] = [x for x in lines(f) if x["kind"] == "cross"]
    last = [x for x in lines(f) if x["kind"] == "eval" and (x["view"], x["split"]) == ("personal", "test")][-1]
    assert [cross["matrix"][i][i] for i in range(4)] == [last["clients"][c]["accuracy"] for c in cross["ids"]]
    loaded = f.store.load_server()
    assert loaded is not None
    for i, p in enumerate(served(f, f.engine(Callback()), ServerState(*loaded), range(4), "personal")):
        for j in range(4):
            batch = {n: v[None] for n, v in f.data.examples.collate(f.data.splits["test"][j]).items()}
            right = f.model.forward(stack([p]), batch)[0].argmax(-1) == batch["labels"][0]
            assert cross["matrix"][i][j] == pytest.approx(float(right.double().mean())), (i, j)
    assert cross["matrix"] != [list(column) for column in zip(*cross["matrix"], strict=True)]


# what is refused --------------------------------------------------------------------------------------------------------


def test_a_client_that_explodes_is_refused_and_the_round_goes_on(tmp_path: Path) -> None:
    """One client has an infinite feature: its upload is NaN, the others are averaged without it."""
    from fedlora import Classification, adapt, from_arrays

    x = np.random.default_rng(0).normal(size=(90, 4)).astype(np.float32)
    labels = (x[:, 0] > 0).astype(np.int64)
    data = from_arrays({"x": x, "labels": labels}, clients=3)
    x[data.splits["train"][1]] = np.inf
    net = tiny.seeded(lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)))
    model = adapt(net, ["0"], ["1"], lambda m, b: m(b["x"]))
    method = METHODS["homlora"](rank=2, optimizer=SGD(0.1))
    f = Federation(model, Classification(2), data, method, tmp_path / "a", sampling=Sampling(3))
    f.run()
    for line in lines(f):
        if line["kind"] == "train":
            assert set(line["refused"]) == {"c1"}
            assert "non-finite" in line["refused"]["c1"]
    loaded = f.store.load_server()
    assert loaded is not None
    assert all(torch.isfinite(v).all() for v in loaded[1].values())
    strict = Federation(model, Classification(2), data, method, tmp_path / "b", sampling=Sampling(3, min_clients=3))
    with pytest.raises(
        TrainingError, match=r"round 1: 2 acceptable uploads of 3, expected at least 3 .* The round was dropped"
    ):
        strict.run()


def test_a_resumed_run_keeps_its_block_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where memory has become scarce: other blocks would give other last bits."""
    from fedlora.federation import run as module

    f = tiny.federation(METHODS["homlora"](rank=2), tmp_path, block="auto")

    class Stop(Callback):
        def round_done(self, round: int, facts: dict[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        f.run(Stop())
    monkeypatch.setattr(module, "auto_block", lambda f: 1)
    again = tiny.federation(METHODS["homlora"](rank=2), tmp_path, block="auto")
    assert again.block_size() == f.block_size() > 1
