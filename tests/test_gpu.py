"""Every method on a real accelerator; skipped where there is none. `make gpu` runs them first.

The oracle is the same run on the host. tests/test_device.py looks for stray tensors without an accelerator.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from test_contract import TABLE, state

from fedlora.federation.engine import Schedule, train_block
from fedlora.federation.run import Federation
from fedlora.methods.contract import Method, RoundInfo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch can use")
SINGLE = 2e-3  # single precision after a run: an optimizer's first steps divide by gradients that are nearly 0


def there(method: Method, folder: Path, device: str) -> Federation:
    base = tiny.bert(dropout=0.2).to(device)
    return tiny.federation(method, folder, base)


@pytest.fixture(autouse=True)
def exact() -> None:
    """Products in single precision as they are on the host."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("name", TABLE)
def test_a_run_is_the_hosts(name: str, tmp_path: Path) -> None:
    """Three rounds with dropout end at the same leaves on either device; an interrupted run on the GPU goes on bit for bit."""
    runs = {d: there(TABLE[name].method, tmp_path / d, d) for d in ("cpu", "cuda")}
    for f in runs.values():
        f.run()
    (a, kept_a, _), (b, kept_b, _) = state(runs["cpu"]), state(runs["cuda"])
    tiny.close(a, b, SINGLE)
    for id in kept_a:
        tiny.close(kept_a[id], kept_b[id], SINGLE)
    broken = there(TABLE[name].method, tmp_path / "broken", "cuda")
    with pytest.raises(KeyboardInterrupt):
        broken.run(tiny.Crash(broken))
    again = there(TABLE[name].method, tmp_path / "broken", "cuda")
    again.run()
    (c, kept_c, _) = state(again)
    tiny.close(b, c, 0.0)
    for id in kept_b:
        tiny.close(kept_b[id], kept_c[id], 0.0)


def waits(name: str, folder: Path) -> list[str]:
    """Where our code waits for the device during the local steps of a block, a place a wait.

    transformers waits twice a forward pass: it looks whether a mask is needed.
    """
    f = there(TABLE[name].method, folder, "cuda")
    info, m = RoundInfo(0, 3), f.method
    clients = [f.client(i) for i in range(3)]
    server = m.init(f.context)
    down = [m.broadcast(f.context, server, c) for c in clients]
    kept = [m.keep(f.context, c) for c in clients]
    batches = [f.batches(c, info, m.draws_for(down[0])) for c in clients]
    steps = max(len(b) // m.draws_for(down[0]) for b in batches)

    def once(upto: int) -> list[str]:
        short = [b[: upto * m.draws_for(down[0])] for b in batches]
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train_block(m, f.context, f.loss, info, down, kept, short, Schedule())
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [f"{w.filename}:{w.lineno}" for w in found if "synchroniz" in str(w.message) and "fedlora" in w.filename]

    once(steps)
    few, many = once(1), once(steps)
    for place in few:
        many.remove(place)
    return many


@pytest.mark.parametrize("name", ("homlora", "fedsa", "hetlora", "pf2lora", "sft"))
def test_no_step_waits_for_the_device(name: str, tmp_path: Path) -> None:
    """What a block does once, such as fetching the uploads, may wait; further steps of it may not."""
    assert waits(name, tmp_path) == []


def test_bf16_learns_what_fp32_learns(tmp_path: Path) -> None:
    """The frozen base in bf16 with fused attention: losses of three rounds are those of the fp32 base within its rounding."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny.bert().to("cuda", dtype)
        base.config._attn_implementation = "sdpa"
        f = tiny.federation(TABLE["homlora"].method, tmp_path / str(dtype), base)
        f.run()
        found[dtype] = [float(v.norm()) for v in state(f)[0].values()]
    assert all(math.isclose(a, b, rel_tol=0.1, abs_tol=0.05) for a, b in zip(*found.values(), strict=True))
