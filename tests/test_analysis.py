"""Meters: exactness, effective ranks and likeness of factors, against dense numpy."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from fedlora.evaluation.analyses import asymmetry, effective_ranks, gram_norm, product_error, singular_values
from fedlora.federation.setting import Evaluation
from fedlora.methods import METHODS
from fedlora.seeds import rng
from fedlora.training.optimizers import AdamW
from fedlora.tree import Key, Params

A, B = Key("lora", "x", "A"), Key("lora", "x", "B")


def leaves(r: int, seed: int, adapter: str = "lora") -> Params:
    g = rng("analysis", seed)
    return {
        A._replace(adapter=adapter): torch.randn(r, 9, generator=g),
        B._replace(adapter=adapter): torch.randn(7, r, generator=g),
    }


def test_norms_and_singular_values_against_dense_products() -> None:
    p = leaves(4, 0)
    w = (p[B].double() @ p[A].double()).numpy()
    assert float(gram_norm(p[B].double(), p[A].double())) == pytest.approx(np.linalg.norm(w))
    want = np.linalg.svd(w, compute_uv=False)[:4]
    np.testing.assert_allclose(singular_values(p[B].double(), p[A].double()).numpy(), want, rtol=1e-9)


def test_product_error_against_dense_products() -> None:
    uploads = [(leaves(3, i), w) for i, w in enumerate((1.0, 2.0, 5.0))]
    new = leaves(3, 9)
    mean = sum((p[B].double() @ p[A].double()).numpy() * w for p, w in uploads) / 8
    want = np.linalg.norm(mean - (new[B].double() @ new[A].double()).numpy()) / np.linalg.norm(mean)
    assert product_error(uploads, new) == pytest.approx(want)
    assert product_error(uploads, {A: new[A]}) is None


@pytest.mark.parametrize("true", [1, 2, 5])
def test_effective_ranks_count_what_is_there(true: int) -> None:
    """Two adapters at a layer count as one delta; directions below the threshold do not count."""
    q1, q2 = (torch.linalg.qr(torch.randn(n, n, generator=rng("q", n, true)))[0] for n in (7, 9))
    s = torch.zeros(7)
    s[:true] = torch.linspace(1, 0.5, true)
    s[true] = 0.01
    w = (q1 * s) @ q2[:7]
    b, a = q1 * s, q2[:7]
    whole = {A: a, B: b}
    split = {A: a[:3], B: b[:, :3], A._replace(adapter="personal"): a[3:], B._replace(adapter="personal"): b[:, 3:]}
    for p in (whole, split):
        assert effective_ranks(p, 0.05) == {"x": true}
        assert effective_ranks(p, 0.005) == {"x": int(np.linalg.matrix_rank(w.numpy(), tol=0.005))}
    assert effective_ranks({A: a, B: torch.zeros_like(b)}) == {"x": 0}


def test_asymmetry_against_dense_numpy() -> None:
    start = leaves(3, 0)
    clients = [{k: v + 0.3 * leaves(3, i)[k] for k, v in start.items()} for i in (1, 2, 3)]
    got = asymmetry(clients, start)["x"]

    def cosine(u: np.ndarray, v: np.ndarray) -> float:
        return float((u * v).sum() / np.linalg.norm(u) / np.linalg.norm(v))

    def angle(u: np.ndarray, v: np.ndarray) -> float:
        from scipy.linalg import subspace_angles

        return float(np.rad2deg(subspace_angles(u, v)).mean())

    pairs = list(itertools.combinations(range(3), 2))
    for key, k in (("A", A), ("B", B)):
        x = [c[k].double().numpy() for c in clients]
        x0 = start[k].double().numpy()
        assert got[key] == pytest.approx(np.mean([cosine(x[i], x[j]) for i, j in pairs]))
        assert got[f"d{key}"] == pytest.approx(np.mean([cosine(x[i] - x0, x[j] - x0) for i, j in pairs]))
        columns = [v.T if key == "A" else v for v in x]
        assert got[f"angle_{key}"] == pytest.approx(
            np.mean([angle(columns[i], columns[j]) for i, j in pairs]), abs=1e-4
        )


def test_a_run_records_them(tmp_path: Path) -> None:
    e = Evaluation(analyses=("effective-ranks", "asymmetry"), cross_clients=3)
    for name in ("local", "pf2lora", "hetlora", "fedsa"):
        f = tiny.federation(METHODS[name](rank=4, optimizer=AdamW(1e-2)), tmp_path / name, evaluation=e)
        f.run()
        lines = [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        ranks = [x for x in lines if x["kind"] == "effective-ranks"]
        assert [x["round"] for x in ranks] == [0, 1, 2, 3]
        assert all(set(c.values()) == {0} for c in ranks[0]["clients"].values())  # nothing is learned yet
        most = 4 + (2 if name == "pf2lora" else 0)
        assert all(1 <= r <= most for c in ranks[-1]["clients"].values() for r in c.values())
        layers = [x for x in lines if x["kind"] == "asymmetry"][-1]["sites"]
        assert len(layers) == 4
        if name == "fedsa":
            # A is one, B is each one's own.
            assert all(s["A"] == pytest.approx(1) and s["B"] < 0.999 for s in layers.values())
        if name == "local":
            assert all(s["A"] > s["B"] for s in layers.values())  # most of A's likeness is the common start
        if name == "hetlora":
            train = [x for x in lines if x["kind"] == "train"]
            assert all(set(x["ranks"]) == {"c0", "c1", "c2", "c3"} for x in train)
        assert not any(isinstance(v, float) and math.isinf(v) for s in layers.values() for v in s.values())
