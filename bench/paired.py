"""Two source trees, or several systems, in alternation and in CPU seconds: what a change is worth on a machine that others use too.

    python bench/paired.py --texts ../shared/data/huffpost/train.parquet --system peft --system blocks --system blocks-bf16
    python bench/paired.py --texts demo --system blocks --old ../before/src

Systems are those of `fedlora bench` (src/fedlora/bench/child.py). --old: the src folder of another checkout; every system is measured in
it as well, as "old NAME". Rounds alternate between all of them. CPU seconds are those of the process, user and system, so other work on
the machine is not counted. The first line printed is the reference, whose speed is 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

import psutil

from fedlora.bench.run import Child
from fedlora.bench.work import REGIMES, Work

WARM = 2  # rounds before those that are measured


class Paired(Child):
    """A system's process, whose CPU seconds are read from outside."""

    def __init__(self, title: str, system: str, work: Work, source: Path | None):
        before = os.environ.get("PYTHONPATH")
        if source is not None:
            os.environ["PYTHONPATH"] = str(source.resolve())
        try:
            super().__init__(system, work)
        finally:
            os.environ.pop("PYTHONPATH", None)
            if before is not None:
                os.environ["PYTHONPATH"] = before
        self.title, self.cpu = title, list[float]()
        self.tokens = 0

    def round(self, number: int) -> None:
        start = self._spent()
        said = self.ask(do="round", round=number)
        if not said:
            raise SystemExit(f"{self.title}: {self.measured.failed}")
        self.cpu.append(self._spent() - start)
        self.tokens = int(said["tokens"])

    def _spent(self) -> float:
        spent = psutil.Process(self.process.pid).cpu_times()
        return float(spent.user + spent.system)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--texts", default="demo")
    ask.add_argument("--text", default="text", help="the column of the texts")
    ask.add_argument("--model", default="minilm")
    ask.add_argument("--task", default="classification")
    ask.add_argument("--method", default="homlora")
    ask.add_argument("--system", action="append", required=True)
    ask.add_argument("--regime", action="append", choices=sorted(REGIMES), help="default: small, middle, large")
    ask.add_argument("--length", type=int, default=64, help="tokens of a row, at most")
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--threads", type=int, default=1)
    ask.add_argument("--old", type=Path)
    said = ask.parse_args()
    for regime in said.regime or ("small", "middle", "large"):
        work = Work(
            said.model, said.task, said.method, said.texts, said.text, said.length, REGIMES[regime], said.threads
        )
        children = [Paired(s, s, work, None) for s in said.system]
        children += [Paired(f"old {s}", s, work, said.old) for s in said.system] if said.old else []
        try:
            for number in range(WARM + said.rounds):
                for child in children:
                    child.round(number)
        finally:
            for child in children:
                child.close()
        for child in children:
            ratios = sorted(a / b for a, b in zip(children[0].cpu[WARM:], child.cpu[WARM:], strict=True))
            speed = child.tokens / child.cpu[-1]
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
            print(
                f"{regime:7}{child.title:18}{speed:8,.0f} tokens a CPU second, {spread}, {child.measured.memory / 1e9:.1f} GB",
                flush=True,
            )


if __name__ == "__main__":
    main()
