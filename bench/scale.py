"""What the machinery around training costs: orchestration, a million registered clients, and the server's sums.

python bench/scale.py: trains nothing (a step returns what it got). Writes bench/results/scale.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from fedlora.bench.run import environment
from fedlora.data.batches import LocalWork
from fedlora.data.examples import Arrays, Rows
from fedlora.data.federated import FederatedData
from fedlora.federation.callbacks import Callback
from fedlora.federation.run import Federation
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods.average import HomLoRA
from fedlora.methods.contract import Metrics, Work
from fedlora.model.adapted import Adapted
from fedlora.training.loss import Loss
from fedlora.training.optimizers import SGD
from fedlora.training.tasks.classification import Classification
from fedlora.tree import Key, Params, factor, factor_product, mean

WIDTH, LAYERS = 384, 24  # two leaves each: 48 leaves, 1.2 MB at rank 16


@dataclass(frozen=True)
class Idle(HomLoRA):
    """HomLoRA that does not train."""

    def step(self, work: Work, loss: Loss, lr: torch.Tensor, *draws: Any) -> tuple[Work, Metrics]:
        return work, {"loss": torch.zeros(len(lr))}


class Net(torch.nn.Module):
    """So many square layers."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x[..., :2]


def federation(
    folder: Path, clients: int, cohort: int, rank: int = 16, width: int = WIDTH, layers: int = LAYERS
) -> Federation:
    net = Net(width, layers)
    groups = {"target": [f"layers.{i}" for i in range(layers)]}
    model = Adapted(net, groups, call=lambda net, batch: net(batch["x"]))
    rows = Rows(np.arange(clients + 1, dtype=np.int64), np.zeros(clients, np.int64))
    examples = Arrays({"x": np.zeros((1, width), np.float32), "labels": np.zeros(1, np.int64)})
    data = FederatedData(examples, [f"client-{i}" for i in range(clients)], {"train": rows})
    method = Idle(rank=rank, head="frozen", optimizer=SGD(0.1))
    return Federation(
        model, Classification(2), data, method, folder, plan=LocalWork(1, None, 1), block=32,
        sampling=Sampling(rounds=10**6, clients_per_round=cohort), evaluation=Evaluation(every=10**6, exactness=False),
    )  # fmt: skip


class Stop(Exception):
    """Enough rounds."""


class Timer(Callback):
    """Seconds of each round; ends the run after `rounds`."""

    def __init__(self, rounds: int):
        self.rounds = rounds
        self.seconds: list[float] = []
        self.last = time.perf_counter()

    def round_start(self, round: int, clients: int) -> None:
        self.last = time.perf_counter()

    def round_done(self, round: int, facts: dict[str, Any]) -> None:
        self.seconds.append(time.perf_counter() - self.last)
        if len(self.seconds) >= self.rounds:
            raise Stop


def rounds(fed: Federation, n: int) -> list[float]:
    timer = Timer(n + 1)
    with contextlib.suppress(Stop):
        fed.run(timer)
    return timer.seconds[1:]


def orchestration(folder: Path) -> dict[str, Any]:
    """Milliseconds of a client-round with training removed: the engine's round, and with the commit of a round to disk."""
    fed = federation(folder / "o", 64, 32)
    whole = [s / 32 * 1e3 for s in rounds(fed, 10)]
    engine, server, cohort = fed.engine(Callback()), fed.method.init(fed.context), fed.cohort(0)
    bare = [s / 32 * 1e3 for s in (timed(lambda: engine.round(server, 10, cohort), 0.5) for _ in range(3))]
    return {"leaves": 2 * LAYERS, "bytes": 2 * LAYERS * 16 * WIDTH * 4, "cohort": 32, "ms_per_client_round": statistics.median(bare),
            "spread": [min(bare), max(bare)], "ms_with_commit_to_disk": statistics.median(whole)}  # fmt: skip


def memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(x, y, 1)[0])


