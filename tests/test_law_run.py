"""A whole run beside plain PyTorch: PEFT's layers, torch.optim, clip_grad_norm_, and loops over rounds and clients.

Planted bugs these tests kill: a schedule that begins again in every round; moments that are thrown away or kept unasked;
clipping by the largest client of a block; the same minibatches, or the same dropout masks, in every round.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from fedlora.data.batches import LocalWork
from fedlora.federation.engine import Schedule, train_block
from fedlora.federation.run import Federation
from fedlora.federation.setting import Sampling
from fedlora.methods import METHODS
from fedlora.methods.contract import RoundInfo
from fedlora.training.optimizers import SGD, AdamW
from fedlora.tree import Key

ROUNDS, RANK, ALPHA = 3, 4, 8


def cosine(progress: float) -> float:
    """Linear warm-up over a fifth of the run, then half a cosine."""
    return progress / 0.2 if progress < 0.2 else 0.5 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))


def linear(progress: float) -> float:
    return 1 - progress


def key(name: str) -> Key:
    """fedlora's name of a leaf, from PEFT's."""
    if "lora_" in name:
        layer, _, part = name.rpartition(".lora_")
        return Key("lora", layer, part[0])
    layer, _, part = name.rpartition(".")
    return Key("head", layer, part)


class Head(nn.Module):
    """A layer whose change from the base is trained, so that weight decay pulls to the base."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.weight = nn.Parameter(torch.zeros_like(base.weight))
        self.bias = nn.Parameter(torch.zeros_like(base.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.base.weight + self.weight, self.base.bias + self.bias)


def plain(
    f: Federation, personal: str, keep: bool, clip: float | None, pace: Any, make: Any
) -> dict[Key, torch.Tensor]:
    """The server's leaves after all rounds. personal: the leaves that stay with their client end with it ("-" for none)."""
    from peft import LoraConfig, get_peft_model

    layers = [s.name for s in f.context.layers("target")]
    model = get_peft_model(
        tiny.bert().double(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers, bias="none")
    ).base_model.model
    model.classifier = Head(model.classifier)
    leaves = {key(n): p for n, p in model.named_parameters() if p.requires_grad}
    start = f.method.init(f.context).params | f.method.keep(f.context, f.client(0))
    server = {k: start[k].double().clone() for k in leaves}
    own: dict[str, dict[Key, torch.Tensor]] = {}
    memory: dict[str, Any] = {}
    for r in range(ROUNDS):
        sums, rows = {k: torch.zeros_like(v) for k, v in server.items()}, 0
        for client in f.cohort(r):
            with torch.no_grad():
                for k, p in leaves.items():
                    p.copy_(own.get(client.id, {}).get(k, server[k]))
            optimizer = make(list(leaves.values()))
            if keep and client.id in memory:
                optimizer.load_state_dict(memory[client.id])
            rate = optimizer.param_groups[0]["lr"]
            batches = f.batches(client, RoundInfo(r, ROUNDS), 1)
            for t, batch in enumerate(batches):
                optimizer.param_groups[0]["lr"] = rate * pace((r + (t + 0.5) / len(batches)) / ROUNDS)
                optimizer.zero_grad()
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                nn.functional.cross_entropy(logits, batch["labels"]).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(leaves.values(), clip)
                optimizer.step()
            optimizer.param_groups[0]["lr"] = rate
            memory[client.id] = optimizer.state_dict()
            own[client.id] = {k: p.detach().clone() for k, p in leaves.items() if k.part == personal}
            for k, p in leaves.items():
                sums[k] += client.examples * p.detach()
            rows += client.examples
        server = {k: v / rows for k, v in sums.items()}
    return {k: v for k, v in server.items() if k.part != personal}


CASES = {
    "homlora": ("-", 0.5, ("cosine", 0.2, cosine), AdamW(1e-2, weight_decay=0.1),
                lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
    "fedsa": ("B", 0.3, ("linear", 0.0, linear), SGD(0.2, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("keep", [False, True])
def test_a_run_is_loops_over_rounds_and_clients(name: str, keep: bool, tmp_path: Path) -> None:
    """Blocks of four clients of unequal size, over three rounds: the server's leaves at the end are those of float64."""
    personal, clip, (kind, warmup, pace), optimizer, make = CASES[name]
    m = METHODS[name](
        rank=RANK, alpha=ALPHA, head="shared", optimizer=optimizer, clip=clip, moments="keep" if keep else "reset"
    )
    f = tiny.federation(
        m, tmp_path, tiny.bert().double(), sampling=Sampling(rounds=ROUNDS), schedule=Schedule(kind, warmup)
    )
    f.run()
    loaded = f.store.load_server()
    assert loaded is not None
    want = plain(f, personal, keep, clip, pace, make)
    tiny.close({k: loaded[1][k].double() for k in want}, want, 2e-6)


def test_the_lower_step_follows_the_schedule(tmp_path: Path) -> None:
    """PF2LoRA's a is a learning rate too: 0.45 of the way through a linear decay to 0 it moves a client's own adapter
    0.55 times as far."""

    def moved(kind: str) -> dict[Key, torch.Tensor]:
        m = METHODS["pf2lora"](rank=RANK, lr_personal=0.5, optimizer=SGD(0.0))
        f = tiny.federation(m, tmp_path / kind, plan=LocalWork(1, None, 8))
        client = f.client(3)
        down, kept = m.broadcast(f.context, m.init(f.context), client), m.keep(f.context, client)
        batches = f.batches(client, RoundInfo(0, 10), m.draws)
        [done] = train_block(m, f.context, f.loss, RoundInfo(4, 10), [down], [kept], [batches], Schedule(kind))
        return {k: done.kept[k] - v for k, v in kept.items() if k.adapter == "personal"}

    whole, half = moved("constant"), moved("linear")
    assert any(v.any() for v in whole.values())
    for k, v in whole.items():
        torch.testing.assert_close(half[k], 0.55 * v, rtol=1e-4, atol=1e-4 * float(v.abs().max()))


@pytest.mark.parametrize("name", ["homlora", "pf2lora", "centralized"])
def test_every_round_has_minibatches_and_dropout_masks_of_its_own(name: str, tmp_path: Path) -> None:
    """No two rows of a run have the same seed of their masks, and no two rounds of a client the same order of rows."""
    m = METHODS[name](rank=RANK)
    f = tiny.federation(m, tmp_path, tiny.bert(dropout=0.1), plan=LocalWork(None, 1.0, 4))
    client = f.cohort(0)[-1]
    rounds = [f.batches(client, RoundInfo(r, 5), m.draws) for r in range(5)]
    seeds = np.concatenate([b["seed"].numpy() for batches in rounds for b in batches])
    assert len(set(seeds.tolist())) == len(seeds)
    assert len({int(b["common"]) for batches in rounds for b in batches}) == sum(map(len, rounds))
    orders = [tuple(tuple(row) for b in batches for row in b["input_ids"].tolist()) for batches in rounds]
    assert len(set(orders)) == 5
    if m.draws == 1:  # a pass has every row once, and no others
        assert len({tuple(sorted(t for row in o for t in row if t)) for o in orders}) == 1
