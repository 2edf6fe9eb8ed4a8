"""Differential privacy of clients: the mechanism, what it costs, what it withholds, and that a run never forgets."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import brentq
from scipy.stats import binomtest, kstest, norm

from fedlora.data.batches import LocalWork
from fedlora.errors import BudgetError, ConfigError, StateError
from fedlora.federation.accountant import Cohort, Mechanism, least_noise
from fedlora.federation.guards import GUARDS
from fedlora.federation.guards.guard import Place
from fedlora.federation.noise import gaussian, secret, seeded
from fedlora.federation.private import Placed
from fedlora.federation.run import Federation
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.files import sealed
from fedlora.methods import METHODS
from fedlora.methods.contract import Client, ServerState, Upload
from fedlora.report.read import records
from fedlora.training.optimizers import AdamW
from fedlora.tree import Key, Params

A, B = Key("lora", "l", "A"), Key("lora", "l", "B")
DELTA = 1e-5


def leaves(seed: int, scale: float = 1.0) -> Params:
    g = torch.Generator().manual_seed(seed)
    return {A: torch.randn(3, 7, generator=g) * scale, B: torch.randn(9, 3, generator=g) * scale}


def weigh(u: Upload) -> float:
    return float(u.client.examples)


def flat(p: Params) -> np.ndarray:
    return np.concatenate([p[k].double().numpy().ravel() for k in (A, B)])


def place(expected: float = 4, clients: int = 10, cohort: Any = "poisson", **more: Any) -> Place:
    return Place(3, 10, clients, expected, cohort, **more)


def aggregated(guard: Placed, ups: list[Params], server: ServerState, state: Params | None = None) -> Any:
    """(mean, its state afterwards) of one round."""
    of = guard.opened(server, state or {}, lambda: leaves(0), weigh)
    seen = [Upload(Client(f"c{i}", 10**i), p) for i, p in enumerate(ups)]
    [mean] = of.arrive(iter(seen), server)
    return mean.params, of.settle(ServerState(server.round + 1, mean.params), server, state or {})[1]


# the mechanism ------------------------------------------------------------------------------------------------------
def test_the_sum_is_the_papers_with_a_fixed_denominator_and_equal_weights() -> None:
    """Against numpy in float64, without noise; sizes of clients play no part."""
    server, ups = ServerState(0, leaves(0)), [leaves(i) for i in range(1, 4)]
    guard = Placed(GUARDS["dp"](noise=0.0, norm=2.0), place(expected=5))
    x, total = flat(server.params), 0.0
    for p in ups:
        d = flat(p) - x
        total = total + d * min(1.0, 2.0 / np.linalg.norm(d))
    np.testing.assert_allclose(flat(aggregated(guard, ups, server)[0]), x + total / 5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 0.06, 1.0, 1e3, 1e18])
def test_one_client_moves_the_sum_by_the_clip_norm_at_most(size: float) -> None:
    """In float64, whatever it sends and whoever else is there; a client within the norm counts as it is."""
    server = ServerState(0, {k: v.double() for k, v in leaves(0).items()})
    guard = Placed(GUARDS["dp"](noise=0.0, norm=0.3), place(expected=1))
    others = [{k: v.double() for k, v in leaves(i).items()} for i in (1, 2)]
    mine = {k: server.params[k] + v.double() * size for k, v in leaves(9).items()}
    without, with_ = (flat(aggregated(guard, ups, server)[0]) for ups in (others, [*others, mine]))
    moved = np.linalg.norm(with_ - without)
    assert moved <= 0.3 * (1 + 1e-9)
    assert moved == pytest.approx(min(0.3, np.linalg.norm(flat(mine) - flat(server.params))), rel=1e-6)


def test_noise_has_the_stated_scale_and_is_normal() -> None:
    """z C / m on each entry, by Kolmogorov and Smirnov; an empty cohort moves by noise alone."""
    like = {A: torch.zeros(200, 100)}
    server = ServerState(5, like)
    guard = Placed(GUARDS["dp"](noise=1.5, norm=0.4), place(expected=8))
    of = guard.opened(server, {}, lambda: like, weigh)
    [mean] = of.arrive(iter(()), server)
    values = mean.params[A].double().numpy().ravel()
    assert kstest(values / (1.5 * 0.4 / 8), "norm").pvalue > 1e-3
    assert np.std(values) == pytest.approx(1.5 * 0.4 / 8, rel=0.02)


def test_noise_of_a_simulation_is_a_function_of_seed_and_round() -> None:
    same, other = (gaussian(leaves(0), 1.0, seeded(3, "dp", r)) for r in (0, 1))
    again = gaussian(leaves(1), 1.0, seeded(3, "dp", 0))
    tiny.close(same, again, 0.0)
    assert not torch.equal(same[A], other[A])


def test_every_round_has_noise_of_its_own() -> None:
    """The same in two rounds, the difference of the two models would be without any."""
    guard, server = Placed(GUARDS["dp"](noise=1.0), place()), ServerState(0, leaves(0))
    first, second = (aggregated(guard, [], replace(server, round=r))[0] for r in (0, 1))
    assert not np.isclose(flat(first), flat(second)).any()


def test_noise_of_a_deployment_is_normal_and_never_the_same() -> None:
    draw = secret()
    values = draw((100, 300)).numpy().ravel()
    assert kstest(values, "norm").pvalue > 1e-3
    assert not np.intersect1d(values[:1000], secret()((1000,)).numpy()).size


def test_the_clip_norm_follows_the_quantile() -> None:
    """Andrew et al., algorithm 1: without noise it settles where half the clients' norms are below it."""
    server, guard = ServerState(0, leaves(0)), Placed(GUARDS["dp"](noise=0.0, norm=50.0, quantile=0.5), place(9, 9))
    ups = [{k: server.params[k] + v * 0.1 * i for k, v in leaves(77).items()} for i in range(1, 10)]
    norms = sorted(float(np.linalg.norm(flat(p) - flat(server.params))) for p in ups)
    state: Params = {}
    for t in range(60):
        _, state = aggregated(guard, ups, replace(server, round=t), state)
    (c,) = (float(v) for v in state.values())
    assert norms[3] <= c <= norms[5]


