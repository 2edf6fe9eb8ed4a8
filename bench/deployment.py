"""What a deployment costs: seconds of a round over real processes with TLS, beside the same round in one process.

python bench/deployment.py SST2.parquet: three resident clients on this machine, HomLoRA rank 8 on MiniLM, one step of four rows a
round, so that what is measured is the way of the messages. Writes bench/results/deployment.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import fedlora.flower  # noqa: F401
from fedlora.bench.run import environment
from fedlora.cli.progress import size
from fedlora.federation.callbacks import Callback
from fedlora.flower import trial
from fedlora.recipe import Recipe, build

ROUNDS = 20


def recipe(source: str, method: dict[str, Any]) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "way",
            "model": {"name": "minilm"},
            "data": {"source": source, "text": "sentence", "label": "label", "limit": 300, "max_length": 32},
            "partition": {"clients": 3},
            "method": method,
            "train": {"steps": 1, "batch_size": 4, "lr": 1e-3, "dropout": False},
            "federation": {"rounds": ROUNDS},
            "evaluation": {"every": ROUNDS},
            "run": {"threads": 1, "block": 1},
        }
    )


def seconds(folder: Path) -> list[float]:
    """Of each round but the first two."""
    lines = [json.loads(x) for x in (folder / "timings.jsonl").read_text(encoding="utf-8").splitlines()]
    return [x["train_seconds"] for x in lines[2:]]


def measure(source: str, method: dict[str, Any]) -> dict[str, Any]:
    """Deployed and in one process, on the same work."""
    with tempfile.TemporaryDirectory() as folder:
        r, ids = trial.prepared(recipe(source, method), 3)
        there, summary = trial.try_out(r, ids, Path(folder) / "there", Callback(), lambda text: None)
        here = build.federation(r, Path(folder) / "here")
        here.run()
        a, b = seconds(there.store.root), seconds(here.store.root)
    message = summary["bytes"]["total"] / ROUNDS / 6
    return {
        "method": method,
        "message_bytes": message,
        "deployed": {"median": statistics.median(a), "all": a},
        "in_process": {"median": statistics.median(b), "all": b},
        "overhead_per_round": statistics.median(a) - statistics.median(b) / 3,  # sites work at the same time
    }


def main() -> None:
    source = sys.argv[1]
    found = [
        measure(source, m) for m in ({"name": "homlora", "rank": 8}, {"name": "homlora", "rank": 64}, {"name": "fft"})
    ]
    for f in found:
        print(
            f["method"],
            size(f["message_bytes"]),
            f"{f['deployed']['median']:.2f} s, in one process {f['in_process']['median']:.2f} s",
        )
    out = Path(__file__).parent / "results" / "deployment.json"
    out.write_text(
        json.dumps({"environment": environment(1), "rounds": ROUNDS, "found": found}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
