"""What the compiled operators bring: python bench/kernels.py SOURCE [REGIME [ROUNDS [MODEL]]].

SOURCE is a file of texts, e.g. ../shared/data/huffpost/train.parquet, or demo; REGIME small, middle (default) or large. Blocks with a
bf16 base by PyTorch's operators, by compiled ones on padded rows, and without padding, round by round in alternation.
"""

from __future__ import annotations

import sys
import time

import torch
from turns import take_turns

from fedlora import kernels
from fedlora.bench.systems import Fedlora
from fedlora.bench.work import REGIMES, Work

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
    take_turns(work, systems, WARM, int(rounds), time.perf_counter, "s")


if __name__ == "__main__":
    main(*sys.argv[1:5])
