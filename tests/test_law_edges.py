"""Laws at the edges: who owns a head, which model is global, what a stage keeps, who is unseen, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from fedlora.data.batches import LocalWork
from fedlora.data.federated import from_arrays
from fedlora.errors import TrainingError
from fedlora.federation import views
from fedlora.federation.callbacks import Callback
from fedlora.federation.engine import Schedule, train_block
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.federation.views import scores, served, whole
from fedlora.methods import METHODS
from fedlora.methods.contract import RoundInfo, ServerState
from fedlora.serving.export import deltas_of
from fedlora.training.optimizers import SGD, AdamW
from fedlora.tree import Key, Params


def after(f: Any) -> ServerState:
    """The server of the last committed round."""
    loaded = f.store.load_server()
    assert loaded is not None
    return ServerState.restored(*loaded)


# heads --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("head", ["shared", "personal", "frozen"])
@pytest.mark.parametrize("name", ["centralized", "local", "homlora", "fedsa"])
def test_what_was_trained_is_what_is_served(name: str, head: Any, tmp_path: Path) -> None:
    """The loss that a client's served model has on its training rows is the one that training ended with, not that of a
    head that nobody trained."""
    m = METHODS[name](rank=4, head=head, optimizer=AdamW(2e-2))
    f = tiny.federation(m, tmp_path, sampling=Sampling(rounds=4), plan=LocalWork(8, None, 8))
    engine, everybody = f.engine(Callback()), [0, 1, 2, 3]

    def loss(server: ServerState) -> float:
        found = scores(f, served(f, engine, server, everybody, "personal"), everybody, "train", 4)
        return sum(s["loss"] * s["n"] for s in found.values()) / sum(s["n"] for s in found.values())

    before = loss(m.init(f.context))
    f.run()
    text = (f.store.root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    trained = [x["loss"] for x in map(json.loads, text) if x["kind"] == "train"]
    assert loss(after(f)) < before - 0.01
    assert loss(after(f)) < trained[0]


# global models ------------------------------------------------------------------------------------------------------
def products(p: Params, adapters: set[str]) -> dict[str, torch.Tensor]:
    """layer -> B A, float64, summed over adapters."""
    out: dict[str, torch.Tensor] = {}
    for k, a in p.items():
        if k.part == "A" and k.adapter in adapters:
            out[k.layer] = out.get(k.layer, 0) + p[k._replace(part="B")].double() @ a.double()  # type: ignore[assignment]
    return out


@pytest.mark.parametrize("name", ["hetlora", "flexlora", "pf2hetlora"])
def test_the_global_model_is_not_cut_to_a_clients_rank(name: str, tmp_path: Path) -> None:
    """alpha / r_max times the server's whole B A, however low the first client's rank is."""
    m = METHODS[name](rank=8, alpha=12, plan="explicit", ranks=(("c0", 3), ("*", 8)), rank_min=3, optimizer=AdamW(2e-2))
    f = tiny.federation(m, tmp_path, sampling=Sampling(rounds=2))
    f.run()
    server = after(f)
    label = "common" if name == "pf2hetlora" else "lora"
    got = products(deltas_of(f, None, "last"), {label})
    for layer, want in products(server.params, {label}).items():
        assert torch.linalg.matrix_rank(want) > 3
        torch.testing.assert_close(got[layer], want * 12 / 8, rtol=1e-5, atol=1e-6)


def test_the_global_and_an_unseen_model_have_the_global_adapter_whole(tmp_path: Path) -> None:
    """FedDPA-T mixes a client's own adapter with the global one; where there is no own one there is nothing to mix."""
    m = METHODS["feddpa-t"](rank=4, mix=0.25, optimizer=AdamW(2e-2))
    f = tiny.federation(m, tmp_path, data=tiny.data(unseen=1), sampling=Sampling(rounds=2))
    f.run()
    server, engine = after(f), f.engine(Callback())
    want = {layer: 4.0 * v for layer, v in products(server.params, {"global"}).items()}  # s = alpha / r = 16 / 4
    for found in (
        served(f, engine, server, [0], "global")[0],
        served(f, engine, server, [3], "unseen")[0],
        whole(f, engine, server),
    ):
        for layer, v in products(found, {"global"}).items():
            torch.testing.assert_close(v, want[layer], rtol=1e-5, atol=1e-7)
    mixed = served(f, engine, server, [0], "personal")[0]
    for layer, v in products(mixed, {"global"}).items():
        torch.testing.assert_close(v, 0.75 * want[layer], rtol=1e-5, atol=1e-7)


# stages -------------------------------------------------------------------------------------------------------------
def test_a_second_stage_counts_its_own_steps(tmp_path: Path) -> None:
    """AdamW's bias correction is of the moments that there are: those of the mask end with it."""
    m = METHODS["slora"](rank=4, density=0.2, sparse_rounds=2, moments="keep", optimizer=AdamW(1e-2))
    f = tiny.federation(m, tmp_path, sampling=Sampling(rounds=3), plan=LocalWork(5, None, 4))
    f.run()
    for id in f.data.ids:
        kept = f.store.load_client(id, 3)
        assert kept is not None
        assert not any(k.adapter.startswith("sparse") for k in kept)
        assert float(kept[Key("~t", "", "steps")]) == 5


