"""What the commands do that need no run: methods and their costs, shipped recipes, the synthetic example, the benchmark."""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, Problem, near
from . import tables
from .actions import err, out

if TYPE_CHECKING:
    from rich.status import Status


def methods(json: bool) -> None:
    from ..methods import METHODS
    from ..methods.facts import facts

    rows = [facts(m) for m in METHODS.values()]
    if json:
        sys.stdout.write(json_.dumps(rows) + "\n")
    else:
        tables.methods(out, rows)


def recipes(json: bool) -> None:
    from ..recipe.shipped import shipped

    found = shipped()
    if json:
        rows = [{"name": r.name, "shows": r.shows, "size": r.size, "paper": r.paper} for r in found]
        sys.stdout.write(json_.dumps(rows) + "\n")
    else:
        tables.recipes(out, found)


def copy_recipe(name: str) -> None:
    from ..recipe.shipped import copy

    file = copy(name, Path())
    out.print(f"{file}: look at it, then fedlora check {file} and fedlora run {file}", soft_wrap=True, highlight=False)


def _task(task: str) -> str:
    from ..training.tasks import NAMES

    if task not in NAMES:
        raise ConfigError([Problem("--task", task, f"one of {', '.join(NAMES)}", near(task, NAMES))])
    return task


def cost(model: str, task: str, json: bool) -> None:
    from dataclasses import asdict

    from ..bench.cost import costs

    kind = _task(task)
    with err.status("measuring") as status:
        found = costs(model, kind, on=lambda title: status.update(f"measuring {title}"))
    if json:
        sys.stdout.write(json_.dumps([asdict(c) for c in found]) + "\n")
    else:
        tables.costs(out, model, found)


def example(output: Path, rounds: int, seed: int, json: bool) -> None:
    from dataclasses import asdict

    from .. import report as pages
    from ..bench.examples import courses

    with err.status("training") as status:
        found = courses(seed, rounds, on=lambda label: status.update(f"training {label}"))
    if json:
        sys.stdout.write(json_.dumps([asdict(c) for c in found]) + "\n")
    else:
        tables.example(out, found)
    try:
        page = pages.write_example(found, output, seed)
    except pages.MissingPlotly as e:
        err.print(str(e), soft_wrap=True, markup=False)
        return
    if not json:
        out.print(f"report: {page}", soft_wrap=True, highlight=False)


def bench(
    regimes: Sequence[str],
    systems: Sequence[str],
    rounds: int,
    method: str,
    model: str,
    task: str,
    source: str,
    text: str,
    threads: int,
    device: str,
    output: Path,
) -> None:
    from ..bench.child import SYSTEMS
    from ..bench.run import environment, flops_per_token, measure
    from ..bench.run import report as of
    from ..bench.work import REGIMES, USUAL, Work
    from ..methods import METHODS
    from ..recipe.device import device_of

    kind = _task(task)
    odd: list[Problem] = []
    try:
        device = device_of(device, "--device")
    except ConfigError as e:
        odd += e.problems
    peers = ("one", "blocks") if method != "homlora" else ("one", "blocks", "peft") if device != "cpu" else ("",)
    can = [x for x in SYSTEMS if x.startswith(peers) and (device == "cpu" or not x.endswith("int8"))]
    odd += [Problem("--regime", r, "a regime", near(r, REGIMES)) for r in regimes if r not in REGIMES]
    odd += [
        Problem("--system", x, f"a system that does {method} on {device}", near(x, can))
        for x in systems
        if x not in can
    ]
    if method not in METHODS:
        odd.append(Problem("--method", method, "a method", near(method, METHODS)))
    if odd:
        raise ConfigError(odd)
    flops = flops_per_token(model, kind)
    where, found = environment(threads, device), []
    what = "" if method == "homlora" else f"-{method}"
    path = output / f"{where['date']}-{Path(model).name}-{Path(source).parent.name or source}{what}.json"
    for name in regimes or USUAL:
        work = Work(model, kind, method, source, text, regime=REGIMES[name], threads=threads, device=device)
        assert work.rows  # bad data is said before anything is started
        with err.status(name) as status:

            def say(system: str, round: int, name: str = name, status: Status = status) -> None:
                status.update(f"{name}, round {round}: {SYSTEMS[system][0]}")

            measured = measure(work, systems or can, rounds, on=say)
        found.append(of(work, measured, flops))
        tables.bench(out, found[-1])
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json_.dumps({"environment": where, "regimes": found}, indent=1), encoding="utf-8")
    out.print(f"results: {path}", soft_wrap=True, highlight=False)
