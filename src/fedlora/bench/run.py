"""The benchmark: systems in processes of their own take turns, round by round, so that a busy machine is busy for all."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .child import MARK, SYSTEMS
from .work import Work

PACKAGES = ("fedlora", "torch", "transformers", "peft", "flwr", "ray", "pfl")  # whose versions a result names

REFERENCES = ("peft", "one", "one-bf16")  # whose speed is 1: the first of them that is measured


@dataclass
class Measured:
    """One system in one regime. ratio: its speed over the reference's, paired round by round."""

    system: str
    title: str
    startup: float = 0.0
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    memory: int = 0  # bytes, peak of the process tree
    device_memory: int = 0  # bytes, peak of tensors on the accelerator
    peaks: list[dict[str, float]] = field(default_factory=list)  # GEMM, GFLOP/s
    difference: float | None = None  # largest, of the averaged leaves from the reference's
    failed: str = ""

    def speed(self) -> float:
        """Real tokens a second, median."""
        return statistics.median(n / s for n, s in zip(self.tokens, self.seconds, strict=True))


class Child:
    """A system's process."""

    def __init__(self, name: str, work: Work):
        self.measured = Measured(name, SYSTEMS[name][0])
        environment = os.environ | {
            "OMP_NUM_THREADS": str(work.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "fedlora.bench.child", name, json.dumps(work.to_json())]
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        said = self._hear()
        self.measured.startup = float(said.get("ready", 0.0))

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its answer; empty once it has failed."""
        if self.measured.failed:
            return {}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._weigh()
            if line.startswith(MARK):
                said: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return said
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        self.measured.failed = lines[-1] if lines else f"ended with {self.process.wait()}"
        return {}

    def _weigh(self) -> None:
        import psutil

        try:
            me = psutil.Process(self.process.pid)
            total = sum(p.memory_info().rss for p in [me, *me.children(recursive=True)])
            self.measured.memory = max(self.measured.memory, total)
        except psutil.Error:
            pass

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write('{"do": "stop"}\n')
            self.process.stdin.close()
            self.process.wait(30)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()


def measure(
    work: Work, systems: Sequence[str], rounds: int, on: Callable[[str, int], None] = lambda system, round: None
) -> list[Measured]:
    """Every system on the same rounds, alternating. Round 0 warms up and its averaged leaves are compared."""
    children = []
    try:
        for name in systems:
            on(name, 0)
            children.append(Child(name, work))
        with tempfile.TemporaryDirectory() as folder:
            for r in range(rounds + 1):
                for c in children:
                    on(c.measured.system, r)
                    if r:
                        peak = c.ask(do="peak")
                    said = c.ask(do="round", round=r)
                    c.measured.device_memory = max(c.measured.device_memory, said.get("memory", 0))
                    if r == 0:
                        c.ask(do="save", path=str(Path(folder) / c.measured.system))
                    elif said:
                        c.measured.seconds.append(said["seconds"])
                        c.measured.tokens.append(said["tokens"])
                        c.measured.peaks.append(peak)
            _compare([c.measured for c in children], Path(folder), reference_of(systems))
    finally:
        for c in children:
            c.close()
    return [c.measured for c in children]


def reference_of(systems: Sequence[str]) -> str:
    """The system that the others are compared with."""
    return next((r for r in REFERENCES if r in systems), systems[0])


def _compare(found: Sequence[Measured], folder: Path, against: str) -> None:
    from safetensors.torch import load_file

    if not (folder / against).exists():
        return
    reference = load_file(folder / against)
    for m in found:
        if (folder / m.system).exists():
            mine = load_file(folder / m.system)
            if mine.keys() != reference.keys():
                m.failed = f"other leaves than the reference's: {sorted(mine.keys() ^ reference.keys())[:3]}"
                continue
            m.difference = max((float((mine[n] - reference[n]).abs().max()) for n in reference), default=0.0)


def ratios(m: Measured, reference: Measured) -> list[float]:
    """Speed over the reference's, of each round; the same tokens, so times are enough."""
    return [a / b for a, b in zip(reference.seconds, m.seconds, strict=False)]


def flops_per_token(model: str, task: str = "classification") -> float:
    """Forward and backward of the frozen linear layers, no weight gradients: 4 times their weights."""
    from torch import nn

    from ..checkpoints import pretrained

    base = pretrained.load(model, task, 2, attention="eager").base
    stacks = [m for m in base.modules() if isinstance(m, nn.ModuleList)]
    layers = max(stacks, key=len)
    return 4.0 * sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))


def environment(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Hardware and versions."""
    import torch

    from .. import kernels
    from ..federation.summary import processor, versions

    found = {name: "-" for name in PACKAGES} | versions(PACKAGES)
    flags = next((x for x in _cpuinfo() if x.startswith("flags")), "")
    features = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags.split()]
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return {"cpu": processor(), "cores": os.cpu_count(), "device": name, "features": features,
            "kernels": kernels.missing() or "compiled", "threads": threads, "python": platform.python_version(),
            "versions": found, "date": time.strftime("%Y-%m-%d", time.gmtime())}  # fmt: skip


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def report(work: Work, found: Sequence[Measured], flops: float) -> dict[str, Any]:
    """The result as JSON: what was measured, and what follows from it."""
    best = reference_of([m.system for m in found])
    reference = next((m for m in found if m.system == best and m.seconds), None)
    rows = []
    for m in found:
        row: dict[str, Any] = asdict(m)
        if m.seconds:
            row["tokens_per_second"] = m.speed()
            row["seconds_per_round"] = statistics.median(m.seconds)
            row["share_of_bf16_peak"] = m.speed() * flops / 1e9 / statistics.median(p["bf16"] for p in m.peaks)
            if reference is not None:
                r = ratios(m, reference)
                row["ratio"] = {"median": statistics.median(r), "least": min(r), "most": max(r)}
        rows.append(row)
    return {"work": work.to_json(), "reference": best, "systems": rows}
