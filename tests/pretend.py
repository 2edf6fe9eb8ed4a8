"""Every method's local work on a device that is not the host's, without having one: `python tests/pretend.py`.

Fake tensors have a device, a shape and a type and no data; an operator that meets two devices raises, as it would on a GPU.
Prints one JSON object: row of the contract's table -> what went wrong, "" for nothing. In a process of its own, because a
device's name is registered for good.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import tiny
import torch
from test_contract import TABLE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from fedlora.federation.engine import _to, _to_batch
from fedlora.methods.contract import Client, Context, Method, RoundInfo
from fedlora.model.adapted import Batch
from fedlora.training.batching import stack_batches
from fedlora.training.loss import Loss
from fedlora.training.tasks.classification import Classification
from fedlora.tree import Params, stack

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend", 0)
CLIENTS = 3


def move(base: nn.Module, mode: FakeTensorMode) -> None:
    """The module's tensors are fake and there."""
    for m in base.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(mode.from_tensor(p.detach()).to(DEVICE), requires_grad=False)
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = mode.from_tensor(b).to(DEVICE)


def rows(seed: int) -> Batch:
    """Without a mask, whose values a fake tensor cannot tell."""
    g = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(4, tiny.VOCABULARY, (4, 6), generator=g),
        "labels": torch.randint(0, tiny.CLASSES, (4,), generator=g),
        "seed": torch.arange(4),
    }


def work(method: Method) -> None:
    """Two steps of three clients, all of them alive."""
    model = tiny.adapt(tiny.bert(dropout=0.2), needs=method.groups)
    context = Context(model.groups, 0)
    server, clients = method.init(context), [Client(str(i), CLIENTS) for i in range(CLIENTS)]
    down = [method.broadcast(context, server, c) if method.per_client else server.params for c in clients]
    kept = [method.keep(context, c) for c in clients]
    draws = [stack_batches([rows(method.draws * i + d) for i in range(CLIENTS)]) for d in range(method.draws)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def there(p: Params) -> Params:
            return _to({k: mode.from_tensor(v) for k, v in p.items()}, DEVICE)

        move(model.base, mode)
        loss = Loss(model, Classification(tiny.CLASSES))
        state = method.begin(context, RoundInfo(1, 3), there(stack(down)), there(stack(kept)))
        batches = [_to_batch({n: mode.from_tensor(v) for n, v in d.items()}, DEVICE) for d in draws]
        for _ in range(2):
            state, _ = method.step(state, loss, torch.ones(CLIENTS, dtype=torch.float64), *batches)
        up, mine = method.finish(state)
        for k, v in (up | mine | method.served(state)).items():
            assert k.part == "steps" or v.device == DEVICE, f"{k} is on {v.device}"


def main() -> None:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name, row in TABLE.items():
        try:
            work(row.method)
            found[name] = ""
        except Exception as e:
            found[name] = f"{type(e).__name__}: {e}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
