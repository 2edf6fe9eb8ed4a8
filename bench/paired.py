"""Systems in alternation, in CPU seconds of one thread: what a change is worth on a machine that others use too.

    python bench/paired.py SOURCE K B [ROUNDS [MODEL [TASK]]]

SOURCE is a file of texts, e.g. ../shared/data/huffpost/train.parquet, or demo; K clients do a step of B rows each. The fp32 PyTorch + PEFT
loop is the reference; blocks in fp32 and bf16 come with PyTorch's operators ("plain") and with compiled ones, and on an int8 base. Other work is not counted,
but it empties the caches, so ratios on a busy machine are a little low.
"""

from __future__ import annotations

import sys
import time

import torch
from turns import take_turns

from fedlora.bench.peft_loop import PeftLoop
from fedlora.bench.systems import Fedlora, System
from fedlora.bench.work import Regime, Work


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
        "blocks, int8": Fedlora(work, None, "int8"),
    }
    take_turns(work, systems, 1, int(rounds), time.process_time, "CPU second")


if __name__ == "__main__":
    main(*sys.argv[1:7])
