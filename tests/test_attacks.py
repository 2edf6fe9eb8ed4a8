"""Attacks on one's own runs: what they find where there is something to be found, and nothing where there is nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from fedlora.data.batches import LocalWork
from fedlora.errors import DataError
from fedlora.federation.guards import GUARDS
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods import METHODS
from fedlora.serving.attacks.inversion import inversion
from fedlora.serving.attacks.membership import judged, membership
from fedlora.training.optimizers import SGD, AdamW

SHORT: dict[str, Any] = {"evaluation": Evaluation(every=9, views=("personal",)), "sampling": Sampling(rounds=2)}


def normal(gap: float, clients: int = 8, n: int = 400) -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0)
    return [(draw.standard_normal(n) + gap, draw.standard_normal(n)) for _ in range(clients)]


@pytest.mark.parametrize("gap", [0.0, 1.0, 3.0])
def test_an_attack_is_judged_as_statistics_has_it(gap: float) -> None:
    """Two normal distributions: the best advantage is 2 Phi(gap / 2) - 1; the area is scikit-learn's."""
    scores = normal(gap)
    found = judged("loss", "shared", scores, None, 0)
    want = 2 * norm.cdf(gap / 2) - 1
    assert found.low - 0.01 <= want <= found.high + 0.01
    assert found.advantage == pytest.approx(want, abs=0.04)
    m, o = (np.concatenate([s[i] for s in scores]) for i in (0, 1))
    assert found.auc == pytest.approx(roc_auc_score([1] * len(m) + [0] * len(o), np.concatenate([m, o])))
    assert found.at_1 == pytest.approx(1 - norm.cdf(norm.ppf(0.99) - gap), abs=0.03)


def test_an_attack_on_few_rows_finds_nothing_where_nothing_is() -> None:
    """A threshold that is judged on the rows it was chosen on would find an advantage in noise."""
    found = [judged("loss", "shared", normal(0.0, 2, 10), None, seed).advantage for seed in range(60)]
    assert abs(np.mean(found)) < 0.08


def test_members_of_a_model_that_has_learned_its_rows_by_heart_are_found(tmp_path: Path) -> None:
    """With labels that say nothing about other rows; its own rows are then all that a model can learn."""
    data = tiny.data()
    draw = np.random.default_rng(0)
    data.examples.labels[:] = draw.integers(0, tiny.CLASSES, len(data.examples.labels))  # type: ignore[union-attr, index]
    method = METHODS["homlora"](rank=8, optimizer=AdamW(3e-2))
    f = tiny.federation(method, tmp_path, data=data, **SHORT | {"plan": LocalWork(steps=60, batch_size=16)})
    f.run()
    found = {(x.attack, x.model): x for x in membership(f)}
    assert set(found) == {("loss", "shared"), ("ratio", "shared")}
    assert found["loss", "shared"].auc > 0.65 and found["ratio", "shared"].auc > 0.65
    little = {"sampling": Sampling(rounds=1), "plan": LocalWork(steps=1, batch_size=1)}
    untouched = tiny.federation(method, tmp_path / "b", data=data, **SHORT | little)
    untouched.run()
    assert all(x.auc < 0.6 for x in membership(untouched))


def short(folder: Path, **more: Any) -> Any:
    """Rows of at most five tokens, plain SGD without dropout, and B large enough for A to move by more than rounding."""
    data = replace(tiny.data(), examples=tiny.tokens(longest=5))
    method = METHODS["fedsa"](rank=12, optimizer=SGD(20.0), head="personal")
    f = tiny.federation(method, folder, data=data, **SHORT | {"plan": LocalWork(steps=2, batch_size=8)} | more)
    f.run()
    return f


def test_words_behind_one_step_on_one_row_are_read_from_its_factors(tmp_path: Path) -> None:
    """The span then has all of them and little else; a span as wide as the rank tells less."""
    one, many = inversion(short(tmp_path), batches=(1, 16), steps=(1,), trials=6)
    assert one.share > 0.95 and one.share > one.guessed + 0.5
    assert many.share < one.share


def test_words_are_read_from_the_table_that_full_fine_tuning_sends(tmp_path: Path) -> None:
    f = tiny.federation(
        METHODS["fft"](optimizer=SGD(0.1)), tmp_path, **SHORT | {"plan": LocalWork(steps=2, batch_size=8)}
    )
    f.run()
    [found] = inversion(f, batches=(2,), steps=(3,), trials=3)
    assert found.share > 0.95


def test_noise_hides_words_from_those_who_see_the_released_model(tmp_path: Path) -> None:
    """The upload itself is as before: dp at the server does not protect from the server."""
    guard = GUARDS["dp"](noise=1.0, norm=1000.0, delta=1e-2, scores="public")
    f = short(tmp_path, sampling=Sampling(rounds=2, guards=(guard,)))
    upload, released = inversion(f, batches=(1,), steps=(1,), trials=6)
    assert (upload.seen, released.seen) == ("upload", "released")
    assert upload.share > released.share + 0.2


def test_a_run_without_test_rows_is_refused(tmp_path: Path) -> None:
    data = tiny.data()
    f = tiny.federation(METHODS["homlora"](rank=2), tmp_path, data=data, **SHORT)
    f.data = type(data)(data.examples, data.ids, {"train": data.splits["train"]}, data.label_names)
    with pytest.raises(DataError, match=r"set partition\.test"):
        membership(f)


def test_the_command_reports_both(tmp_path: Path) -> None:
    from cli import fedlora, model_folder, rows, write_csv

    model_folder(tmp_path / "model")
    write_csv(
        tmp_path / "notes.csv",
        [(t, x, ("north", "south")[i % 2]) for i, (t, x, _) in enumerate(rows(120))],
        ("text", "label", "site"),
    )
    (tmp_path / "r.yaml").write_text(
        f"model: {{name: {tmp_path / 'model'}}}\ndata: {{source: notes.csv, text: text, label: label, client: site}}\n"
        "method: {name: fedsa, rank: 4}\ntrain: {steps: 2}\nfederation: {rounds: 1}\n",
        encoding="utf-8",
    )
    fedlora("run", "r.yaml", "-o", "a", cwd=tmp_path)
    said = fedlora("attack", "a", "--trials", "2", "--batch", "1", "--steps", "1", "--json", cwd=tmp_path).stdout
    kinds = [json.loads(x) for x in said.splitlines()]
    assert [x["kind"] for x in kinds] == ["membership"] * 4 + ["inversion"]
    assert {x["model"] for x in kinds[:4]} == {"shared", "personal"}
    assert "by guessing" in fedlora("attack", "a", "--trials", "2", "--batch", "1", "--steps", "1", cwd=tmp_path).stdout
