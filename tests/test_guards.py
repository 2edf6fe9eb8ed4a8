"""Guards around every method: the contract of methods x guards at small size, and a law for each guard."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_contract import TABLE, state
from test_deploy import server as loop_server
from test_deploy import sites

from fedlora.data.batches import LocalWork
from fedlora.errors import ConfigError, UploadError
from fedlora.federation import wire
from fedlora.federation.channel import Channel
from fedlora.federation.facts import facts
from fedlora.federation.guards import GUARDS
from fedlora.federation.guards.guard import Guard
from fedlora.federation.run import Federation
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods import METHODS
from fedlora.methods.contract import Client, RoundInfo, ServerState, Upload
from fedlora.tree import GUARD, Key, Params, mean

ROWS: dict[str, Guard] = {
    "clip": GUARDS["clip"](norm=0.05),
    "trimmed": GUARDS["trimmed"](share=0.25),
    "feedback-topk": GUARDS["feedback"](form="topk", share=0.2),
    "feedback-int4": GUARDS["feedback"](form="int4"),
    "feedback-randk": GUARDS["feedback"](form="randk", share=0.2),
    "feedback-stochastic": GUARDS["feedback"](form="int4", rounding="stochastic"),
    "median": GUARDS["median"](),
    "krum": GUARDS["krum"](select=2),
    "geomedian": GUARDS["geomedian"](),
    "bound": GUARDS["bound"](times=1.0),
    "fedavgm": GUARDS["fedavgm"](lr=0.5),
    "fedadagrad": GUARDS["fedadagrad"](lr=0.01),
    "fedadam": GUARDS["fedadam"](lr=0.01, lr_ratio=4.0),
    "dp": GUARDS["dp"](noise=0.5, norm=0.05, quantile=0.5, scores="public"),
    "secagg": GUARDS["secagg"](vanish=0.25),
    "fedyogi": GUARDS["fedyogi"](lr=0.01),
}
SERVED = [(m, g) for m, row in TABLE.items() for g, guard in ROWS.items() if guard.cannot(row.method) is None]
SHORT: dict[str, Any] = {
    "plan": LocalWork(steps=2, batch_size=4),
    "evaluation": Evaluation(every=9, views=("personal",)),
    "sampling": Sampling(rounds=2),
}
FAST = ("fedsa", "hetlora", "slora-pf2lora", "homlora-moments")  # the others run in the slow suite


def pairs() -> list[Any]:
    """Every method under every guard that can serve it."""
    quick = {(m, g) for m in FAST for g in ("clip", "trimmed", "feedback-topk", "feedback-int4")}
    quick |= {
        ("fedsa", "median"),
        ("hetlora", "krum"),
        ("homlora-moments", "geomedian"),
        ("fedsa", "bound"),
        ("hetlora", "bound"),
        ("fedsa", "fedadam"),
        ("fedsa", "dp"),
        ("fedsa", "secagg"),
        ("flora-mixed", "krum"),
    }
    return [pytest.param(m, g, marks=() if (m, g) in quick else pytest.mark.slow, id=f"{m}-{g}") for m, g in SERVED]


def federation(method: str, guard: str, folder: Path, block: int = 2, **more: Any) -> Federation:
    settings = SHORT | {"sampling": replace(SHORT["sampling"], guards=(ROWS[guard],))} | more
    base = settings.pop("base", None) or tiny.bert(dropout=0.2)
    return tiny.federation(TABLE[method].method, folder, base, block=block, **settings)


def test_every_guard_has_a_row() -> None:
    assert {g.name for g in ROWS.values()} == set(GUARDS)


@pytest.mark.filterwarnings("ignore:round .* times the median of the round")
@pytest.mark.parametrize(("method", "guard"), pairs())
class TestContract:
    def test_block_equals_one_by_one(self, method: str, guard: str, tmp_path: Path) -> None:
        one, all_ = federation(method, guard, tmp_path / "1", 1), federation(method, guard, tmp_path / "4", 4)
        one.run()
        all_.run()
        (a, kept_a, _), (b, kept_b, _) = state(one), state(all_)
        # A coordinate near a border (a rank of top-k, a rounding step) may fall on either side: most agree, none is far.
        loose = ROWS[guard].encodes
        for x, y in [(a, b), *((kept_a[id], kept_b[id]) for id in kept_a)]:
            assert x.keys() == y.keys()
            for k in x:
                near = torch.isclose(x[k].double(), y[k].double(), rtol=2e-4, atol=2e-5).double().mean()
                assert near >= (0.8 if loose else 1.0), k

    def test_crash_and_resume_is_bit_exact(self, method: str, guard: str, tmp_path: Path) -> None:
        whole = federation(method, guard, tmp_path / "a")
        whole.run()
        broken = federation(method, guard, tmp_path / "b")
        with pytest.raises(KeyboardInterrupt):
            broken.run(tiny.Crash(broken))
        again = federation(method, guard, tmp_path / "b")
        again.run()
        (a, kept_a, lines_a), (b, kept_b, lines_b) = state(whole), state(again)
        tiny.close(a, b, 0.0)
        for id in kept_a:
            tiny.close(kept_a[id], kept_b[id], 0.0)
        assert lines_a == lines_b
        remembered = any(GUARD in k.adapter for p in kept_a.values() for k in p)
        assert remembered == ROWS[guard].remembers

    def test_deployment_equals_engine_and_only_declared_leaves_leave(
        self, method: str, guard: str, tmp_path: Path
    ) -> None:
        """Bit for bit, bytes included; what a guard remembers stays where it is."""
        if TABLE[method].method.pooled:
            pytest.skip("its data are pooled")
        here = federation(method, guard, tmp_path / "here", 1, base=tiny.bert())
        here.run()
        more = SHORT | {"sampling": here.sampling}
        link = sites(TABLE[method].method, tmp_path, **more)
        there = loop_server(TABLE[method].method, tmp_path / "there", link, **more)
        there.run()
        tiny.close(state(here)[0], state(there)[0], 0.0)
        for a, b in zip(trained(there), trained(here), strict=True):
            assert (a["bytes"], a["losses"], a["refused"]) == (b["bytes"], b["losses"], {})
        parts = {"lora.A", "lora.B", "common.A", "common.B"} if "slora" in method or "rolora" in method else set()
        for _, order, reply in link.seen:
            if order.kind == "train" and not isinstance(reply, str):
                for part in reply.parts.values():
                    leaves, _ = wire.decode(part)
                    sent = {f"{k.adapter}.{k.part.partition('~')[0]}" for k in leaves}
                    assert sent and sent <= set(TABLE[method].uploads.split()) | parts


def trained(f: Federation) -> list[dict[str, Any]]:
    text = (f.store.root / "metrics.jsonl").read_text(encoding="utf-8")
    return [x for x in map(json.loads, text.splitlines()) if x["kind"] == "train"]


PRICED = ("fedsa", "hetlora", "pf2lora", "sft", "homlora-dora", "bitfit")  # the others in the slow suite


# what check announces ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("guards", [(), (ROWS["feedback-topk"],), (ROWS["feedback-int4"],)], ids=["-", "topk", "int4"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("method", [pytest.param(m, marks=() if m in PRICED else pytest.mark.slow) for m in TABLE])
def test_check_announces_what_a_run_sends(method: str, precision: Any, guards: Any, tmp_path: Path) -> None:
    if guards and guards[0].cannot(TABLE[method].method):
        pytest.skip("this guard cannot serve the method")
    sampling = Sampling(rounds=1, precision=precision, guards=guards)
    f = tiny.federation(TABLE[method].method, tmp_path, **SHORT | {"sampling": sampling})
    announced = facts(f, f.block_size()).bytes_per_round
    f.run()
    (line,) = trained(f)
    assert {d: sum(v.values()) for d, v in line["bytes"].items()} == announced


@pytest.mark.parametrize(
    "method", ["slora", "slora-keep", "slora-pf2lora", "fedsa", "rolora", "flora", "fedex", "frlora"]
)
def test_check_announces_what_all_rounds_send(method: str, tmp_path: Path) -> None:
    """Of a method with stages too, whose later messages hold other leaves."""
    f = tiny.federation(TABLE[method].method, tmp_path, **SHORT | {"sampling": Sampling(rounds=4)})
    announced = facts(f, f.block_size()).bytes
    f.run()
    assert {d: sum(sum(x["bytes"][d].values()) for x in trained(f)) for d in ("up", "down")} == announced


# laws ---------------------------------------------------------------------------------------------------------------
A, B, R, N = Key("lora", "l", "A"), Key("lora", "l", "B"), Key("lora", "l", "rank"), Key("lora", "", "norm")
ORDER = RoundInfo(0, 3)


def leaves(seed: int, r: int = 4) -> Params:
    g = torch.Generator().manual_seed(seed)
    return {A: torch.randn(r, 7, generator=g), B: torch.randn(9, r, generator=g)}


def test_clip_is_the_papers_formula() -> None:
    """Against numpy in float64; a change within the bound passes to the bit; facts that an upload states stay."""
    down, up = leaves(0), leaves(1) | {R: torch.tensor(4)}
    flat = lambda p: np.concatenate([p[k].double().numpy().ravel() for k in (A, B)])  # noqa: E731
    d = flat(up) - flat(down)
    for norm in (0.5, 100.0):
        got = GUARDS["clip"](norm=norm).leave(up, down, {}, ORDER, Client("a", 1))
        want = flat(down) + d * min(1.0, norm / np.linalg.norm(d))
        np.testing.assert_allclose(flat(got), want, rtol=1e-5, atol=1e-6)
        assert int(got[R]) == 4
    assert all(torch.equal(got[k], up[k]) for k in up)


def test_clip_compares_a_pruned_client_with_what_it_kept() -> None:
    down = leaves(0)
    up = {A: down[A][:2] + 1, B: down[B][:, :2]}
    got = GUARDS["clip"](norm=1.0).leave(up, down, {}, ORDER, Client("a", 1))
    assert float((got[A] - down[A][:2]).norm()) == pytest.approx(1.0, rel=1e-5)


def test_trimmed_is_scipys() -> None:
    """Whatever the method's weights; seven times the share is in exact arithmetic."""
    from scipy.stats import trim_mean

    ups = [
        Upload(Client(f"c{i}", 10**i), {A: torch.randn(3, 4, generator=torch.Generator().manual_seed(i))})
        for i in range(10)
    ]
    for share in (0.0, 0.1, 0.3, 0.45):
        seen = list(GUARDS["trimmed"](share=share).arrive(iter(ups), ServerState(0, {})))
        got = mean((u.params, METHODS["homlora"]().weight(u)) for u in seen)[A]
        want = trim_mean(np.stack([u.params[A].double().numpy() for u in ups]), share, axis=0)
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-6)
    ninety = [Upload(Client(str(i), 1), {A: torch.full((1, 1), float(i))}) for i in range(90)]
    [got, *_] = GUARDS["trimmed"](share=0.35).arrive(ninety, ServerState(0, {}))
    assert float(got.params[A]) == pytest.approx(np.mean(range(31, 59)))  # floor(0.35 * 90) = 31 go on each side


