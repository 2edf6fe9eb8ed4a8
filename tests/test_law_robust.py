"""Robust guards against dense products, numpy and scipy; and what attackers and rotations do to them.

Planted bugs these tests kill: distances of factors instead of products; an upload that is its own neighbour; a median of one
side; a bound on the sum of all clients.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import write_recipe

from fedlora.deploy.coordinator import bounded, coordinator
from fedlora.federation.guards import GUARDS
from fedlora.federation.guards.geometry import gram, moved, squared
from fedlora.federation.setting import Sampling
from fedlora.methods import METHODS
from fedlora.methods.average import HomLoRA
from fedlora.methods.contract import Client, ServerState, Upload
from fedlora.recipe import Recipe
from fedlora.tree import Key, Params, mean

LAYERS = ("q", "v")
HEAD, RANK, NORM = Key("head", "classifier", "weight"), Key("lora", "", "rank"), Key("lora", "", "norm")


def part(layer: str, name: str) -> Key:
    return Key("lora", layer, name)


def leaves(seed: int, r: int = 3, near: Params | None = None, size: float = 1.0) -> Params:
    """Two layers of 6 to 5 and a head; around `near` if it is given."""
    g = torch.Generator().manual_seed(seed)
    p = {part(n, x): size * torch.randn(s, generator=g) for n in LAYERS for x, s in (("A", (r, 6)), ("B", (5, r)))}
    p[HEAD] = size * torch.randn(3, 4, generator=g)
    return p if near is None else {k: v + near[k] for k, v in p.items()}


def dense(p: Mapping[Key, torch.Tensor]) -> np.ndarray:
    """The products and the head as one vector, float64."""
    parts = [(p[part(n, "B")].double() @ p[part(n, "A")].double()).flatten() for n in LAYERS]
    return torch.cat([*parts, p[HEAD].double().flatten()]).numpy()


def turned(p: Params, seed: int, orthogonal: bool = False) -> Params:
    """The same products from other factors."""
    g = torch.Generator().manual_seed(seed)
    out = dict(p)
    for n in LAYERS:
        a, b = p[part(n, "A")].double(), p[part(n, "B")].double()
        m = torch.randn(len(a), len(a), generator=g, dtype=torch.float64) + 2 * torch.eye(len(a), dtype=torch.float64)
        m = torch.linalg.qr(m).Q if orthogonal else m
        out[part(n, "A")], out[part(n, "B")] = (torch.linalg.inv(m) @ a).float(), (b @ m).float()
    return out


def uploads(ps: Sequence[Params]) -> list[Upload]:
    return [Upload(Client(f"c{i}", 10 + i), p) for i, p in enumerate(ps)]


def arrived(guard: Any, ps: Sequence[Params], server: Params) -> list[Upload]:
    return list(guard.arrive(iter(uploads(ps)), ServerState(0, server)))


# distances ----------------------------------------------------------------------------------------------------------
def test_inner_products_are_those_of_dense_products() -> None:
    """Of uploads of different ranks, which state facts of themselves too."""
    ps = [leaves(i, r) | {RANK: torch.tensor(r), NORM: torch.tensor(9.0)} for i, r in enumerate((3, 1, 4, 3))]
    flat = np.stack([dense(p) for p in ps])
    np.testing.assert_allclose(gram(ps).numpy(), flat @ flat.T, rtol=1e-6, atol=1e-6)
    want = ((flat[:, None] - flat[None]) ** 2).sum(-1)
    np.testing.assert_allclose(squared(gram(ps)).numpy(), want, rtol=1e-6, atol=1e-6)
    server = leaves(9, 4)
    cut = server | {part(n, x): server[part(n, x)].narrow(0 if x == "A" else 1, 0, 3) for n in LAYERS for x in "AB"}
    assert moved(ps[0], server) == pytest.approx(np.linalg.norm(flat[0] - dense(cut)), rel=1e-6)


def test_a_factor_alone_counts_by_its_entries() -> None:
    """FedSA-LoRA sends A alone."""
    ps = [{k: v for k, v in leaves(i).items() if k.part == "A"} for i in range(3)]
    flat = torch.stack([torch.cat([p[part(n, "A")].flatten() for n in LAYERS]) for p in ps]).double()
    torch.testing.assert_close(gram(ps), flat @ flat.T)


def test_rotating_factors_moves_nobody() -> None:
    ps = [leaves(i) for i in range(5)]
    torch.testing.assert_close(gram([turned(p, 70 + i) for i, p in enumerate(ps)]), gram(ps), rtol=1e-4, atol=1e-4)


# krum ---------------------------------------------------------------------------------------------------------------
def krum(flat: np.ndarray, f: int, m: int) -> list[int]:
    """The paper's rule, word by word: the m clients of least sum over their n - f - 2 nearest others."""
    n = len(flat)
    scores = []
    for i in range(n):
        others = sorted(float(((flat[i] - flat[j]) ** 2).sum()) for j in range(n) if j != i)
        scores.append(sum(others[: n - f - 2]))
    return sorted(sorted(range(n), key=scores.__getitem__)[:m])


