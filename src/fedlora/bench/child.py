"""One system in a process of its own: `python -m fedlora.bench.child SYSTEM WORK`. Requests and answers are lines of JSON."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = "@fedlora "  # what other lines of standard output do not start with


def _peft(dtype: str, keeps: bool = False) -> Callable[[Any], Any]:
    def make(work: Any) -> Any:
        from .peft_loop import PeftLoop

        return PeftLoop(work, dtype, keeps)

    return make


def _fedlora(block: int | None, dtype: str) -> Callable[[Any], Any]:
    def make(work: Any) -> Any:
        from .systems import Fedlora

        return Fedlora(work, block, dtype)

    return make


def _flower(cached: bool) -> Callable[[Any], Any]:
    def make(work: Any) -> Any:
        from .flower_sim import FlowerSimulation

        return FlowerSimulation(work, cached)

    return make


def _pfl(work: Any) -> Any:
    from .pfl_sim import PflSimulation

    return PflSimulation(work)


# The loop is plain PyTorch with PEFT's layers; bf16 is the base's dtype; kept: freed memory stays with the process.
SYSTEMS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "peft": ("PEFT loop, fp32", _peft("fp32")),
    "peft-bf16": ("PEFT loop, bf16", _peft("bf16")),
    "peft-bf16-kept": ("PEFT loop, bf16, kept", _peft("bf16", keeps=True)),
    "flower": ("Flower, model per call", _flower(False)),
    "flower-cached": ("Flower, model kept", _flower(True)),
    "pfl": ("pfl-research, fp32", _pfl),
    "one": ("fedlora singly, fp32", _fedlora(1, "fp32")),
    "blocks": ("fedlora blocks, fp32", _fedlora(None, "fp32")),
    "one-bf16": ("fedlora singly, bf16", _fedlora(1, "bf16")),
    "blocks-bf16": ("fedlora blocks, bf16", _fedlora(None, "bf16")),
    "blocks-int8": ("fedlora blocks, int8", _fedlora(None, "int8")),
}


def wait(device: str) -> None:
    """Until the device has done what it was told: an accelerator works on after the call."""
    if device != "cpu":
        import torch

        torch.accelerator.synchronize(device)


LONG_ENOUGH = 0.25  # seconds of one product


def gemm(threads: int, device: str) -> dict[str, float]:
    """Peak of matrix products on this machine now, GFLOP/s, by dtype.

    Squares are doubled until one product takes LONG_ENOUGH seconds: a CPU without bf16 instructions would need minutes for the
    size at which one that has them is at its peak.
    """
    import torch

    torch.set_num_threads(threads)
    out = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        n, largest, best, took = 256, 2048 if device == "cpu" else 8192, 0.0, 0.0
        while n <= largest and took < LONG_ENOUGH:
            a = torch.randn(n, n, device=device).to(dtype)
            wait(device)
            seconds = []
            for _ in range(6 if took < LONG_ENOUGH / 8 else 3):  # the first also sets the operator up
                start = time.perf_counter()
                a @ a
                wait(device)
                seconds.append(time.perf_counter() - start)
            took = min(seconds)
            best, n = max(best, 2 * n**3 / took / 1e9), 2 * n
        out[name] = best
    return out


def allocated(device: str) -> int:
    """Most bytes of tensors on an accelerator so far; 0 on the CPU, whose processes are weighed from outside."""
    if device == "cpu":
        return 0
    import torch

    return int(torch.accelerator.max_memory_allocated(device))


def answer(**said: Any) -> None:
    sys.stdout.write(MARK + json.dumps(said) + "\n")
    sys.stdout.flush()


def main(name: str, raw: str) -> None:
    started = time.perf_counter()
    import torch

    from ..federation.memory import kept
    from .work import Work

    work = Work.from_json(json.loads(raw))
    torch.set_num_threads(work.threads)
    try:
        system = SYSTEMS[name][1](work)
    except ModuleNotFoundError as e:
        sys.exit(f"{e.name} is not installed; docs/performance.md says how a peer is")
    if work.device != "cpu":
        torch.accelerator.reset_peak_memory_stats(work.device)  # what making the start took is not counted
    ready = time.perf_counter() - started
    work.batches(0)  # reads and tokenises the texts, which is not a system's own cost
    answer(ready=ready)
    with kept() if system.keeps else contextlib.nullcontext():
        serve(work, system)


def serve(work: Any, system: Any) -> None:
    """Answer requests until "stop"."""
    from .work import tokens

    leaves: Any = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "round":
            batches = work.batches(request["round"])
            start = time.perf_counter()
            leaves = system.round(batches)
            wait(work.device)
            seconds = time.perf_counter() - start
            answer(seconds=seconds, tokens=tokens(batches), memory=allocated(work.device))
        elif request["do"] == "peak":
            answer(**gemm(work.threads, work.device))
        elif request["do"] == "save":
            from safetensors.torch import save_file

            save_file({n: v.float().cpu().contiguous() for n, v in leaves.items()}, Path(request["path"]))
            answer(saved=True)
        else:
            break


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