def test_one_attacker_cannot_move_a_trimmed_mean_beyond_the_honest() -> None:
    honest = [Upload(Client(f"c{i}", 1), {A: torch.full((2, 2), float(i))}) for i in range(4)]
    bad = Upload(Client("x", 2**40), {A: torch.full((2, 2), 1e30)})
    seen = list(GUARDS["trimmed"](share=0.2).arrive([*honest, bad], ServerState(0, {})))
    assert all(float(u.params[A].max()) <= 3 and float(u.params[A].min()) >= 0 for u in seen)


@pytest.mark.parametrize("form", ["topk", "randk", "int4"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_feedback_loses_nothing(form: Any, precision: Any) -> None:
    """Seide's invariant: what arrived in all rounds together, plus what is kept, is what was meant in all rounds together."""
    channel = Channel(precision, None, (GUARDS["feedback"](form=form, share=0.1),))
    down, kept = leaves(0), {}
    meant = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in down.items()}
    arrived = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in down.items()}
    for t in range(5):
        up = {k: v + w for (k, v), w in zip(down.items(), leaves(10 + t).values(), strict=True)}
        sent = channel.up(up, down, kept, ORDER, Client("a", 1))
        for k in down:
            meant[k] += (up[k] - down[k]).double()
            arrived[k] += (sent.params[k] - down[k]).double()
        kept = sent.kept
    for k in down:
        rest = kept[k._replace(adapter=f"lora{GUARD}feedback")].double()
        torch.testing.assert_close(arrived[k] + rest, meant[k], rtol=1e-4, atol=1e-4)
        assert float(rest.norm()) > 0


