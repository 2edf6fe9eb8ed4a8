"""Federated averaging of LoRA twice: in plain PyTorch and PEFT, and with fedlora. Both give the same numbers.

    python examples/fedavg_by_hand.py

Read `by_hand` to see what federated LoRA is: every client trains its own copy of the adapter, and the server averages
the copies. Read `with_fedlora` to see the same as a few objects, which bring the rest: other methods, many clients in
one forward pass, messages, evaluation, resuming and reports.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

import fedlora as fl
from fedlora.data.batches import train_batches

CLIENTS, ROUNDS, RANK, ALPHA, LR, SEED = 4, 3, 4, 8.0, 1e-2, 0
WORK = fl.Plan(steps=5, batch_size=8)  # what a client does in a round
INPUTS = ("input_ids", "attention_mask")


def small_base() -> BertForSequenceClassification:
    """A BERT of two layers with random weights: enough to compare numbers, and nothing to download."""
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # draw the weights from a fixed seed, and leave the global generator alone
        torch.manual_seed(SEED)
        return BertForSequenceClassification(config)


def some_data() -> fl.FederatedData:
    """300 rows of ten tokens, of which the first three tell the class; the clients' shares of the classes differ."""
    draw = np.random.default_rng(SEED)
    labels = draw.integers(0, 3, 300)
    tokens = draw.integers(4, 50, (300, 10))
    tokens[:, :3] = 10 * (labels[:, None] + 1)
    columns = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "labels": labels}
    return fl.from_arrays(columns, kind="dirichlet", clients=CLIENTS, alpha=0.5, min_size=20, seed=SEED)


def minibatches(data: fl.FederatedData, client: int, round: int) -> Iterator[dict[str, torch.Tensor]]:
    """The minibatches that fedlora gives a client in a round, so that both train on the same rows in the same order."""
    for batch in train_batches(data, client, WORK, 1, SEED, round, data.ids[client]):
        yield {name: batch[name] for name in (*INPUTS, "labels")}


def by_hand(base: torch.nn.Module, data: fl.FederatedData, first_a: dict[str, torch.Tensor]) -> tuple[Any, list[float]]:
    """FedAvg of LoRA and the head. first_a: where each layer's A starts, by layer. Returns the leaves and the losses."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = get_peft_model(copy.deepcopy(base), config)
    trained = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}
    server = {n: p.detach().clone() for n, p in trained.items()}
    for layer, a in first_a.items():
        server[f"{layer}.lora_A.default.weight"] = a
    rows = torch.tensor(data.splits["train"].sizes, dtype=torch.float32)
    losses = []
    for round in range(ROUNDS):
        uploads, said = [], []
        for client in range(CLIENTS):
            with torch.no_grad():  # the client starts from what the server sends
                for name, p in trained.items():
                    p.copy_(server[name])
            optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.0)
            for batch in minibatches(data, client, round):
                loss = model(**batch).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                said.append(loss.item())
            uploads.append({n: p.detach().clone() for n, p in trained.items()})
        share = rows / rows.sum()  # clients with more rows count for more
        server = {n: sum(w * u[n] for w, u in zip(share, uploads, strict=True)) for n in trained}
        losses.append(float(np.mean(said)))
    return server, losses


def with_fedlora(base: torch.nn.Module, data: fl.FederatedData, output: Path) -> tuple[fl.Federation, list[float]]:
    """The same as objects. The run's records, state and summary are in `output`."""
    model = fl.adapt(
        base,
        targets=["query", "value"],
        head=["classifier"],
        call=lambda net, batch: net(**{n: batch[n] for n in INPUTS}).logits,
    )
    method = fl.HomLoRA(rank=RANK, alpha=ALPHA, optimizer=fl.AdamW(LR))
    federation = fl.Federation(
        model, fl.Classification(3), data, method, output, plan=WORK, sampling=fl.Sampling(ROUNDS), seed=SEED
    )
    federation.run()
    lines = [json.loads(x) for x in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return federation, [x["loss"] for x in lines if x["kind"] == "train"]


def compare(output: Path) -> tuple[list[float], list[float], float]:
    """Losses by hand, losses with fedlora, and the largest difference between the trained leaves of the two."""
    data, base = some_data(), small_base()
    federation, losses = with_fedlora(copy.deepcopy(base), data, output)
    start = federation.method.init(federation.context).params  # A is drawn from the seed, B and the head's change are 0
    leaves, mine = by_hand(base, data, {k.layer: v for k, v in start.items() if k.part == "A"})
    _, params, _ = federation.store.load_server()
    furthest = 0.0
    for key, value in params.items():
        if key.adapter == "head":  # fedlora keeps the head as a change of the base's head
            theirs = leaves[f"{key.layer}.modules_to_save.default.{key.part}"] - base.get_parameter(
                f"{key.layer}.{key.part}"
            )
        else:
            theirs = leaves[f"{key.layer}.lora_{key.part}.default.weight"]
        furthest = max(furthest, (value - theirs.detach()).abs().max().item())
    return mine, losses, furthest


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        mine, losses, furthest = compare(Path(folder) / "run")
    for i, (a, b) in enumerate(zip(mine, losses, strict=True)):
        print(f"round {i + 1}: loss {a:.6f} by hand, {b:.6f} with fedlora")
    print(f"largest difference between the trained leaves: {furthest:.1e}")
