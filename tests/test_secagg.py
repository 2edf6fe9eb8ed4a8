"""Secure aggregation: the sum is right, whoever vanishes; the server's memory holds nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.errors import TrainingError, UploadError
from fedlora.federation.guards import GUARDS
from fedlora.federation.secagg import Hub, Member, fixed, graph, mask, real, step
from fedlora.methods import METHODS
from fedlora.methods.contract import Client, ServerState, Upload
from fedlora.tree import Key

A = Key("lora", "l", "A")


def shared(n: int, size: int, neighbours: int | None = None, threshold: int = 3) -> tuple[Hub, list[Member]]:
    """A round up to where every client has its neighbours' shares."""
    near = graph(n, neighbours, 5)
    hub, members = Hub(near, threshold, size), [Member(i, near[i], threshold) for i in range(n)]
    hub.introduce(members)
    return hub, members


def vectors(n: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**32, (n, size), dtype=np.uint32)


def sum_of(x: np.ndarray, who: Sequence[int]) -> np.ndarray:
    return (x[list(who)].astype(np.uint64).sum(0) % 2**32).astype(np.uint32)


@pytest.mark.parametrize("neighbours", [None, 4])
@pytest.mark.parametrize("gone", [[], [0], [2, 7]])
def test_the_sum_is_that_of_those_who_sent(neighbours: int | None, gone: list[int]) -> None:
    x = vectors(9, 50)
    hub, members = shared(9, 50, neighbours, threshold=2)
    for m in members:
        if m.id not in gone:
            hub.add(m.id, m.masked(x[m.id]))
    answers = {m.id: m.unmask(hub.sent, gone) for m in members if m.id not in gone}
    np.testing.assert_array_equal(hub.open(answers), sum_of(x, [i for i in range(9) if i not in gone]))


def everything(o: Any, seen: set[int] | None = None) -> list[Any]:
    """Every array and text that is reachable from an object."""
    seen = set() if seen is None else seen
    if id(o) in seen:
        return []
    seen.add(id(o))
    if isinstance(o, (np.ndarray, bytes, torch.Tensor)):
        return [o]
    if isinstance(o, dict):
        inner: list[Any] = [*o.values()]
    elif isinstance(o, (list, tuple, set)):
        inner = [*o]
    else:
        inner = list(vars(o).values()) if hasattr(o, "__dict__") else []
    return [x for v in inner for x in everything(v, seen)]


def test_the_servers_memory_of_a_round_holds_the_sum_alone() -> None:
    """Every array that is reachable from the server, before and after the sum is opened: none is a client's vector, none is a
    masked vector, and one alone is as large. What is there of a single client is as good as random without the others."""
    x = vectors(6, 400) >> np.uint32(12)  # small numbers: masked ones would show a pattern if masks were too short
    hub, members = shared(6, 400)
    for m in members:
        hub.add(m.id, m.masked(x[m.id]))
    large = [v for v in everything(hub) if isinstance(v, np.ndarray)]
    assert [v.shape for v in large] == [(400,)]
    masked = large[0]
    assert not (masked == sum_of(x, range(6))).any()
    assert abs(np.mean(masked / 2**32) - 0.5) < 0.1  # uniform on the ring
    texts = [v for v in everything(hub) if isinstance(v, bytes)]
    assert max(map(len, texts)) < 150  # keys and sealed shares, no vector
    for v in x:
        assert not any(v[:8].tobytes() in t for t in texts)
    np.testing.assert_array_equal(hub.open({m.id: m.unmask(hub.sent, []) for m in members}), sum_of(x, range(6)))
    assert [v.shape for v in everything(hub) if isinstance(v, np.ndarray)] == [(400,)]


def test_all_but_one_vector_taken_away_from_the_masked_sum_does_not_give_that_one() -> None:
    """Where nobody answers, even a server that knows every other vector learns nothing of the last."""
    x = vectors(5, 300)
    hub, members = shared(5, 300)
    for m in members:
        hub.add(m.id, m.masked(x[m.id]))
    rest = hub.total - sum_of(x, range(1, 5))
    assert np.mean(rest == x[0]) < 0.02


def test_a_member_never_gives_both_secrets_of_a_neighbour() -> None:
    _, members = shared(5, 10)
    with pytest.raises(UploadError, match="asked for both secrets"):
        members[0].unmask([1, 2], [2])
    members[0].unmask([1, 2], [3])
    with pytest.raises(UploadError, match="asked for both secrets"):
        members[0].unmask([3], [])


def test_too_few_answers_do_not_open_the_sum() -> None:
    hub, members = shared(6, 10, threshold=4)
    for m in members:
        hub.add(m.id, m.masked(vectors(6, 10)[m.id]))
    with pytest.raises(TrainingError, match="of 4 shares of member"):
        hub.open({m.id: m.unmask(hub.sent, []) for m in members[:3]})


def test_a_share_that_was_changed_on_the_way_is_refused() -> None:
    _, members = shared(4, 10)
    box = members[0].shares({j: m.publics() for j, m in enumerate(members) if j})[1]
    with pytest.raises(UploadError, match="changed on the way"):
        members[1].receive({0: box[:-1] + bytes([box[-1] ^ 1])})


def test_fixed_point_numbers_add_up_within_half_a_grain_each() -> None:
    x = np.random.default_rng(1).uniform(-7.99, 7.99, (40, 1000))
    grain = step(8.0, 40)
    total = np.zeros(1000, np.uint32)
    for v in x:
        total = total + fixed(v, grain, 8.0)
    assert np.abs(real(total, grain) - x.sum(0)).max() <= 40 * grain / 2
    with pytest.raises(UploadError, match="does not fit"):
        fixed(np.array([8.0]), grain, 8.0)
    with pytest.raises(UploadError, match="does not fit"):
        fixed(np.array([np.nan]), grain, 8.0)


def test_masks_need_the_whole_seed() -> None:
    """Seeds of 256 bits that agree when they are folded to 32 give masks that have nothing in common."""
    a, b = bytes(32), bytes([1, 0, 0, 0] * 2 + [0] * 24)
    assert np.mean(mask(a, 1000) == mask(b, 1000)) < 0.01


@pytest.mark.parametrize("vanish", [0.0, 0.25])
def test_the_guard_gives_the_methods_weighted_mean(vanish: float) -> None:
    """Of those that did not vanish, by examples; against numpy. Bytes of a client are told."""
    from fedlora.seeds import np_rng

    server = ServerState(0, {A: torch.randn(4, 30, generator=torch.Generator().manual_seed(0))})
    ups = [Upload(Client(f"c{i}", i + 1), {A: server.params[A] + 0.1 * i}) for i in range(8)]
    of = GUARDS["secagg"](vanish=vanish).opened(server, {}, lambda: server.params, METHODS["homlora"]().weight)
    [got] = of.arrive(iter(ups), server)
    gone = set(np_rng("secagg", 0).permutation(8)[: int(vanish * 8)].tolist())
    here = [i for i in range(8) if i not in gone]
    want = np.average([0.1 * i for i in here], weights=[i + 1 for i in here])
    np.testing.assert_allclose((got.params[A] - server.params[A]).numpy(), want, atol=1e-6)
    cost = of.cost  # type: ignore[attr-defined]
    assert cost["up"] > 4 * 120 and 0 < cost["seconds"] < 5


@pytest.mark.parametrize("method", ["hetlora", "flora", "flexlora", "local"])
def test_methods_that_need_single_uploads_are_refused(method: str) -> None:
    assert GUARDS["secagg"]().cannot(METHODS[method]())
