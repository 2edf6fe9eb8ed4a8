"""What a comparison claims: under no difference it claims one in less than 6 % of cases, whatever a run's own luck."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fedlora.report.statistics import LEAST, Pair, Scores, differences, holm, interval


def runs(draw: np.random.Generator, seeds: int, clients: int, better: float = 0.0) -> Scores:
    """One setting: what a run has learned moves all its clients together, so they are no repetitions."""
    out = {}
    for s in range(seeds):
        of_run = 0.03 * draw.standard_normal() + better
        scores = 0.6 + of_run + 0.01 * draw.standard_normal(clients)
        out[(s, "p")] = {f"c{k}": float(v) for k, v in enumerate(scores)}
    return out


@pytest.mark.parametrize(("seeds", "settings"), [(5, 2), (10, 2), (5, 4)])
def test_no_more_than_one_false_claim_in_twenty(seeds: int, settings: int) -> None:
    """Over all pairs of a page together."""
    draw = np.random.default_rng(seeds + settings)
    claimed = 0
    for _ in range(2000):
        found = differences({f"m{i}": runs(draw, seeds, 8) for i in range(settings)})
        assert len(found) == settings * (settings - 1) // 2
        claimed += any(x.verdict == "differs" for x in found)
    assert claimed / 2000 < 0.06


def test_a_difference_is_found() -> None:
    draw = np.random.default_rng(0)
    found = [differences({"a": runs(draw, 8, 8, better=0.1), "b": runs(draw, 8, 8)})[0] for _ in range(200)]
    assert np.mean([x.verdict == "differs" for x in found]) > 0.9
    assert all(x.low is not None and x.high is not None for x in found)
    assert np.mean([x.low <= 0.1 <= x.high for x in found]) > 0.9  # type: ignore[operator]


def test_a_pair_is_scipys_test_of_one_number_a_seed() -> None:
    draw = np.random.default_rng(3)
    a, b = runs(draw, 6, 5), runs(draw, 6, 5)
    gaps = [np.mean([a[s][c] - b[s][c] for c in a[s]]) for s in a]
    want = stats.ttest_1samp(gaps, 0.0)
    [got] = differences({"a": a, "b": b})
    assert got.p == pytest.approx(want.pvalue)
    low, high = want.confidence_interval(0.95)
    assert (got.low, got.high) == (pytest.approx(low), pytest.approx(high))


def test_few_seeds_cannot_tell() -> None:
    draw = np.random.default_rng(4)
    for seeds in range(1, LEAST):
        [got] = differences({"a": runs(draw, seeds, 8, better=5.0), "b": runs(draw, seeds, 8)})
        assert got.p is None and got.verdict == f"{seeds} seed{'s' if seeds > 1 else ''} cannot tell"
        assert (got.low is None) == (seeds == 1)


def test_only_what_both_have_is_compared() -> None:
    a: Scores = {(0, "p"): {"x": 1.0, "y": 0.0}, (1, "p"): {"x": 1.0}}
    b: Scores = {(0, "p"): {"x": 0.5, "z": 9.0}, (1, "other partition"): {"x": 0.0}}
    assert differences({"a": a, "b": b}) == [Pair("a", "b", 1, 0.5, None, None, None, apart=2)]


def test_equal_runs_do_not_differ() -> None:
    a = runs(np.random.default_rng(5), 6, 4)
    [got] = differences({"a": a, "b": a})
    assert (got.difference, got.p, got.verdict) == (0.0, 1.0, "within noise")


def test_holm_is_the_step_down_rule() -> None:
    """Literally: reject the smallest while p_i <= level / (m - i); the adjusted p says at which level that happens."""
    draw = np.random.default_rng(6)
    for _ in range(50):
        p = list(draw.uniform(size=5) ** 3)
        adjusted = holm(p)
        for level in (0.01, 0.05, 0.2, 0.5):
            rejected = set()
            for i, at in enumerate(np.argsort(p)):
                if p[at] > level / (len(p) - i):
                    break
                rejected.add(int(at))
            assert {i for i, q in enumerate(adjusted) if q <= level} == rejected


def test_the_interval_resamples_seeds_and_then_clients() -> None:
    """Against a literal loop; it covers the truth more often than one that takes all clients for repetitions."""
    a = runs(np.random.default_rng(7), 5, 6)
    draw, means = np.random.default_rng(1), []
    for _ in range(4000):
        seeds = [list(a.values())[i] for i in draw.integers(5, size=5)]
        means.append(np.mean([np.mean(draw.choice(list(c.values()), len(c))) for c in seeds]))
    got = interval(a)
    assert got is not None
    np.testing.assert_allclose(got, np.quantile(means, [0.025, 0.975]), atol=2e-3)
    assert interval({(0, "p"): {"x": 1.0, "y": 2.0}}) is None