def registered(folder: Path) -> dict[str, Any]:
    """Start-up and memory against registered clients; seconds of a round against the sample, rank and width."""
    starts, sizes, counts = [], [], [1_000, 250_000, 1_000_000]
    for n in counts:
        before, t = memory(), time.perf_counter()
        fed = federation(folder / f"r{n}", n, 1000, rank=1, width=16, layers=2)
        fed.cohort(0)
        starts.append(time.perf_counter() - t)
        sizes.append(memory() - before)
        del fed
    big = federation(folder / "big", 1_000_000, 1000, rank=1, width=16, layers=2)
    sample = [100, 300, 1000]
    by_sample = []
    for n in sample:
        big.sampling = dataclasses.replace(big.sampling, clients_per_round=n)
        by_sample.append(statistics.median(rounds(dataclasses.replace(big, output=folder / f"s{n}"), 3)))
    files = sum(1 for p in (folder / "s1000").rglob("*") if p.is_file())
    ranks, by_rank = [4, 16, 64], []
    for r in ranks:
        by_rank.append(statistics.median(rounds(federation(folder / f"k{r}", 64, 32, rank=r), 4)))
    widths, by_width = [192, 384, 768], []
    for w in widths:
        by_width.append(statistics.median(rounds(federation(folder / f"w{w}", 64, 32, width=w), 4)))
    return {
        "clients": counts, "start_seconds": starts, "bytes_per_client": slope(counts, sizes), "growth_bytes": sizes,
        "sample": sample, "round_seconds": by_sample, "ms_per_sampled_client": slope(sample, by_sample) * 1e3, "files": files,
        "rank": ranks, "round_seconds_by_rank": by_rank, "width": widths, "round_seconds_by_width": by_width,
    }  # fmt: skip


def timed(f: Callable[[], Any], least: float = 0.5) -> float:
    """Median seconds of a call, over calls that fill `least` seconds."""
    f()
    found: list[float] = []
    while sum(found) < least or len(found) < 3:
        t = time.perf_counter()
        f()
        found.append(time.perf_counter() - t)
    return statistics.median(found)


def server() -> dict[str, Any]:
    """FlexLoRA on stacked factors beside a dense SVD, in alternation; and the streaming mean beside a copy of memory."""
    g = torch.Generator().manual_seed(0)
    n, k, r = 1024, 10, 8
    b = [torch.randn(n, r, generator=g) for _ in range(k)]
    a = [torch.randn(r, n, generator=g) for _ in range(k)]

    def stacked() -> tuple[torch.Tensor, torch.Tensor]:
        return factor_product(torch.cat([x / k for x in b], 1), torch.cat(a), r)

    def dense() -> tuple[torch.Tensor, torch.Tensor]:
        return factor(sum((x @ y for x, y in zip(b, a, strict=True)), torch.zeros(n, n)) / k, r)

    fast, slow = [], []
    for _ in range(3):
        fast.append(timed(stacked, 0.3))
        slow.append(timed(dense, 0.0))
    (b1, a1), (b2, a2) = stacked(), dense()
    gap = float((b1 @ a1 - b2 @ a2).norm() / (b2 @ a2).norm())
    tree: Params = {Key("lora", str(i), "A"): torch.randn(4096, 256, generator=g) for i in range(24)}
    size = sum(v.numel() * 4 for v in tree.values())
    means = timed(lambda: mean((tree, 1.0) for _ in range(8)), 1.0) / 8
    source, target = torch.randn(size // 4), torch.empty(size // 4)
    copy = timed(lambda: target.copy_(source), 0.5)
    add = timed(lambda: target.add_(source, alpha=0.5), 0.5)
    return {
        "flexlora": {"size": n, "clients": k, "rank": r, "stacked_seconds": fast, "dense_seconds": slow,
                     "times_faster": [s / f for s, f in zip(slow, fast, strict=True)], "relative_difference": gap},
        "mean": {"bytes": size, "gigabytes_per_second": size / means / 1e9, "copy": size / copy / 1e9, "add": size / add / 1e9,
                 "share_of_add": add / means},
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {"orchestration": orchestration(folder), "registered": registered(folder), "server": server()}
    out = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent / "results" / "scale.json"
    out.write_text(json.dumps({"environment": environment(1), **found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
