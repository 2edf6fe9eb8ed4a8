"""The contract: every method, one table row each. A new method adds a row to TABLE and nothing else.

A row: the method at test size, and the parts its client uploads (adapter.part), written down by hand.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch

from fedlora.adapters import KINDS
from fedlora.data.batches import LocalWork
from fedlora.errors import FedloraError
from fedlora.federation import wire
from fedlora.federation.callbacks import Callback
from fedlora.federation.engine import Schedule, train_block
from fedlora.federation.run import Federation
from fedlora.federation.setting import Sampling
from fedlora.federation.views import scores, served
from fedlora.methods import METHODS
from fedlora.methods.contract import Method, RoundInfo, ServerState
from fedlora.training.optimizers import SGD, AdamW
from fedlora.tree import Params, stack

HEAD = "head.weight head.bias"


@dataclass(frozen=True)
class Row:
    method: Method
    uploads: str


TABLE = {
    "centralized": Row(METHODS["centralized"](rank=4, optimizer=AdamW(1e-2)), f"lora.A lora.B {HEAD}"),
    "local": Row(METHODS["local"](rank=4, optimizer=AdamW(1e-2)), ""),
    "fedavg-ft": Row(METHODS["fedavg-ft"](rank=4, tune=2, optimizer=AdamW(1e-2)), f"lora.A lora.B {HEAD}"),
    "homlora": Row(METHODS["homlora"](rank=4, optimizer=AdamW(1e-2), weights="uniform"), f"lora.A lora.B {HEAD}"),
    "homlora-moments": Row(METHODS["homlora"](rank=4, optimizer=AdamW(1e-2), moments="keep"), f"lora.A lora.B {HEAD}"),
    "ffa": Row(METHODS["ffa"](rank=4, optimizer=SGD(0.2, momentum=0.9)), f"lora.B {HEAD}"),
    "fedsa": Row(METHODS["fedsa"](rank=4, optimizer=AdamW(1e-2)), f"lora.A {HEAD}"),
    "fedsa-personal-head": Row(METHODS["fedsa"](rank=4, head="personal", optimizer=AdamW(1e-2)), "lora.A"),
    "fedsa-rslora": Row(METHODS["fedsa"](rank=4, adapter="rslora", head="frozen", optimizer=AdamW(1e-2)), "lora.A"),
    "homlora-dora": Row(
        METHODS["homlora"](rank=4, adapter="dora", optimizer=AdamW(1e-2)), f"lora.A lora.B lora.m {HEAD}"
    ),
    "ffa-dora": Row(METHODS["ffa"](rank=4, adapter="dora", optimizer=AdamW(3e-2)), f"lora.B lora.m {HEAD}"),
    "fedsa-dora": Row(METHODS["fedsa"](rank=4, adapter="dora", head="personal", optimizer=AdamW(1e-2)), "lora.A"),
    "fedsa-vera": Row(METHODS["fedsa"](rank=16, adapter="vera", optimizer=AdamW(5e-2)), f"lora.d {HEAD}"),
    "homlora-pissa": Row(METHODS["homlora"](rank=4, adapter="pissa", optimizer=AdamW(1e-2)), f"lora.dA lora.dB {HEAD}"),
    "fedsa-pissa": Row(METHODS["fedsa"](rank=4, adapter="pissa", head="personal", optimizer=AdamW(1e-2)), "lora.dA"),
    "homlora-ia3": Row(METHODS["homlora"](adapter="ia3", optimizer=AdamW(3e-2)), f"lora.l_out lora.l_in {HEAD}"),
    "share-b": Row(METHODS["share-b"](rank=4, optimizer=AdamW(1e-2), clip=1.0), f"lora.B {HEAD}"),
    "hetlora": Row(
        METHODS["hetlora"](rank=8, gamma=0.7, lam=0.5, optimizer=AdamW(1e-2)), f"lora.A lora.B lora.rank {HEAD}"
    ),
    "hetlora-by-site": Row(
        METHODS["hetlora"](
            rank=8, gamma=0.7, lam=0.5, norms="site", decide="site", plan="power", moments="keep", optimizer=AdamW(1e-2)
        ),
        f"lora.A lora.B lora.rank {HEAD}",
    ),
    "hetlora-fedsa": Row(
        METHODS["hetlora"](rank=8, gamma=0.7, lam=0.5, share="first", head="personal", optimizer=AdamW(1e-2)),
        "lora.A lora.rank lora.norm",
    ),
    "flexlora": Row(METHODS["flexlora"](rank=4, optimizer=AdamW(1e-2)), f"lora.A lora.B lora.rank {HEAD}"),
    "flexlora-holders": Row(
        METHODS["flexlora"](rank=4, padding="holders", optimizer=AdamW(1e-2)), f"lora.A lora.B lora.rank {HEAD}"
    ),
    "fedprox": Row(METHODS["fedprox"](rank=4, mu=1e-3, optimizer=AdamW(1e-2)), f"lora.A lora.B {HEAD}"),
    "fedalt": Row(METHODS["fedalt"](rank=4, optimizer=AdamW(1e-2)), f"sent.A sent.B {HEAD}"),
    "ditto": Row(METHODS["ditto"](rank=4, optimizer=AdamW(1e-2)), f"lora.A lora.B {HEAD}"),
    "fedrep": Row(METHODS["fedrep"](rank=4, head_steps=1, optimizer=AdamW(1e-2)), "lora.A lora.B"),
    "scaffold": Row(
        METHODS["scaffold"](rank=4, head="personal", optimizer=SGD(0.2)), "lora.A lora.B control.cA control.cB"
    ),
    "perfedavg": Row(METHODS["perfedavg"](rank=4, lr_personal=0.1, optimizer=AdamW(1e-2)), f"lora.A lora.B {HEAD}"),
    "perfedavg-first-order": Row(
        METHODS["perfedavg"](rank=4, hypergradient="first_order", moments="keep", optimizer=AdamW(1e-2)),
        f"lora.A lora.B {HEAD}",
    ),
    "feddpa-t": Row(METHODS["feddpa-t"](rank=4, optimizer=AdamW(1e-2)), f"global.A global.B {HEAD}"),
    "feddpa-f": Row(METHODS["feddpa-f"](rank=4, tune=3, optimizer=AdamW(1e-2)), f"global.A global.B {HEAD}"),
    "pf2lora": Row(METHODS["pf2lora"](rank=4, lr_personal=0.1, optimizer=AdamW(1e-2)), f"common.A common.B {HEAD}"),
    "pf2lora-first-order": Row(
        METHODS["pf2lora"](
            rank=4,
            hypergradient="first_order",
            batches="shared",
            moments="keep",
            head="personal",
            optimizer=AdamW(1e-2),
        ),
        "common.A common.B",
    ),
    "pf2lora-finite-difference": Row(
        METHODS["pf2lora"](rank=4, hypergradient="finite_difference", optimizer=AdamW(1e-2)),
        f"common.A common.B {HEAD}",
    ),
    "pf2hetlora": Row(
        METHODS["pf2hetlora"](rank=8, gamma=0.7, lam=0.5, lr_personal=0.1, moments="keep", optimizer=AdamW(1e-2)),
        f"common.A common.B common.rank {HEAD}",
    ),
    "slora": Row(
        METHODS["slora"](rank=4, density=0.1, sparse_rounds=2, optimizer=AdamW(1e-2)), f"sparse.values {HEAD}"
    ),
    "slora-keep": Row(
        METHODS["slora"](
            rank=4, density=0.1, sparse_rounds=1, base="keep", split="B", layers="all", optimizer=AdamW(1e-2)
        ),
        f"sparse.values {HEAD}",
    ),
    "slora-pf2lora": Row(
        METHODS["slora"](
            rank=4, density=0.1, sparse_rounds=1, second=METHODS["pf2lora"](), head="personal", optimizer=AdamW(1e-2)
        ),
        "sparse.values",
    ),
    "rolora": Row(METHODS["rolora"](rank=4, optimizer=AdamW(1e-2)), f"lora.B {HEAD}"),
    "fedsvd": Row(METHODS["fedsvd"](rank=4, optimizer=AdamW(3e-2)), f"lora.B {HEAD}"),
    "flora": Row(METHODS["flora"](rank=4, optimizer=AdamW(1e-2)), f"lora.A lora.B lora.rank {HEAD}"),
    "flora-mixed": Row(
        METHODS["flora"](rank=4, plan="uniform", head="personal", optimizer=AdamW(1e-2)), "lora.A lora.B lora.rank"
    ),
    "fedex": Row(METHODS["fedex"](rank=4, optimizer=AdamW(1e-2)), f"lora.A lora.B {HEAD}"),
    "frlora": Row(METHODS["frlora"](rank=4, optimizer=AdamW(1e-2)), f"lora.dA lora.dB {HEAD}"),
    "lora-fair": Row(METHODS["lora-fair"](rank=4, optimizer=AdamW(1e-2)), f"lora.A lora.B {HEAD}"),
    "fedrot": Row(METHODS["fedrot"](rank=4, optimizer=AdamW(1e-2)), f"lora.A lora.B {HEAD}"),
    "fedrot-client": Row(METHODS["fedrot"](rank=4, where="client", optimizer=AdamW(1e-2)), f"lora.A lora.B {HEAD}"),
    "florist": Row(METHODS["florist"](rank=6, tau=0.8, optimizer=AdamW(1e-2)), f"lora.A lora.B lora.rank {HEAD}"),
    "fedsb": Row(METHODS["fedsb"](rank=8, optimizer=AdamW(3e-2)), f"lora.R {HEAD}"),
    "fedsb-random": Row(
        METHODS["fedsb"](rank=8, adapter="lora-xs-random", head="personal", optimizer=AdamW(5e-2)), "lora.R"
    ),
    "fft": Row(METHODS["fft"](optimizer=AdamW(1e-3)), f"full.weight full.bias full.gain full.table {HEAD}"),
    "sft": Row(METHODS["sft"](density=0.1, optimizer=AdamW(3e-2, weight_decay=0.1)), f"sparse.values {HEAD}"),
    "bitfit": Row(METHODS["bitfit"](optimizer=AdamW(1e-2)), f"bitfit.bias {HEAD}"),
    "houlsby": Row(
        METHODS["houlsby"](rank=4, optimizer=AdamW(1e-2)),
        f"bottleneck.down bottleneck.up bottleneck.down_bias bottleneck.up_bias {HEAD}",
    ),
    "pfeiffer": Row(
        METHODS["pfeiffer"](rank=4, optimizer=AdamW(3e-2)),
        f"bottleneck.down bottleneck.up bottleneck.down_bias bottleneck.up_bias {HEAD}",
    ),
    "local-houlsby": Row(METHODS["local"](rank=4, adapter="houlsby", optimizer=AdamW(1e-2)), ""),
}


def test_every_method_has_a_row() -> None:
    assert {row.method.name for row in TABLE.values()} == set(METHODS)


def test_every_delta_form_has_a_row() -> None:
    forms = {type(form) for row in TABLE.values() if (form := getattr(row.method, "form", None)) is not None}
    assert forms == set(KINDS)


def state(f: Federation) -> tuple[Params, dict[str, Params], str]:
    """All that a run leaves behind: server leaves, client leaves, metrics."""
    loaded = f.store.load_server()
    assert loaded is not None
    round, params, _ = loaded
    kept = {id: f.store.load_client(id, round) or {} for id in f.data.ids}
    return params, kept, (f.store.root / "metrics.jsonl").read_text(encoding="utf-8")


# Variants of methods whose own row is quick: their laws are quick as well.
SLOW = ("flora-mixed", "fedrot-client", "fedsb-random", "flexlora-holders")
NAMES = [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in TABLE]


@pytest.mark.parametrize("name", NAMES)
class TestEveryMethod:
    def test_block_equals_one_by_one(self, name: str, tmp_path: Path) -> None:
        """Clients of unequal length trained in one block == one at a time, dropout included."""
        one = tiny.federation(TABLE[name].method, tmp_path / "1", tiny.bert(dropout=0.2), block=1)
        all_ = tiny.federation(TABLE[name].method, tmp_path / "4", tiny.bert(dropout=0.2), block=4)
        one.run()
        all_.run()
        (a, kept_a, _), (b, kept_b, _) = state(one), state(all_)
        near = (
            5e-5 if name == "ditto" else 2e-5
        )  # Ditto takes twice the steps, and AdamW carries rounding from each to the next
        tiny.close(a, b, near)
        for id in kept_a:
            tiny.close(kept_a[id], kept_b[id], near)

    def test_crash_and_resume_is_bit_exact(self, name: str, tmp_path: Path) -> None:
        """Crash in the middle of round 2, after some client files are written; resume == never crashed."""
        whole = tiny.federation(TABLE[name].method, tmp_path / "a", tiny.bert(dropout=0.2), block=2)
        whole.run()
        broken = tiny.federation(TABLE[name].method, tmp_path / "b", tiny.bert(dropout=0.2), block=2)
        with pytest.raises(KeyboardInterrupt):
            broken.run(tiny.Crash(broken))
        again = tiny.federation(TABLE[name].method, tmp_path / "b", tiny.bert(dropout=0.2), block=2)
        again.run()
        (a, kept_a, lines_a), (b, kept_b, lines_b) = state(whole), state(again)
        tiny.close(a, b, 0.0)
        for id in kept_a:
            tiny.close(kept_a[id], kept_b[id], 0.0)
        assert lines_a == lines_b

    def test_only_declared_leaves_leave(self, name: str, tmp_path: Path) -> None:
        """The encoded upload holds exactly the parts of the table; nothing uploaded is also kept; all that trains is one of
        the two."""
        m, f = TABLE[name].method, tiny.federation(TABLE[name].method, tmp_path)
        client = f.client(3)
        server = m.init(f.context)
        down, kept = m.broadcast(f.context, server, client), m.keep(f.context, client)
        info = RoundInfo(0, 3)
        [done] = train_block(m, f.context, f.loss, info, [down], [kept], [f.batches(client, info, m.draws)], Schedule())
        sent, _ = wire.decode(wire.encode(done.upload))
        assert {f"{k.adapter}.{k.part}" for k in sent} == set(TABLE[name].uploads.split())
        assert not sent.keys() & done.kept.keys()
        start = down | kept
        moved = [
            k
            for k, v in (done.upload | done.kept).items()
            if k in start and "~" not in k.adapter and not torch.equal(v, start[k])
        ]
        assert moved

    def test_starts_at_the_base_model(self, name: str, tmp_path: Path) -> None:
        m, f = TABLE[name].method, tiny.federation(TABLE[name].method, tmp_path)
        client = f.client(0)
        ready = m.personal(
            f.context, stack([m.broadcast(f.context, m.init(f.context), client)]), stack([m.keep(f.context, client)])
        )
        batch = {n: v[None] for n, v in f.data.examples.collate(f.data.splits["train"][0]).items()}
        assert ready
        torch.testing.assert_close(f.model.forward(ready, batch), f.model.forward({}, batch), rtol=0, atol=0)

    def test_loss_falls(self, name: str, tmp_path: Path) -> None:
        """The served models fit their clients' own training rows better after six rounds than before."""
        settings = {"sampling": Sampling(rounds=6), "plan": LocalWork(steps=8, batch_size=5)}
        f = tiny.federation(TABLE[name].method, tmp_path, **settings)
        engine, everybody = f.engine(Callback()), [0, 1, 2, 3]

        def loss(server: ServerState) -> float:
            found = scores(f, served(f, engine, server, everybody, "personal"), everybody, "train", 4)
            return sum(s["loss"] for s in found.values()) / 4

        f.run()
        before, after = loss(f.method.init(f.context)), loss(ServerState(*f.store.load_server()))
        assert after < before - 0.01, (before, after)

    def test_personal_leaves_are_personal(self, name: str, tmp_path: Path) -> None:
        """After a round, personal leaves differ between clients and an unsampled client has none of the round's."""
        f = tiny.federation(TABLE[name].method, tmp_path, sampling=Sampling(rounds=1, clients_per_round=3))
        f.run()
        if f.method.pooled:
            return
        sampled = {c.id for c in f.cohort(0)}
        kept = {id: f.store.load_client(id, 1) for id in f.data.ids}
        has_private = bool(f.method.keep(f.context, f.client(0)))
        assert {id for id, p in kept.items() if p} == (sampled if has_private else set())
        mine = [p for p in kept.values() if p]
        for a, b in itertools.pairwise(mine):
            assert any(not torch.equal(a[k], b[k]) for k in a if k.part != "steps")

    def test_refuses_bad_input(self, name: str, tmp_path: Path) -> None:
        m = TABLE[name].method
        with pytest.raises(FedloraError, match=r"rank: got 0, expected an integer from 1"):
            dataclasses.replace(m, rank=0)
        if getattr(m, "adapter", "") in ("lora", "rslora") and m.name != "sft":
            f = tiny.federation(dataclasses.replace(m, rank=64), tmp_path)
            with pytest.raises(FedloraError, match=r"rank 64 exceeds the layer .*16 x 16"):
                m_big = f.method
                m_big.keep(f.context, f.client(0))
                m_big.init(f.context)

    def test_is_printable_and_hashable(self, name: str, tmp_path: Path) -> None:
        m = TABLE[name].method
        assert m.title and type(m).__name__ in repr(m)
        assert hash(m) == hash(dataclasses.replace(m))
        assert dataclasses.replace(m) == m
