"""Where the time of a block's round goes: python bench/block_profile.py SOURCE [REGIME] [DTYPE] [MODEL].

SOURCE is a file of texts, e.g. ../shared/data/huffpost/train.parquet, or demo; REGIME small, middle (default) or large.

Self time of operators, by what they are for; what is left of the round is Python, autograd's bookkeeping and the optimizer.
"""

from __future__ import annotations

import sys
import time

import torch
from torch.profiler import ProfilerActivity, profile

from fedlora.bench.systems import Fedlora
from fedlora.bench.work import REGIMES, Work, tokens
from fedlora.federation.memory import kept

# Entries of 4 bytes, touched and freed: the profiler's records come to lie between freed blocks, and without room page faults count.
ROOM = 1_000_000_000
KINDS = {
    "products of the base": ("aten::addmm", "aten::mm", "mkldnn::_linear_pointwise"),
    "compiled attention": ("Attention", "AttentionBackward"),
    "batched products (adapters, eager attention)": ("aten::bmm", "aten::baddbmm", "aten::baddbmm_"),
    "GELU": ("aten::gelu", "aten::gelu_backward", "ActivationBackward"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::index_select", "aten::fill_", "aten::masked_fill_"),
    "sums and scalings": ("aten::add", "aten::add_", "aten::mul", "aten::mul_", "aten::div", "aten::sum"),
    "layer norm": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data"),
}


def main(source: str, regime: str = "middle", dtype: str = "bf16", model: str = "minilm", threads: int = 2) -> None:
    torch.set_num_threads(threads)
    work = Work(model, source=source, regime=REGIMES[regime], threads=threads)
    system = Fedlora(work, None, dtype)
    with kept():
        torch.ones(ROOM)
        for r in range(3):
            system.round(work.batches(r))
        batches, start = work.batches(3), time.perf_counter()
        system.round(batches)
        seconds = time.perf_counter() - start
        with profile(activities=[ProfilerActivity.CPU]) as p:
            system.round(batches)
    spent = {e.key: e.self_cpu_time_total / 1e6 for e in p.key_averages()}
    whole = sum(spent.values())
    print(f"{regime}, {dtype}: {tokens(batches) / seconds:,.0f} real tokens/s; {len(spent)} kinds of operators")
    left = whole
    for name, operators in KINDS.items():
        found = sum(spent.get(o, 0.0) for o in operators)
        left -= found
        print(f"{found / whole:6.1%}  {name}")
    print(f"{left / whole:6.1%}  the rest")


if __name__ == "__main__":
    main(*sys.argv[1:5])
