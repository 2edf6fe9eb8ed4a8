"""Systems in alternation, in CPU seconds of one thread: what a change is worth on a machine that others use too.

    python bench/paired.py SOURCE K B [ROUNDS [MODEL [TASK]]]

SOURCE is a file of texts, e.g. ../shared/data/huffpost/train.parquet, or demo; K clients do a step of B rows each. The fp32 PyTorch + PEFT
loop is the reference; blocks in fp32 and bf16 come with PyTorch's operators ("plain") and with compiled ones. Other work is not counted,
but it empties the caches, so ratios on a busy machine are a little low.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from fedlora.bench.peft_loop import PeftLoop
from fedlora.bench.systems import Fedlora, System
from fedlora.bench.work import Regime, Work, tokens
from fedlora.federation.memory import kept


def main(
    source: str,
    k: str,
    b: str,
    rounds: str = "3",
    model: str = "minilm",
    task: str = "classification",
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    work = Work(model, task, source=source, regime=Regime("paired", int(k), 1, int(b)), threads=threads)
    systems: dict[str, System] = {
        "PEFT loop, fp32": PeftLoop(work, "fp32"),
        "blocks, fp32, plain": Fedlora(work, None, "fp32", compiled=False),
        "blocks, fp32": Fedlora(work, None, "fp32"),
        "blocks, bf16, plain": Fedlora(work, None, "bf16", compiled=False),
        "blocks, bf16": Fedlora(work, None, "bf16"),
    }
    seconds: dict[str, list[float]] = {n: [] for n in systems}
    with kept():
        for r in range(1 + int(rounds)):  # the first warms up
            batches = work.batches(r)
            for n, system in systems.items():
                start = time.process_time()
                system.round(batches)
                seconds[n].append(time.process_time() - start)
    for n, mine in seconds.items():
        ratios = sorted(a / b for a, b in zip(seconds["PEFT loop, fp32"][1:], mine[1:], strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(
            f"{n:20}{tokens(batches) / mine[-1]:8,.0f} tokens a CPU second in the last round, {spread} x the first",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:7])
