"""What the compiled operators bring: python bench/kernels.py SOURCE [REGIME [ROUNDS [MODEL]]].

SOURCE is a file of texts, e.g. ../shared/data/huffpost/train.parquet, or demo; REGIME small, middle (default) or large. Blocks with a
bf16 base by PyTorch's operators, by compiled ones on padded rows, and without padding, round by round in alternation.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from fedlora import kernels
from fedlora.bench.systems import Fedlora
from fedlora.bench.work import REGIMES, Work, tokens
from fedlora.federation.memory import kept

WARM = 2  # rounds before those that are measured


def main(source: str, regime: str = "middle", rounds: str = "4", model: str = "minilm", threads: int = 2) -> None:
    if why := kernels.missing():
        sys.exit(f"no compiled operators: {why}")
    torch.set_num_threads(threads)
    work = Work(model, source=source, regime=REGIMES[regime], threads=threads)
    systems = {
        "PyTorch's": Fedlora(work, None, "bf16", compiled=False),
        "compiled, padded": Fedlora(work, None, "bf16"),
        "compiled": Fedlora(work, None, "bf16"),
    }
    padded = systems["compiled, padded"].loss.model.compiled
    assert padded is not None
    padded.stack.clear()
    seconds: dict[str, list[float]] = {n: [] for n in systems}
    with kept():
        for r in range(WARM + int(rounds)):
            batches = work.batches(r)
            for n, system in systems.items():
                start = time.perf_counter()
                system.round(batches)
                seconds[n].append(time.perf_counter() - start)
    for n, mine in seconds.items():
        ratios = sorted(a / b for a, b in zip(seconds["PyTorch's"][WARM:], mine[WARM:], strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(f"{n:18}{tokens(batches) / mine[-1]:8,.0f} tokens/s in the last round, {spread} x the first", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5])
