"""Nothing of a frozen base changes, whatever its layers do in training mode (conftest.py watches the base of every run).

Kills: statistics of a user's own layers that mix clients; a base that changes unseen; every module switched at every step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_contract import TABLE
from torch import Tensor, nn

from fedlora.errors import ModelError
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods.average import HomLoRA


class Counter(nn.Module):
    """Scales by what it has counted, a buffer: in training mode alone, or always."""

    calls: Tensor

    def __init__(self, always: bool, persistent: bool = True) -> None:
        super().__init__()
        self.always = always
        self.register_buffer("calls", torch.ones(()), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.always:
            self.calls = self.calls + 1
        return x / self.calls.detach()


def base(layer: nn.Module) -> Any:
    """A BERT with a layer more below its classifier, and dropout."""
    found = tiny.bert(dropout=0.1)
    found.bert.pooler.activation = nn.Sequential(layer, nn.Tanh())
    return found


def norm(kind: type[nn.Module] = nn.BatchNorm1d) -> nn.Module:
    found = kind(16)
    found.running_mean.fill_(0.1)  # type: ignore[operator]
    found.running_var.fill_(0.3)  # type: ignore[operator]
    return found


# One of each way of training: one tree, leaves of each client, hypergradients, tuning, stages, pooled rows.
SOME = ("homlora", "fedsa", "pf2lora", "fedavg-ft", "slora", "centralized")
short: dict[str, Any] = {"sampling": Sampling(rounds=1), "evaluation": Evaluation(views=("personal",))}


@pytest.mark.parametrize("name", SOME)
def test_running_statistics_stay(name: str, tmp_path: Path) -> None:
    """Block equals one by one, and the base is the same to its last bit."""
    found = []
    for block in (1, 4):
        own = base(norm())
        before = {n: v.clone() for n, v in own.state_dict().items()}
        f = tiny.federation(TABLE[name].method, tmp_path / str(block), own, block=block, **short)
        f.run()
        tiny.close(before, own.state_dict(), 0.0)
        found.append(f.store.load_server()[1])  # type: ignore[index]
    tiny.close(*found)


@pytest.mark.parametrize("layer", [norm(nn.SyncBatchNorm), Counter(False)], ids=["sync", "own"])
def test_any_layer_that_changes_in_training_is_kept_from_it(layer: nn.Module, tmp_path: Path) -> None:
    own = base(layer)
    f = tiny.federation(HomLoRA(rank=2), tmp_path, own, **short)
    f.run()
    assert all(torch.equal(v, v.round()) or n.startswith("running") for n, v in layer.named_buffers())
    assert not isinstance(layer, Counter) or layer.calls == 1


def test_a_layer_that_always_changes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"activation\.0\.calls', a buffer of Counter, changes whenever"):
        tiny.federation(HomLoRA(rank=2), tmp_path / "a", base(Counter(True)), **short).run()
    tiny.federation(HomLoRA(rank=2), tmp_path / "b", base(Counter(True, persistent=False)), **short).run()


def test_statistics_of_the_batch_at_hand_are_refused() -> None:
    """They mix the clients of a block in evaluation too."""
    with pytest.raises(ModelError, match=r"activation\.0' is a BatchNorm1d without running statistics"):
        tiny.adapt(base(nn.BatchNorm1d(16, track_running_stats=False)))


def test_a_step_walks_through_no_tree_of_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what drops is in training mode within the step, and in evaluation mode after it."""
    model = tiny.adapt(base(norm()))
    monkeypatch.setattr(nn.Module, "train", lambda *a: pytest.fail("all modules are switched"))
    with model.training({"seed": torch.zeros(1, 2, dtype=torch.int64)}):
        on = {type(m).__name__ for m in model.base.modules() if m.training}
        assert {"Dropout", "BertSelfAttention"} <= on and not {"Linear", "LayerNorm", "Embedding", "BatchNorm1d"} & on
    assert not any(m.training for m in model.base.modules())