def test_a_stage_takes_the_rows_that_its_method_takes(tmp_path: Path) -> None:
    """Before the hand-over, SLoRA with PF2LoRA behind it sees an epoch as sparse fine-tuning sees it."""

    def tokens(name: str, **options: Any) -> list[int]:
        m = METHODS[name](rank=4, density=0.2, optimizer=AdamW(1e-2), **options)
        f = tiny.federation(m, tmp_path / name, plan=LocalWork(None, 1.0, 4), sampling=Sampling(rounds=2))
        f.run()
        lines = (f.store.root / "timings.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(x)["tokens"] for x in lines]

    sparse = tokens("sft")
    staged = tokens("slora", sparse_rounds=2, second=METHODS["pf2lora"]())
    assert staged == sparse


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.5, 0.7, 0.85, 0.9, 0.99, 1.0])
def test_a_pruned_rank_is_the_floor_in_exact_arithmetic(gamma: float) -> None:
    m: Any = METHODS["hetlora"](rank=200, gamma=gamma)
    ranks = torch.arange(1, 201)
    want = [floor(Fraction(str(gamma)) * r) for r in ranks.tolist()]
    assert m.head_of(ranks).tolist() == want


# refusals -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["local", "fedsa"])
def test_a_client_whose_kept_leaves_are_no_numbers_is_refused(name: str, tmp_path: Path) -> None:
    """Also where its upload is fine, or where it uploads nothing; its last good leaves stay."""
    m = METHODS[name](rank=4, head="personal", optimizer=SGD(1e37))
    f = tiny.federation(m, tmp_path, sampling=Sampling(rounds=2), plan=LocalWork(3, None, 4))
    with pytest.raises(TrainingError, match="non-finite"):
        f.run()
    assert all(f.store.load_client(id, 9) is None for id in f.data.ids)


def test_clipping_reaches_the_lower_step(tmp_path: Path) -> None:
    """One step of PF2LoRA moves a client's own adapter by a times the bound, where it would move further without."""

    def moved(clip: float | None) -> float:
        m = METHODS["pf2lora"](rank=4, lr_personal=0.5, clip=clip, optimizer=SGD(0.0))
        f = tiny.federation(m, tmp_path / str(clip), plan=LocalWork(1, None, 8))
        client, info = f.client(3), RoundInfo(0, 1)
        down, kept = m.broadcast(f.context, m.init(f.context), client), m.keep(f.context, client)
        [done] = train_block(m, f.context, f.loss, info, [down], [kept], [f.batches(client, info, m.draws)], Schedule())
        return float(
            torch.stack([(done.kept[k] - v).norm() for k, v in kept.items() if k.adapter == "personal"]).norm()
        )

    free = moved(None)
    assert free > 0
    norm = free / 0.5
    # clip_grad_norm_ of PyTorch adds 1e-6 to the norm by which it divides
    assert moved(norm / 10) == pytest.approx(0.5 * norm / 10 * norm / (norm + 1e-6), rel=1e-3)


# who takes part -----------------------------------------------------------------------------------------------------
def test_all_of_the_clients_is_a_share_too() -> None:
    assert Sampling(clients_per_round=1.0).size(40) == 40
    assert Sampling(clients_per_round=0.5).size(40) == 20
    assert Sampling(clients_per_round=1).size(40) == 1


@pytest.mark.parametrize("kind", ["label-sorting", "classes", "dirichlet", "iid"])
def test_unseen_clients_have_no_classes_of_their_own(kind: str) -> None:
    """They are drawn from all clients, so that what they hold is trained elsewhere."""
    labels = np.repeat(np.arange(3), 120)
    drawn = set()
    for seed in range(6):
        options = {"share": 1.0} if kind == "label-sorting" else {}
        d = from_arrays({"x": labels[:, None].astype(np.float32), "labels": labels}, kind, 9, seed, unseen=2, **options)
        assert d.unseen == 2 and len(set(d.ids)) == 9
        trained = d.histogram("train")[:-2].sum(0)
        if kind != "dirichlet":
            assert (trained > 0).all()
        drawn |= set(d.ids[-2:])
    assert len(drawn) > 2


# evaluation ---------------------------------------------------------------------------------------------------------
def test_evaluation_holds_a_block_of_models_and_only_of_clients_with_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tiny.data(12)
    f = tiny.federation(
        METHODS["fedsa"](rank=4),
        tmp_path,
        data=replace(few, splits=few.splits | {"train": tiny.rows([np.array([k]) for k in range(12)])}),
        block=3,
        evaluation=Evaluation(views=("personal", "global")),
    )
    empty = replace(f.data, splits={s: r if s == "train" else tiny.rows([r[k] if k % 2 else r[k][:0] for k in range(12)])
                                    for s, r in f.data.splits.items()})  # fmt: skip
    f.enrol(empty)
    asked: list[list[int]] = []
    real = views.served
    monkeypatch.setattr(
        views, "served", lambda f, e, s, clients, view: asked.append(list(clients)) or real(f, e, s, clients, view)
    )
    lines = views.evaluate(f, f.engine(Callback()), f.method.init(f.context))
    assert max(map(len, asked)) <= 3
    assert {k for part in asked for k in part} == {1, 3, 5, 7, 9, 11}
    assert all(set(x.clients) == {f"c{k}" for k in (1, 3, 5, 7, 9, 11)} for x in lines)  # type: ignore[attr-defined]
