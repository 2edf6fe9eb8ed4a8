"""One command for a GPU: `make gpu`, or python bench/gpu.py [--device cpu --quick] [--output FOLDER].

First the device tests (tests/test_gpu.py), then speed and memory of blocks on two shapes with random weights, whose values
do not change the time: an encoder of MPNet's size and a small language model of SmolLM2's. Writes gpu.json and gpu.html.
A loop of PyTorch and PEFT over one client after another is measured beside it, in the same process and in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_page import write
from torch import nn

from fedlora.bench.child import gemm, wait
from fedlora.bench.run import environment
from fedlora.errors import FedloraError
from fedlora.federation.engine import Schedule, train_block
from fedlora.methods import METHODS
from fedlora.methods.contract import Client, Context, RoundInfo
from fedlora.model.adapted import Adapted, Batch
from fedlora.model.groups import groups
from fedlora.model.targets import matching
from fedlora.seeds import np_rng
from fedlora.training.loss import Loss
from fedlora.training.optimizers import AdamW
from fedlora.training.tasks import made
from fedlora.tree import Params

ROOT = Path(__file__).resolve().parents[1]
LR, RANK, ALPHA = 1e-3, 8, 16.0
MEAN, SPREAD, LEAST, MOST = 43, 17, 4, 128  # tokens of a row, normally distributed
STEPS, REPEATS = 4, 3
CLIENTS = (1, 2, 4, 8, 16, 32, 64)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A base with random weights. rows: of a minibatch; config: of transformers, in words of its own."""

    name: str
    task: str
    targets: tuple[str, ...]
    rows: int
    kind: str
    config: dict[str, Any]

    def base(self, dtype: str, device: str) -> nn.Module:
        """The same weights on every call."""
        import transformers

        known = transformers.AutoConfig.for_model(self.kind, **self.config)
        auto = getattr(transformers, type(made(self.task, 2)).auto)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            base: nn.Module = auto.from_config(known, trust_remote_code=False)
        return base.to(device, DTYPES[dtype]).eval()


SHAPES = (
    Shape("MPNet-base", "classification", ("q", "v"), 8, "mpnet", {"num_labels": 20}),
    Shape("SmolLM2-135M", "causal-lm", ("q_proj", "v_proj"), 4, "llama",
          {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 8192, "pad_token_id": 2}),
)  # fmt: skip
QUICK = (
    Shape("tiny encoder", "classification", ("q", "v"), 2, "mpnet",
          {"num_labels": 3, "vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}),
    Shape("tiny language model", "causal-lm", ("q_proj", "v_proj"), 2, "llama",
          {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
           "num_key_value_heads": 1, "pad_token_id": 2}),
)  # fmt: skip


def batches(shape: Shape, vocabulary: int, clients: int, round: int) -> list[list[Batch]]:
    """[client][step], each batch padded to its longest row."""
    g, goal = np_rng(0, "gpu bench", round), made(shape.task, 3)
    out = []
    for _ in range(clients):
        mine = []
        for _ in range(STEPS):
            lengths = g.normal(MEAN, SPREAD, shape.rows).round().clip(LEAST, MOST).astype(int)
            ids = g.integers(3, vocabulary, (shape.rows, lengths.max()))
            mask = (np.arange(lengths.max())[None] < lengths[:, None]).astype(np.int64)
            leaves = {"input_ids": ids * mask, "attention_mask": mask, "labels": goal.drawn(ids, mask, g)}
            mine.append({n: torch.from_numpy(v) for n, v in leaves.items()})
        out.append(mine)
    return out


def tokens(work: list[list[Batch]]) -> int:
    return sum(int(b["attention_mask"].sum()) for mine in work for b in mine)


class Ours:
    """This library: HomLoRA, clients in blocks of `block`."""

    def __init__(self, shape: Shape, dtype: str, device: str):
        base: Any = shape.base(dtype, device)
        inside = list(matching(base, list(shape.targets)))
        self.method = METHODS["homlora"](rank=RANK, alpha=ALPHA, weights="uniform", optimizer=AdamW(LR), head="frozen")
        model = Adapted(base, groups(self.method.groups, base, shape.kind, inside, ()), dropout=False)
        self.context, self.goal = Context(model.groups, 0), made(shape.task, 3)
        self.server, self.loss = self.method.init(self.context), Loss(model, self.goal)
        self.vocabulary, self.base = base.config.vocab_size, base

    def round(self, work: list[list[Batch]], block: int) -> list[Params]:
        """The uploads of all clients."""
        out = []
        for i in range(0, len(work), block):
            part = work[i : i + block]
            kept = [self.method.keep(self.context, Client(str(i + j), 1)) for j in range(len(part))]
            down = [self.server.params] * len(part)
            done = train_block(self.method, self.context, self.loss, RoundInfo(0, 1), down, kept, part, Schedule())
            out += [d.upload for d in done]
        return out


class PeftLoop:
    """The fair opponent: PEFT's layers, torch.optim.AdamW (its fused form on a GPU), one client after another."""

    def __init__(self, ours: Ours, shape: Shape, dtype: str, device: str):
        from peft import LoraConfig, get_peft_model

        base: Any = shape.base(dtype, device)
        self.model: Any = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(shape.targets)))
        self.model.eval()
        self.leaves = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        for p in self.leaves.values():
            p.data = p.data.float()
        start = {str(k): v for k, v in ours.server.params.items()}
        self.start = {n: start[_ours(n)].to(device) for n in self.leaves}
        self.device, self.half, self.goal = device, dtype == "bf16", ours.goal

    def round(self, work: list[list[Batch]]) -> list[dict[str, torch.Tensor]]:
        return [self.train(mine) for mine in work]

    def train(self, mine: list[Batch]) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            for n, p in self.leaves.items():
                p.copy_(self.start[n])
        fused = {"fused": True} if self.device.startswith("cuda") else {}
        optimizer = torch.optim.AdamW(self.leaves.values(), lr=LR, weight_decay=0.0, **fused)
        for b in mine:
            there = {n: v.to(self.device, non_blocking=True) for n, v in b.items()}
            labels = there.pop("labels")
            with torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.half):
                y = self.model(**there).logits
            each, counts = self.goal.row_losses(y, labels), self.goal.row_counts(labels)
            (each.sum() / counts.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {_ours(n): p.detach().cpu().clone() for n, p in self.leaves.items()}


def _ours(name: str) -> str:
    """base_model.model.X.lora_A.default.weight -> lora/X/A."""
    layer, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
    return f"lora/{layer}/{rest[0]}"


def timed(do: Callable[[], Any], device: str) -> tuple[float, int]:
    """(seconds, most bytes of tensors on the device)."""
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    wait(device)
    start = time.perf_counter()
    do()
    wait(device)
    seconds = time.perf_counter() - start
    return seconds, int(torch.accelerator.max_memory_allocated(device)) if device != "cpu" else 0


def flops(base: nn.Module) -> float:
    """Forward and backward of the frozen linear layers for one token, no weight gradients: 4 times their weights."""
    return 4.0 * sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear))