def test_topk_sends_the_largest_and_int4_the_nearest() -> None:
    down = leaves(0)
    up = {k: v + w for (k, v), w in zip(down.items(), leaves(1).values(), strict=True)}
    sent = Channel("fp32", None, (GUARDS["feedback"](share=0.1),)).up(up, down, {}, ORDER, Client("a", 1))
    for k in down:
        change, got = (up[k] - down[k]).flatten(), (sent.params[k] - down[k]).flatten()
        n = -(-len(change) // 10)
        assert set(got.nonzero().flatten().tolist()) == set(change.abs().argsort(descending=True)[:n].tolist())
    sent = Channel("fp32", None, (GUARDS["feedback"](form="int4"),)).up(up, down, {}, ORDER, Client("a", 1))
    for k in down:
        step = (up[k] - down[k]).abs().amax(-1, keepdim=True) / 7
        assert bool(((sent.params[k] - up[k]).abs() <= step / 2 + 1e-5).all())
    assert sum(v.nbytes for v in sent.message.values()) < 0.4 * sum(v.nbytes for v in up.values())


def test_random_entries_are_another_draw_each_time() -> None:
    """A share of the entries, whatever their size; the same for the same round and client alone; every entry in turn."""
    channel = Channel("fp32", None, (GUARDS["feedback"](form="randk", share=0.25),))
    down = leaves(0)
    up = {k: v + 1 for k, v in down.items()}

    def places(round: int, client: str) -> set[int]:
        sent = channel.up(up, down, {}, RoundInfo(round, 99), Client(client, 1))
        return set((sent.params[A] - down[A]).flatten().nonzero().flatten().tolist())

    n = down[A].numel()
    assert len(places(0, "a")) == -(-n // 4) and places(0, "a") == places(0, "a")
    assert places(0, "a") != places(1, "a") and places(0, "a") != places(0, "b")
    assert set().union(*(places(t, "a") for t in range(40))) == set(range(n))


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    """QSGD's claim, over 400 rounds: the mean error is within five deviations of zero, where rounding to the nearest is biased."""
    down = {A: torch.zeros(1, 7)}
    up = {A: torch.tensor([[7.0, 0.3, 0.3, -0.3, 1.4, -2.6, 0.0]])}  # the step is 1
    found = {}
    for rounding in ("nearest", "stochastic"):
        channel = Channel("fp32", None, (GUARDS["feedback"](form="int4", rounding=rounding),))
        sent = [channel.up(up, down, {}, RoundInfo(t, 999), Client("a", 1)).params[A] for t in range(400)]
        found[rounding] = torch.stack(sent)
    assert bool(((found["stochastic"] - up[A]).abs() < 1 + 1e-5).all())
    assert bool(((found["stochastic"].mean(0) - up[A]).abs() <= 5 * 0.5 / 20 + 1e-5).all())
    assert bool((found["nearest"].mean(0) - up[A]).abs().max() > 0.25)


def test_feedback_follows_a_client_that_prunes() -> None:
    channel = Channel("fp32", None, (GUARDS["feedback"](form="int4"),))
    down = leaves(0) | {Key("lora", "", "rank"): torch.tensor(4)}
    up = {A: down[A][:2] + 1, B: down[B][:, :2] + 1, Key("lora", "", "rank"): torch.tensor(2)}
    sent = channel.up(up, down, {}, ORDER, Client("a", 1))
    assert sent.params[A].shape == (2, 7) and sent.params[B].shape == (9, 2)
    torch.testing.assert_close(sent.params[A], up[A], rtol=0, atol=0.1)
    smaller = {A: down[A][:2], B: down[B][:, :2], Key("lora", "", "rank"): torch.tensor(2)}
    again = channel.up(smaller, smaller, sent.kept, ORDER, Client("a", 1))
    assert again.params[A].shape == (2, 7)


BAD = {
    "positions too high": lambda m: m | {INDEX: m[INDEX] + 10_000},
    "positions twice": lambda m: m | {INDEX: torch.zeros_like(m[INDEX])},
    "negative positions": lambda m: m | {INDEX: m[INDEX] - 1000},
    "fewer values": lambda m: m | {VALUE: m[VALUE][:1]},
    "no positions": lambda m: {k: v for k, v in m.items() if k != INDEX},
    "real positions": lambda m: m | {INDEX: m[INDEX].float()},
    "a leaf as it is": lambda m: m | {A: torch.zeros(4, 7)},
    "a stray part": lambda m: m | {Key("lora", "elsewhere", "A~index"): m[INDEX]},
    "a leaf that was not sent": lambda m: m | {Key("lora", "x", "A~value"): m[VALUE], Key("lora", "x", "A~index"): m[INDEX]},
    "another precision": lambda m: m | {VALUE: m[VALUE].half()},
    "not finite": lambda m: m | {VALUE: m[VALUE] * float("nan")},
}  # fmt: skip
VALUE, INDEX = Key("lora", "l", "A~value"), Key("lora", "l", "A~index")


@pytest.mark.parametrize("name", BAD)
def test_a_compressed_upload_that_is_none_is_refused(name: str) -> None:
    channel = Channel("fp32", None, (GUARDS["feedback"](share=0.5),))
    down = leaves(0)
    good = channel.up(leaves(1), down, {}, ORDER, Client("a", 1)).message
    assert channel.read(good, down, wire.expect(down)).keys() == down.keys()
    with pytest.raises(UploadError):
        channel.read(BAD[name](good), down, wire.expect(down))


def test_an_upload_as_large_as_without_compression_is_refused() -> None:
    """Well formed leaves, all of them declared, that a client has not compressed: it would spend the run's bandwidth."""
    channel = Channel("fp32", None, (GUARDS["feedback"](share=0.5),))
    down, up = leaves(0), leaves(1)
    with pytest.raises(UploadError, match="not compressed"):
        channel.read(Channel("fp32").up(up, down, {}, ORDER, Client("a", 1)).message, down, wire.expect(down))


@pytest.mark.parametrize(
    ("guards", "method", "said"),
    [
        (("trimmed",), "hetlora", "does not average leaves of one shape"),
        (("median",), "hetlora", "does not average leaves of one shape"),
        (("geomedian",), "flexlora", "does not average leaves of one shape"),
        (("krum",), "local", "uploads nothing"),
        (("trimmed",), "flexlora", "does not average leaves of one shape"),
        (("clip",), "local", "uploads nothing"),
        (("feedback",), "local", "uploads nothing"),
        (("clip", "clip"), "homlora", "each guard once"),
        (("clip",), "flora", "did not come down"),
        (("feedback",), "frlora", "did not come down"),
        (("bound",), "flora", "did not come down"),
        (("fedadam",), "hetlora", "no mean of leaves of one shape"),
    ],
)
def test_what_cannot_be_served_is_refused_with_its_reason(guards: Any, method: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        sampling = Sampling(guards=[GUARDS[g]() for g in guards])
        tiny.federation(METHODS[method](), tmp_path, sampling=sampling)
    with pytest.raises(ConfigError, match="norm of its leaves"):
        tiny.federation(METHODS["hetlora"](share="first"), tmp_path, sampling=Sampling(guards=[GUARDS["clip"]()]))


class Momentum(Guard):
    """A guard whose state is the server's, for the laws about that."""

    name, title = "momentum", "Server momentum"

    def settle(self, new: ServerState, old: ServerState, state: Params) -> tuple[ServerState, Params]:
        m = {k: 0.9 * state.get(k, torch.zeros_like(v)) + v - old.params[k] for k, v in new.params.items()}
        return replace(new, params={k: old.params[k] + v for k, v in m.items()}), m


def test_the_servers_guards_resume_and_no_method_or_client_sees_their_state(tmp_path: Path) -> None:
    settings = SHORT | {"sampling": Sampling(rounds=3, guards=(Momentum(),))}
    whole = tiny.federation(TABLE["fedsa"].method, tmp_path / "a", **settings)
    whole.run()
    broken = tiny.federation(TABLE["fedsa"].method, tmp_path / "b", **settings)
    with pytest.raises(KeyboardInterrupt):
        broken.run(tiny.Crash(broken))
    tiny.federation(TABLE["fedsa"].method, tmp_path / "b", **settings).run()
    a, b = (f.store.load_server() for f in (whole, broken))
    assert a is not None and b is not None
    tiny.close(a[1], b[1], 0.0)
    server = ServerState.restored(*a)
    assert server.guards and not any(GUARD in k.adapter for k in server.params)
    down = whole.method.broadcast(whole.context, server, whole.client(0))
    assert not any(GUARD in k.adapter for k in down)
    plain = tiny.federation(TABLE["fedsa"].method, tmp_path / "c", **SHORT | {"sampling": Sampling(rounds=3)})
    plain.run()
    assert any(not torch.equal(v, state(plain)[0][k]) for k, v in server.params.items())
