"""The facts of a run as files: environment and partition at its start, the summary at its end.

The round is chosen on validation and scored on test; the mean of the last ten evaluated rounds stands beside it.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import torch

from .. import kernels
from ..data.federated import FederatedData
from ..methods.contract import ServerState
from ..model.adapted import Adapted
from ..training.metrics import beats
from . import provenance
from .records import EvalLine, Line, Timing, TrainLine
from .setting import Setting
from .store import Store

PACKAGES = ("fedlora", "torch", "transformers", "peft", "datasets", "safetensors", "numpy", "flwr")


def environment(f: Setting) -> dict[str, Any]:
    """Versions and hardware that a reader of the numbers needs."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(f.model.device) if f.model.device.type != "cuda" else torch.cuda.get_device_name(f.model.device),
        "numbers": f.numbers or str(f.model.dtype).removeprefix("torch."),
        "kernels": operators(f.model),
        "packages": versions(PACKAGES),
        "command": provenance.command(),
        "commit": provenance.commit(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


FOR = {"amx": "AMX", "vector": "AVX-512", "vector2": "AVX2"}  # what each library of compiled operators is made for


def operators(model: Adapted) -> str:
    """Whose operators a base computes with; for one that could have compiled ones, why it has not."""
    if model.compiled:
        return f"compiled for {FOR[str(kernels.serving(model.dtype))]}"
    why = kernels.missing() if model.device.type == "cpu" else None
    return f"PyTorch's, because {why}" if why else "PyTorch's"


def processor() -> str:
    """The processor's own name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def partition_facts(data: FederatedData, withheld: bool = False) -> dict[str, Any]:
    """Class histogram (or size) of every client in every split; rows: a digest of which rows each has. withheld: names alone."""
    out: dict[str, Any] = {"ids": list(data.ids), "label_names": list(data.label_names), "unseen": data.unseen}
    if withheld:
        return {"ids": list(data.ids), "label_names": list(data.label_names), "unseen": data.unseen, "withheld": True}
    out["sizes"] = {s: rows.sizes.tolist() for s, rows in data.splits.items()}
    if data.label_names:
        out["histogram"] = {split: data.histogram(split).tolist() for split in data.splits}
    rows = hashlib.blake2b(digest_size=8)
    for split in sorted(data.splits):
        for part in (data.splits[split].offsets, data.splits[split].rows):
            rows.update(split.encode() + part.tobytes())
    return out | {"truncated": data.truncated, "rows": rows.hexdigest()}


def describe_run(f: Setting, store: Store, block: int) -> None:
    """Write what is known before training starts."""
    for name, facts in _description(f, block).items():
        store.write_json(name, facts)


def describe_again(f: Setting, store: Store, block: int) -> None:
    """When a run is resumed: write anew what of its description is damaged or gone."""
    for name, facts in _description(f, block).items():
        store.renew_json(name, facts)


def _description(f: Setting, block: int) -> dict[str, dict[str, Any]]:
    held = partition_facts(f.data, f.private is not None) | {"recipe": f.recipe.get("partition", {})}
    return {"environment.json": environment(f) | {"block": block}, "partition.json": held}


def chosen_round(lines: Iterable[Line], metric: str, lower: Collection[str] = ("loss",)) -> tuple[int | None, str]:
    """(round, split it was chosen on): best mean of the personal view, validation before test; earliest of equals.

    Where sites were away, only the evaluations that miss the fewest clients are compared: means over other clients are no better
    or worse rounds. lower: the metrics of which less is better.
    """
    evals = [x for x in own_evals(lines) if x.view in ("personal", "global") and metric in x.mean]
    fewest = min((x.missing for x in evals), default=0)
    evals = [x for x in evals if x.missing == fewest]
    for split in ("validation", "test"):
        for view in ("personal", "global"):
            best: tuple[int, float] | None = None
            for x in evals:
                if x.split == split and x.view == view:
                    v = x.mean[metric]
                    if best is None or beats(v, best[1], metric in lower):
                        best = (x.round, v)
            if best is not None:
                return best[0], split
    return None, "validation"


def means(lines: Iterable[Line]) -> list[EvalLine]:
    """Evaluations of rounds without their clients' scores: all that the choice of a round looks at."""
    return [replace(x, clients={}) for x in own_evals(lines)]


def own_evals(lines: Iterable[Line]) -> list[EvalLine]:
    """Evaluations of rounds. Those before and after a hand-over are no rounds: nobody can choose such a model."""
    return [x for x in lines if isinstance(x, EvalLine) and x.stage is None]


def summarise(f: Setting, server: ServerState, lines: Sequence[Line], timings: Sequence[Timing]) -> dict[str, Any]:
    """summary.json: parameters, chosen round, scores of every view there, costs. server: of the last round."""
    metric = f.task.metric
    return {
        "name": f.name,
        "hash": f.recipe_hash,
        "seed": f.seed,
        "method": {"name": f.method.name, "title": f.method.title, "repr": repr(f.method), "paper": f.method.paper},
        "task": f.task.kind,
        "metric": metric,
        "rounds": server.round,
        **outcome(lines, metric, f.task.lower),
        "constant": f.data.constant() if metric == "accuracy" and not f.withheld else None,
        "parameters": f.parameters(server),
        **costs(lines, timings),
        "peak_memory_bytes": max((t.peak_memory_bytes for t in timings), default=0),
    }


def costs(lines: Iterable[Line], timings: Iterable[Timing]) -> dict[str, Any]:
    """What was sent, by direction and in all, and the seconds of all rounds."""
    trains = [x for x in lines if isinstance(x, TrainLine)]
    sent = {d: sum(x.sent(d) for x in trains) for d in ("up", "down")}
    return {
        "bytes": sent | {"total": sent["up"] + sent["down"]},
        "seconds": sum(t.train_seconds + t.eval_seconds + t.server_seconds for t in timings),
    }


def outcome(lines: Sequence[Line], metric: str, lower: Collection[str]) -> dict[str, Any]:
    """The chosen round, the scores of every view there, and the mean of the last rounds, from a run's lines alone."""
    chosen, chosen_on = chosen_round(lines, metric, lower)
    evals = own_evals(lines)

    def at(view: str, split: str, round: int | None) -> dict[str, Any]:
        for x in evals:
            if (x.view, x.split, x.round) == (view, split, round):
                return {"mean": x.mean, "weighted": x.weighted, "worst_decile": x.worst_decile}
        return {}

    views = {v: at(v, "test", chosen) for v in ("personal", "global", "unseen")}
    main = "personal" if views["personal"] else "global"
    tested = [x for x in evals if (x.view, x.split) == (main, "test") and metric in x.mean and x.round]
    last = [x.mean[metric] for x in tested[-10:]]  # without round 0, which nobody has trained
    return {
        "chosen_round": chosen,
        "chosen_on": chosen_on,
        "validation": at(main, "validation", chosen).get("mean", {}).get(metric),
        "test": views[main].get("mean", {}).get(metric),
        "test_last10": sum(last) / len(last) if last else None,
        "last_rounds": len(last),
        "views": {v: x for v, x in views.items() if x},
    }