def kernels_share(do: Callable[[], Any], device: str) -> float | None:
    """Share of the time in which the device computes; None on the CPU."""
    if not device.startswith("cuda"):
        return None
    from torch.profiler import ProfilerActivity, profile

    seconds, _ = timed(do, device)
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        do()
        wait(device)
    return min(1.0, sum(e.self_device_time_total for e in p.key_averages()) / 1e6 / seconds)


def waits(do: Callable[[], Any], device: str) -> dict[str, int] | None:
    """How often the host waits for the device, by place in the code; None on the CPU."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            do()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    out: dict[str, int] = {}
    for w in found:
        if "synchroniz" in str(w.message):
            place = f"{Path(w.filename).name}:{w.lineno}"
            out[place] = out.get(place, 0) + 1
    return out


def difference(a: list[Params], b: list[dict[str, torch.Tensor]], start: Params) -> float:
    """How far two systems' leaves are from each other, as a share of how far training has moved them; over all clients.

    Not the largest difference: where a gradient is nearly 0, AdamW's step has the sign of a rounding error.
    """
    apart = moved = 0.0
    for p, q in zip(a, b, strict=True):
        for k, v in p.items():
            apart += float((v - q[str(k)]).double().square().sum())
            moved += float((v - start[k]).double().square().sum())
    return (apart / moved) ** 0.5


def measure(
    shape: Shape, dtype: str, device: str, counts: tuple[int, ...], say: Callable[[str], None]
) -> dict[str, Any]:
    """Speed and memory of one base in one dtype. Every system has a warm round; then they take turns."""
    ours = Ours(shape, dtype, device)
    loop = PeftLoop(ours, shape, dtype, device)
    few = min(4, max(counts))
    work = batches(shape, ours.vocabulary, few, 0)
    blocks, singly, peft = ours.round(work, few), ours.round(work, 1), loop.round(work)
    out: dict[str, Any] = {
        "shape": shape.name, "dtype": dtype, "rows": shape.rows, "steps": STEPS,
        "block_difference": difference(blocks, [{str(k): v for k, v in p.items()} for p in singly], ours.server.params),
        "loop_difference": difference(blocks, peft, ours.server.params),
        "attention": getattr(ours.base.config, "_attn_implementation", ""), "k": {}, "one": [], "loop": [],
    }  # fmt: skip
    for r in range(1, REPEATS + 1):
        work = batches(shape, ours.vocabulary, few, r)
        for name, do in (("one", partial(ours.round, work, 1)), ("loop", partial(loop.round, work))):
            seconds, memory = timed(do, device)
            out[name].append({"seconds": seconds, "tokens": tokens(work), "memory": memory})
    del loop
    for k in counts:
        rounds = []
        for r in range(REPEATS + 1):
            work = batches(shape, ours.vocabulary, k, 10 + r)
            seconds, memory = timed(partial(ours.round, work, k), device)
            rounds.append({"seconds": seconds, "tokens": tokens(work), "memory": memory})
        out["k"][str(k)] = rounds[1:]  # the first warms the allocator up
        speed = statistics.median(x["tokens"] / x["seconds"] for x in rounds[1:])
        say(f"{shape.name} {dtype} K={k}: {speed:,.0f} tokens/s, {max(x['memory'] for x in rounds) / 1e9:.2f} GB")
    out["waits"] = waits(partial(ours.round, batches(shape, ours.vocabulary, few, 99), few), device)
    out["busy"] = {
        str(k): kernels_share(partial(ours.round, batches(shape, ours.vocabulary, k, 98), k), device)
        for k in sorted({1, few, max(counts)})
    }
    out["flops_per_token"] = flops(ours.base)
    return out


def tests(device: str) -> dict[str, Any]:
    """The device tests in a process of their own, several at once where pytest-xdist is there."""
    if not device.startswith("cuda"):
        return {"ran": False, "why": f"{device} is no GPU"}
    from importlib.util import find_spec

    many = ["-n", "8"] if find_spec("xdist") else []
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *many, str(ROOT / "tests/test_gpu.py")],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    return {"ran": True, "passed": done.returncode == 0, "summary": lines[-1] if lines else done.stderr[-500:],
            "failures": [x for x in lines if x.startswith(("FAILED", "ERROR"))], "output": "" if not done.returncode else done.stdout[-6000:],
            "seconds": time.perf_counter() - start}  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--quick", action="store_true", help="tiny shapes: the whole path in seconds, on any device")
    p.add_argument("--output", type=Path, default=ROOT / "bench/results")
    p.add_argument("--skip-tests", action="store_true")
    p.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"], help="of the frozen base")
    p.add_argument("--minutes", type=float, default=9.0, help="no new measurement is begun after this")
    p.add_argument("--page", type=Path, help="only draw the page of these figures again, beside them")
    a = p.parse_args()
    if a.page:
        print(write(json.loads(a.page.read_text(encoding="utf-8")), a.page.with_suffix(".html")))
        return
    if a.device == "cpu" and not a.quick:
        p.error("no GPU that PyTorch can use was found; --quick takes the whole path on the CPU with tiny shapes")
    began = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    a.output.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {text}", flush=True)

    def save() -> None:
        (a.output / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    found: dict[str, Any] = {"environment": environment(torch.get_num_threads(), a.device), "commit": commit(),
                             "command": " ".join(["python", *sys.argv]), "measured": [], "not_measured": []}  # fmt: skip
    found["tests"] = {"ran": False, "why": "--skip-tests"} if a.skip_tests else tests(a.device)
    say(f"device tests: {found['tests'].get('summary') or found['tests']['why']}")
    found["peak"] = gemm(torch.get_num_threads(), a.device)
    say("peak of products, TFLOP/s: " + ", ".join(f"{n} {v / 1e3:,.1f}" for n, v in found["peak"].items()))
    counts = (1, 2, 4) if a.quick else CLIENTS
    for shape in QUICK if a.quick else SHAPES:
        for dtype in a.dtype:
            if time.perf_counter() - began > a.minutes * 60:
                found["not_measured"].append(f"{shape.name} {dtype}")
                say(f"{shape.name} {dtype}: not measured, the time is up")
                continue
            found["measured"].append(measure(shape, dtype, a.device, counts, say))
            save()  # what is measured stays, whatever comes next
    save()
    say(f"wrote {a.output / 'gpu.json'}")
    try:
        say(f"wrote {write(found, a.output / 'gpu.html')}")
    except FedloraError as e:  # the figures are kept; `--page` draws them elsewhere
        say(f"{e}; then: python bench/gpu.py --page {a.output / 'gpu.json'}")


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