def test_the_count_of_adaptive_clipping_is_paid_for() -> None:
    """Two Gaussians together cost what z does: z_D^-2 + (2 s)^-2 = z^-2, s with the sensitivity 1/2 of a count less a half."""
    of = Placed(GUARDS["dp"](noise=1.2, quantile=0.5), place(100, 1000)).opened(
        ServerState(0, leaves(0)), {}, lambda: {}, weigh
    )
    z = (of.std**-2 + (2 * of.count_noise) ** -2) ** -0.5  # type: ignore[attr-defined]
    assert z == pytest.approx(1.2)
    assert of.count_noise == 5.0  # type: ignore[attr-defined]


# the accountant -----------------------------------------------------------------------------------------------------
def exact(z: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism (Balle and Wang, ICML 2018, arXiv:1805.06530, theorem 8)."""
    gap = lambda e: norm.cdf(0.5 / z - e * z) - math.exp(e) * norm.cdf(-0.5 / z - e * z) - delta  # noqa: E731
    return float(brentq(gap, 0, 60))


@pytest.mark.parametrize("z", [2.0, 5.0])
@pytest.mark.parametrize("rounds", [1, 9])
def test_everybody_in_every_round_costs_what_the_closed_formula_says(z: float, rounds: int) -> None:
    """Rounds with everybody are one Gaussian of z / sqrt(rounds)."""
    m = Mechanism(z, "everybody", 20, 20)
    want = exact(z / math.sqrt(rounds), DELTA)
    assert m.losses(rounds, DELTA) == pytest.approx(want, rel=1e-3)
    assert want <= m.epsilon(rounds, DELTA) <= m.renyi(rounds, DELTA) <= 1.15 * want


def test_a_fixed_cohort_costs_twice_the_sensitivity() -> None:
    m = Mechanism(4.0, "fixed", 20, 5)
    assert m.epsilon(1, DELTA) == pytest.approx(exact(2.0, DELTA), rel=1e-3)


def test_poisson_sampling_costs_what_was_published() -> None:
    """Abadi et al. (2016, section 1 and figure 2): q = 0.01, z = 4, 10,000 steps, delta 1e-5 cost 1.26 by the moments accountant."""
    m = Mechanism(4.0, "poisson", 60_000, 600)
    assert 0.8 < m.epsilon(10_000, DELTA) <= m.renyi(10_000, DELTA) <= 1.26


def test_sampling_without_replacement_is_its_own_event() -> None:
    """Against the bound of Wang et al. (arXiv:1808.00087, theorem 9) at order 2, worked out by hand, for one round."""
    z, q = 6.0, 0.1
    m = Mechanism(z, "uniform", 100, 10)
    rdp = 2 / (2 * (z / 2) ** 2)  # Renyi divergence of order 2 of a Gaussian whose sum moves by 2 C
    order2 = math.log(1 + q**2 * math.comb(2, 2) * min(4 * math.expm1(rdp), math.exp(rdp) * 2))
    assert m.losses(1, DELTA) is None
    # (order, divergence) -> epsilon, by Canonne et al. (arXiv:2004.00010, proposition 12)
    of_order2 = order2 + math.log1p(-1 / 2) - math.log(DELTA * 2) / 1
    assert 0 < m.renyi(1, DELTA) <= of_order2
    assert m.renyi(1, DELTA) > Mechanism(z, "poisson", 100, 10).renyi(1, DELTA)


@pytest.mark.parametrize("cohort", ["poisson", "everybody", "uniform", "fixed"])
def test_the_least_noise_is_enough_and_little_less_is_not(cohort: Cohort) -> None:
    z = least_noise(cohort, 40, 8, 5, DELTA, 3.0)
    assert Mechanism(z, cohort, 40, 8).epsilon(5, DELTA) <= 3.0
    assert Mechanism(z * 0.99, cohort, 40, 8).epsilon(5, DELTA) > 3.0


# cohorts ------------------------------------------------------------------------------------------------------------
def test_a_poisson_cohort_is_a_coin_for_each_client() -> None:
    s = Sampling(rounds=400, clients_per_round=0.25, cohort="poisson")
    drawn = [s.members(8, 0, t) for t in range(400)]
    for k in range(8):
        assert binomtest(sum(k in c for c in drawn), 400, 0.25).pvalue > 1e-4
    sizes = [len(c) for c in drawn]
    assert min(sizes) == 0 and np.var(sizes) == pytest.approx(8 * 0.25 * 0.75, rel=0.25)
    together = np.mean([0 in c and 1 in c for c in drawn])
    assert together == pytest.approx(1 / 16, abs=0.04)


def test_a_round_without_clients_changes_nothing(tmp_path: Path) -> None:
    sampling = Sampling(rounds=2, clients_per_round=1e-9, cohort="poisson")
    f = run(tmp_path, (), sampling=sampling)
    assert [t.clients for t in records(f.store.root).trains] == [[], []]
    _, leaves_, _ = f.store.load_server() or (0, {}, {})
    tiny.close(leaves_, f.method.init(f.context).params, 0.0)


# runs ---------------------------------------------------------------------------------------------------------------
SHORT: dict[str, Any] = {"plan": LocalWork(steps=1, batch_size=4), "evaluation": Evaluation(every=1)}


def made(folder: Path, guards: Any, **more: Any) -> Federation:
    sampling = replace(more.pop("sampling", Sampling(rounds=3, clients_per_round=0.5, cohort="poisson")), guards=guards)
    method = more.pop("method", METHODS["homlora"](rank=2, optimizer=AdamW(1e-2)))
    return tiny.federation(method, folder, sampling=sampling, **SHORT | more)


def run(folder: Path, guards: Any, **more: Any) -> Federation:
    f = made(folder, guards, **more)
    f.run()
    return f


def test_epsilon_can_be_recomputed_from_the_records(tmp_path: Path) -> None:
    """By dp-accounting alone, from the summary and from every round."""
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    f = run(tmp_path, (GUARDS["dp"](noise=1.1, delta=1e-3),))
    s = records(f.store.root).summary
    assert s is not None
    p = s["privacy"]
    event = dp.PoissonSampledDpEvent(0.5, dp.GaussianDpEvent(1.1))
    assert p["epsilon"] == pytest.approx(PLDAccountant().compose(event, 3).get_epsilon(1e-3), rel=1e-3)
    assert (p["rounds"], p["noise"], p["expected"] / p["clients"]) == (3, 1.1, 0.5)
    spent = [t.extra["privacy"]["epsilon"] for t in records(f.store.root).trains]
    assert spent == sorted(spent) and spent[-1] == p["epsilon"]


def test_records_of_a_private_run_tell_nothing_of_clients(tmp_path: Path) -> None:
    """Nothing that depends on one client's rows: the run of a neighbour, whose rows are others, leaves the same lines but bytes."""
    f = run(tmp_path, (GUARDS["dp"](noise=1.0, delta=1e-3),))
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {x["kind"] for x in lines} == {"train"}
    for x in lines:
        assert (x["clients"], x["losses"], x["examples"], x["refused"], x["exactness"]) == ([], {}, 0, {}, None)
        assert math.isnan(x["loss"])
    held = sealed.read(tmp_path / "partition.json")
    assert held is not None and not {"sizes", "histogram", "rows"} & held.keys()
    s = records(f.store.root).summary
    assert s is not None and (s["test"], s["chosen_round"], s["constant"]) == (None, None, None)


def test_scores_are_kept_where_their_rows_are_public(tmp_path: Path) -> None:
    f = run(tmp_path, (GUARDS["dp"](noise=1.0, delta=1e-3, scores="public"),))
    r = records(f.store.root)
    assert r.summary is not None and r.summary["test"] is not None
    assert all(not t.losses and not t.clients for t in r.trains)


def test_the_budget_is_spent_before_a_round_and_never_passed(tmp_path: Path) -> None:
    one = Mechanism(1.0, "poisson", 4, 2).epsilon(2, 1e-3)
    f = made(tmp_path, (GUARDS["dp"](noise=1.0, delta=1e-3, epsilon=one * 1.0001),))
    with pytest.raises(BudgetError, match="round 3 would bring epsilon to"):
        f.run()
    assert (f.store.load_server() or (None,))[0] == 2
    assert sealed.read(tmp_path / "privacy.json")["charges"] == {"0": 1, "1": 1}  # type: ignore[index]
    with pytest.raises(BudgetError):
        made(tmp_path, f.sampling.guards).run()


def test_noise_is_found_for_a_budget(tmp_path: Path) -> None:
    f = run(tmp_path, (GUARDS["dp"](epsilon=4.0, delta=1e-3),))
    p = (records(f.store.root).summary or {})["privacy"]
    assert 3.9 < p["epsilon"] <= 4.0


class Stop(tiny.Callback):
    """Interrupts at the n-th thing that the run says."""

    def __init__(self, n: int):
        self.left = n

    def _tick(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt

    round_start = clients_done = record = round_done = evaluating = _tick


@pytest.mark.parametrize("guard", [{"noise": 1.0}, {"noise": 1.0, "quantile": 0.5}], ids=["fixed", "adaptive"])
def test_a_run_that_is_cut_off_everywhere_ends_and_costs_as_one_that_is_not(
    guard: dict[str, Any], tmp_path: Path
) -> None:
    guards = (GUARDS["dp"](norm=0.1, delta=1e-3, **guard),)
    whole = run(tmp_path / "a", guards, block=1)
    for n in range(1, 12):
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path / "b", guards, block=1).run(Stop(n % 4 + 1))
        done = (made(tmp_path / "b", guards).store.load_server() or (0,))[0]
        if done >= 2:
            break
    again = run(tmp_path / "b", guards, block=1)
    a, b = whole.store.load_server(), again.store.load_server()
    assert a is not None and b is not None
    tiny.close(a[1], b[1], 0.0)
    assert sealed.read(tmp_path / "a/privacy.json") == sealed.read(tmp_path / "b/privacy.json")


def test_a_run_whose_ledger_is_gone_does_not_go_on(tmp_path: Path) -> None:
    guards = (GUARDS["dp"](noise=1.0, delta=1e-3),)
    f = made(tmp_path, guards)
    with pytest.raises(KeyboardInterrupt):
        f.run(Stop(8))
    (tmp_path / "privacy.json").unlink()
    with pytest.raises(StateError, match="nobody can say what the run has spent"):
        made(tmp_path, guards).run()


def test_a_released_round_that_is_done_again_with_fresh_noise_is_charged_again(tmp_path: Path) -> None:
    from fedlora.federation.ledger import Ledger
    from fedlora.federation.store import Store

    ledger = Ledger(Store(tmp_path), Mechanism(1.0, "everybody", 4, 4), DELTA, None, 5, fresh=True)
    ledger.charge(0)
    ledger.charge(0)  # it was cut off before anything left
    assert ledger.spent == 1
    ledger.released(0)
    ledger.charge(0)
    assert ledger.spent == 2


# an audit -----------------------------------------------------------------------------------------------------------
def test_canaries_stay_under_the_claimed_epsilon() -> None:
    """A client sends the largest change in a known direction, or is not there; whoever sees the aggregate guesses. The lower bound
    on epsilon from the guesses (Clopper and Pearson, 95 %) is below the claim, and not far: the noise is no larger than stated."""
    like = {A: torch.zeros(8, 8)}
    guard = GUARDS["dp"](noise=1.0, norm=1.0)
    canary = {A: torch.zeros(8, 8).index_fill(0, torch.tensor([0]), 100.0)}
    trials, said = 4000, {True: 0, False: 0}
    direction = canary[A] / canary[A].norm()
    for there in (True, False):
        for t in range(trials):
            p = replace(place(1, 1, "everybody"), seed=t * 2 + there)
            of = Placed(guard, p).opened(ServerState(0, like), {}, lambda: like, weigh)
            ups = [Upload(Client("canary", 1), canary)] if there else []
            [mean] = of.arrive(iter(ups), ServerState(0, like))
            said[there] += float((mean.params[A] * direction).sum()) > 1.0
    low = binomtest(said[True], trials).proportion_ci(0.95).low
    high = binomtest(said[False], trials).proportion_ci(0.95).high
    found = math.log((low - DELTA) / high)
    claimed = Mechanism(1.0, "everybody", 1, 1).epsilon(1, DELTA)
    assert 0.8 < found <= claimed


# what is refused ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["hetlora", "flexlora", "flora", "fedex", "local", "centralized", "scaffold"])
def test_methods_whose_server_is_no_mean_are_refused_with_the_reason(method: str) -> None:
    why = GUARDS["dp"](noise=1.0).cannot(
        METHODS[method](**({"optimizer": __import__("fedlora").SGD()} if method == "scaffold" else {}))
    )
    assert why and METHODS[method].title.partition(" (")[0] in why


@pytest.mark.parametrize("other", ["trimmed", "median", "krum", "geomedian", "bound", "feedback"])
def test_guards_that_compare_clients_cannot_stand_beside_it(other: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a guard that can stand beside dp"):
        made(tmp_path, (GUARDS["dp"](noise=1.0), GUARDS[other]()))


@pytest.mark.parametrize(
    "bad",
    [{}, {"noise": -1.0}, {"noise": 0.0, "epsilon": 1.0}, {"noise": 1.0, "norm": 0.0}, {"noise": 1.0, "delta": 0.0}, {"noise": 1.0, "quantile": 1.0}],
)  # fmt: skip
def test_bad_fields_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        GUARDS["dp"](**bad)


# a deployment -------------------------------------------------------------------------------------------------------
def deployed_run(folder: Path, model: Path, sites: dict[str, Path], *sets: str) -> Federation:
    """A run over sites in this process, by packets."""
    from test_deploy import Loop

    from fedlora.deploy.audit import digest
    from fedlora.deploy.coordinator import coordinator, told_to_sites
    from fedlora.deploy.policy import Policy
    from fedlora.deploy.site import Holding, guarded
    from fedlora.recipe import Recipe

    raw = {
        "model": {"name": str(model), "device": "cpu"},
        "data": {"source": "(of the site)", "text": "text", "label": "label", "classes": ["food", "sea", "sport"], "max_length": 16},
        "method": {"name": "ffa"}, "train": {"steps": 4, "batch_size": 4, "dropout": False},
        "federation": {"rounds": 2, "guards": [{"dp": {"noise": 1.0, "delta": 1e-3}}]},
        "deployment": {"clients": 2}, "run": {"threads": 1, "block": 1},
    }  # fmt: skip
    recipe = Recipe.from_dict(raw, list(sets))
    told = told_to_sites(recipe)
    own = Policy().with_columns({}, str(model))
    there = {
        n: guarded(
            Holding(id, str(data), {}, model=str(model), threads=1, policy=own), folder / id, accept=[digest(told)]
        )
        for n, (id, data) in enumerate(sites.items())
    }
    fed = coordinator(recipe, folder / "server", lambda: Loop(there), lambda text: None)
    fed.run()
    return fed


def test_a_deployment_draws_noise_that_is_never_the_same_and_claims_nothing_for_sampling(tmp_path: Path) -> None:
    """Two servers with the same recipe and the same sites end elsewhere; both tell what they have spent and no client's losses."""
    from cli import model_folder, rows, write_csv

    model_folder(tmp_path / "model")
    for i, id in enumerate("ab"):
        write_csv(tmp_path / f"{id}.csv", [r[:2] for r in rows(90, i)], ("text", "label"))
    sites = {id: tmp_path / f"{id}.csv" for id in "ab"}
    one, two = (deployed_run(tmp_path / n, tmp_path / "model", sites) for n in ("one", "two"))
    a, b = one.store.load_server(), two.store.load_server()
    assert a is not None and b is not None
    trained = [k for k in a[1] if k.part == "B"]
    assert trained and not any(torch.equal(a[1][k], b[1][k]) for k in trained)
    r = records(one.store.root)
    assert r.summary is not None
    p = r.summary["privacy"]
    assert (p["cohort"], p["expected"], p["rounds"]) == ("everybody", 2.0, 2)
    assert p["epsilon"] == pytest.approx(exact(1 / math.sqrt(2), 1e-3), rel=1e-3)
    assert all(not t.losses for t in r.trains) and not r.evals()
    with pytest.raises(ConfigError, match=r"federation\.cohort"):
        deployed_run(tmp_path / "three", tmp_path / "model", sites, "federation.cohort=poisson")
    with pytest.raises(ConfigError, match="no secure aggregation in a deployment"):
        deployed_run(tmp_path / "four", tmp_path / "model", sites, "federation.guards=[secagg]")
