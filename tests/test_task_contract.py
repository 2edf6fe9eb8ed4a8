"""The contract: every task that there is. A new task adds a file to fedlora/tasks and is held to this.

Labels are those that the task itself draws where only cost is measured.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_contract import state

import fedlora as fl
from fedlora.federation.callbacks import Callback
from fedlora.federation.run import Federation
from fedlora.federation.setting import Sampling
from fedlora.federation.views import scores, served
from fedlora.methods.contract import Method, ServerState
from fedlora.seeds import np_rng
from fedlora.training.batching import TOKENWISE, stack_batches
from fedlora.training.tasks import NAMES, TASKS, lower_is_better, made

OUTPUTS = 4


def base_of(name: str) -> Any:
    """The tiny model that transformers has for the task."""
    import transformers

    kind = TASKS[name]
    auto = getattr(transformers, kind.auto)
    small = {"vocab_size": tiny.VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32, "pad_token_id": 0, "attn_implementation": "eager", **kind.config(OUTPUTS)}  # fmt: skip
    config = transformers.BertConfig if kind.has_head else transformers.LlamaConfig
    return tiny.seeded(lambda: auto.from_config(config(**small)))


def setting(name: str, folder: Path, method: Method | None = None, **more: Any) -> Federation:
    """Four tiny clients with ragged rows."""
    goal, data = made(name, OUTPUTS), tiny.data()
    tokens = data.examples
    batch = tokens.collate(np.arange(len(tokens)))
    ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
    drawn = goal.drawn(ids, mask, np_rng("contract", name))
    if goal.tokenwise:
        tokens = dataclasses.replace(tokens, labels=None, tags=drawn[mask > 0])
    else:
        tokens = dataclasses.replace(tokens, labels=drawn)
    data = dataclasses.replace(data, examples=tokens, label_names=(), outputs=tuple(map(str, range(OUTPUTS))))
    model = tiny.adapt(base_of(name), name)
    method = method or fl.METHODS["homlora"](rank=4, optimizer=fl.AdamW(1e-2))
    f = tiny.federation(method, folder, model=model, data=data, **more)
    return dataclasses.replace(f, task=goal)


@pytest.mark.parametrize("name", NAMES)
class TestEveryTask:
    def test_a_block_is_one_by_one(self, name: str, tmp_path: Path) -> None:
        """Training and scores of ragged clients, also where gradients are accumulated."""
        one, four = (setting(name, tmp_path / str(b), block=b, accumulation=b // 2 + 1) for b in (1, 4))
        one.run()
        four.run()
        (a, _, lines), (b, _, others) = state(one), state(four)
        tiny.close(a, b, 5e-5)
        for x, y in zip(map(json.loads, lines.splitlines()), map(json.loads, others.splitlines()), strict=True):
            if x["kind"] == "eval":
                assert x["mean"] == pytest.approx(y["mean"], rel=1e-3, abs=1e-6)

    def test_loss_falls(self, name: str, tmp_path: Path) -> None:
        """Clients come to fit their own training rows better, although their labels are random."""
        method = fl.METHODS["local"](rank=4, optimizer=fl.AdamW(3e-2))
        f = setting(name, tmp_path, method, plan=fl.Plan(steps=25, batch_size=20), sampling=Sampling(rounds=2))
        f.run()

        def loss(server: ServerState) -> float:
            params = served(f, f.engine(Callback()), server, range(4), "personal")
            return sum(s["loss"] for s in scores(f, params, range(4), "train", 4).values()) / 4

        assert loss(ServerState(*f.store.load_server())) < 0.95 * loss(f.method.init(f.context))

    def test_the_loss_is_the_mean_over_terms(self, name: str, tmp_path: Path) -> None:
        """In a block, a client's loss is the sum of what its rows give alone by the number of their terms."""
        f = setting(name, tmp_path)
        rows = [f.data.splits["train"][k][: 2 + k] for k in range(4)]
        value = f.loss({}, stack_batches([f.data.examples.collate(r) for r in rows]))
        for k in range(4):
            total, terms = 0.0, 0.0
            for r in rows[k]:
                batch = f.data.examples.collate(np.array([r]))
                with torch.no_grad():
                    y = f.model.forward({}, {n: v[None] for n, v in batch.items()})[0]
                total += float(f.task.row_losses(y, batch["labels"])[0])
                terms += float(f.task.row_counts(batch["labels"])[0])
            assert float(value[k]) == pytest.approx(total / terms, rel=1e-4)

    def test_what_others_call_it(self, name: str, tmp_path: Path) -> None:
        """transformers and PEFT know the task; its loss there is its loss here, of one row with all its labels."""
        import transformers
        from peft import TaskType

        kind = TASKS[name]
        assert hasattr(transformers, kind.auto) and kind.peft_type in TaskType.__members__
        assert kind.kind == name and issubclass(kind, fl.Task)
        assert getattr(fl, kind.__name__) is kind
        assert made(name, OUTPUTS).leaves >= TOKENWISE - {"labels"}

    def test_scores(self, name: str, tmp_path: Path) -> None:
        """Every client has the metric that rounds are chosen by, alone as among others; one without rows has a loss of NaN."""
        from fedlora.evaluation.predictions import predict

        f = setting(name, tmp_path)
        rows = [f.data.splits["train"][k] for k in range(3)] + [np.zeros(0, np.int64)]
        found = predict(f.model, f.task, f.data, [{}] * 4, range(4), rows)
        each = f.task.scores(found)
        assert [s["n"] for s in each] == [len(r) for r in rows]
        for p, s in zip(found[:3], each, strict=False):
            assert math.isfinite(s[f.task.metric])
            assert f.task.scores([p])[0] == pytest.approx(s)
        assert math.isnan(each[3]["loss"])
        low = lower_is_better(f.task.metric)
        assert f.task.better(f.task.metric, 0.1, 0.2) is low
        assert f.task.better(f.task.metric, 0.2, 0.1) is not low
        assert not f.task.better(f.task.metric, math.nan, 0.1)