@pytest.mark.parametrize("n, share, select", [(7, 0.3, None), (9, 0.2, 1), (10, 0.35, 3), (4, 0.4, None), (3, 0.4, 2)])
def test_krum_is_the_papers_rule_on_dense_products(n: int, share: float, select: int | None) -> None:
    for seed in range(5):
        ps = [leaves(100 * seed + i, near=leaves(7)) for i in range(n)]
        f = min(int(share * n + 1e-9), (n - 3) // 2)
        want = krum(np.stack([dense(p) for p in ps]), f, select or n - f)
        got = arrived(GUARDS["krum"](share=share, select=select), ps, leaves(7))
        assert [u.client.id for u in got] == [f"c{i}" for i in want]
        spun = arrived(GUARDS["krum"](share=share, select=select), [turned(p, i) for i, p in enumerate(ps)], leaves(7))
        assert [u.client.id for u in spun] == [u.client.id for u in got]


def test_krum_sees_a_product_that_hides_in_its_factors() -> None:
    """Gradient assembly: each factor of the attacker is one that an honest client sends, their product is nobody's."""
    old = leaves(0)
    honest = [leaves(i, near=old, size=0.05) for i in range(1, 7)]
    honest = [turned(p, i, orthogonal=True) for i, p in enumerate(honest)]  # honest clients differ in their factors
    attacker = {k: honest[0 if k.part == "A" else 1][k] for k in old}
    got = arrived(GUARDS["krum"](share=0.2), [*honest, attacker], old)
    assert [u.client.id for u in got] == [f"c{i}" for i in range(6)]
    flat = [np.concatenate([v.flatten().numpy() for v in p.values()]) for p in (*honest, attacker)]
    assert krum(np.stack(flat), 1, 6) != list(range(6)), "the factors alone give it away, so this test says nothing"


# medians ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_the_median_is_numpys(n: int) -> None:
    ps = [leaves(i) for i in range(n)]
    seen = arrived(GUARDS["median"](), ps, {})
    got = mean((u.params, HomLoRA().weight(u)) for u in seen)
    for k in ps[0]:
        np.testing.assert_allclose(got[k].numpy(), np.median([p[k].numpy() for p in ps], axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [3, 6, 9])
def test_the_geometric_median_is_scipys_optimum_on_dense_products(n: int) -> None:
    """The weights make the point that minimises the sum of distances, by a general optimiser."""
    from scipy.optimize import minimize

    ps = [leaves(i, near=leaves(50)) for i in range(n - 1)] + [leaves(99, size=30.0)]
    flat = np.stack([dense(p) for p in ps])
    w = GUARDS["geomedian"](steps=200).weights(gram(ps)).numpy()  # type: ignore[attr-defined]
    assert w.sum() == pytest.approx(1)
    total = lambda z: np.linalg.norm(flat - z, axis=1).sum()  # noqa: E731
    best = minimize(total, np.median(flat, axis=0), method="BFGS")
    assert total(w @ flat) == pytest.approx(best.fun, rel=1e-4)
    assert w[-1] < 0.5 * min(w[:-1])


def test_rotations_change_nothing_of_the_geometric_median() -> None:
    """Neither the weights nor the mean of the factors, which are turned to the server's."""
    old = leaves(0)
    ps = [leaves(i, near=old, size=0.1) for i in range(1, 6)]
    [want, *_] = arrived(GUARDS["geomedian"](), ps, old)
    spun = [turned(p, i, orthogonal=True) for i, p in enumerate(ps)]
    [got, *_] = arrived(GUARDS["geomedian"](), spun, old)
    for k in old:
        torch.testing.assert_close(got.params[k], want.params[k], rtol=1e-4, atol=1e-5)
    plain = mean((p, 1.0) for p in spun)
    assert any((plain[k] - want.params[k]).abs().max() > 0.1 for k in old if k.part == "A")


# bound --------------------------------------------------------------------------------------------------------------
def test_nobody_moves_further_than_so_many_medians() -> None:
    """On dense products: a change ten times as large ends at the bound, on the line to the server's leaves; the others pass to
    the bit."""
    old = leaves(0)
    ps = [leaves(i, near=old, size=0.01) for i in range(1, 6)]
    ps.append({k: old[k] - 10 * (ps[0][k] - old[k]) for k in old})
    sizes = [float(np.linalg.norm(dense(p) - dense(old))) for p in ps]
    with pytest.warns(
        UserWarning,
        match=r"round 1: the change of c5 is 9\.\d times the median .* scaled to 3 times|round 1: the change of c5 is 1\d",
    ):
        got = arrived(GUARDS["bound"](times=3.0), ps, old)
    for u, p in zip(got[:5], ps, strict=False):
        assert all(torch.equal(u.params[k], p[k]) for k in p)
    change = dense(got[5].params) - dense(old)
    assert np.linalg.norm(change) == pytest.approx(3 * np.median(sizes), rel=1e-4)
    t = [float(((got[5].params[k] - old[k]) / (ps[5][k] - old[k])).median()) for k in old]
    assert max(t) - min(t) < 1e-3 and 0 < t[0] < 1


def test_an_upload_that_states_its_norm_is_left_out_and_small_cohorts_pass() -> None:
    old = leaves(0)
    ps = [leaves(i, near=old, size=0.01) | {NORM: torch.tensor(1.0)} for i in range(1, 5)]
    ps.append({k: v + 5 for k, v in old.items()} | {NORM: torch.tensor(1.0)})
    with pytest.warns(UserWarning, match="it is left out"):
        got = arrived(GUARDS["bound"](), ps, old)
    assert [u.client.id for u in got] == ["c0", "c1", "c2", "c3"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(arrived(GUARDS["bound"](times=1.0), ps[-2:], old)) == 2
        same = arrived(GUARDS["bound"](times=1.0), [old, old, old], old)
    assert all(torch.equal(u.params[k], old[k]) for u in same for k in old)


@pytest.mark.parametrize("name, field, value", [
    ("krum", "share", 0.5), ("krum", "select", 0), ("geomedian", "steps", 0), ("geomedian", "smoothing", 0.0), ("bound", "times", 0.5),
])  # fmt: skip
def test_fields_are_checked(name: str, field: str, value: Any) -> None:
    from fedlora.errors import ConfigError

    with pytest.raises(ConfigError, match=rf"{field}: got {value}"):
        GUARDS[name](**{field: value})


def test_a_deployment_is_bounded_unless_it_says_otherwise(tmp_path: Path) -> None:
    """A server sees what arrives through the bound first; a simulation of the same recipe has the guards that it names."""
    names = ["food", "sea", "sport"]
    for fields, want in (
        ({}, ["bound"]),
        ({"federation": {"guards": ["clip"]}}, ["clip", "bound"]),
        ({"federation": {"guards": [{"bound": {"times": 9}}]}}, ["bound"]),
        ({"deployment": {"bound": None}}, []),
    ):
        recipe = Recipe.load(
            write_recipe(
                tmp_path,
                **{"federation": {"guards": []}, "deployment": {"bound": 2.5}} | fields,
                data={"classes": names},
            )
        )
        guards = coordinator(recipe, tmp_path / "run", lambda: None).sampling.guards  # type: ignore[arg-type, return-value]
        assert [g.name for g in guards] == want
        if want:
            assert guards[-1].times == (9 if "federation" in fields and want == ["bound"] else 2.5)  # type: ignore[attr-defined]
        assert [g.name for g in recipe.guard_objects()] == [n for n in want if n != "bound" or "federation" in fields][
            :1
        ]
    assert bounded(Sampling(), HomLoRA(), 3.0).guards == (GUARDS["bound"](times=3.0),)
    assert bounded(Sampling(), METHODS["local"](), 3.0).guards == ()


# the simulator of attacks -------------------------------------------------------------------------------------------
def simulator() -> Any:
    spec = importlib.util.spec_from_file_location("attacks", Path(__file__).parents[1] / "bench/attacks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["attacks"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:round .* times the median of the round")
def test_an_attack_harms_and_a_defence_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On vectors in five heaps: a tenfold flip by 30 % ruins the mean, and multi-Krum on products keeps the accuracy."""
    a = simulator()
    monkeypatch.setattr(a, "ROUNDS", 5)
    monkeypatch.setattr(a, "CLIENTS", 10)
    g = np.random.default_rng(0)
    y = g.integers(0, 5, 600)
    x = (2 * np.eye(5, 384)[y] + 0.3 * g.normal(size=(600, 384))).astype(np.float32)
    good, bad, kept = (
        a.accuracy("homlora", attack, share, defence, 0, x, y)
        for attack, share, defence in (
            ("none", 0.0, "none"),
            ("flip x10", 0.3, "none"),
            ("flip x10", 0.3, "multi-Krum"),
        )
    )
    assert good > 0.8 and bad < 0.4 and kept > 0.7
    assert a.accuracy("hetlora", "none", 0.0, "median", 0, x, y) is None


def test_attackers_send_what_the_attacks_say() -> None:
    """Against the formulas, for a client of a lower rank too; honest uploads pass as they are."""
    a = simulator()
    old = leaves(0, 4)
    ps = [leaves(i, 4, near=old, size=0.1) | {RANK: torch.tensor(4)} for i in range(1, 5)]
    up = {k: v for k, v in leaves(9, 2).items()}
    cut = {k: v if k == HEAD else v.narrow(0 if k.part == "A" else 1, 0, 2) for k, v in old.items()}

    def sent(attack: str) -> Params:
        seen = [*uploads(ps), Upload(Client("bad", 5), up)]
        got = list(a.Attackers(frozenset(["bad"]), a.ATTACKS[attack]).arrive(iter(seen), ServerState(0, old)))
        assert [u.params for u in got[:4]] == ps
        return got[4].params

    every = {k: torch.stack([p[k] for p in ps]) for k in old}
    for k, v in up.items():
        torch.testing.assert_close(sent("sign flip")[k], 2 * cut[k] - v)
        torch.testing.assert_close(sent("flip x10")[k], cut[k] - 10 * (v - cut[k]))
        torch.testing.assert_close(sent("scale x10")[k], cut[k] + 10 * (v - cut[k]))
        little = every[k].mean(0) - 1.5 * every[k].std(0)
        torch.testing.assert_close(
            sent("little is enough")[k], little if k == HEAD else little.narrow(0 if k.part == "A" else 1, 0, 2)
        )
        change = {"A": 1, "B": -1}.get(k.part)
        if change is not None:
            torch.testing.assert_close(sent("assembly")[k], cut[k] + change * (v - cut[k]))
        assert float((sent("noise")[k] - cut[k]).norm()) == pytest.approx(10 * float((v - cut[k]).norm()), rel=1e-4)
    assert sent("label flip") == up
