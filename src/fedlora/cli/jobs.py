"""Several runs at once, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from .searches import Todo

if TYPE_CHECKING:
    from ..recipe import Recipe

PARENT = "FEDLORA_PARENT"  # number of the process whose end ends this one
SWEEP = "FEDLORA_SWEEP"  # folder of the sweep whose pages share one plotting library


def sweep() -> Path | None:
    """The folder of the sweep of which this process is one of several jobs; None for any other."""
    folder = os.environ.get(SWEEP)
    return Path(folder) if folder else None


def orphaned() -> bool:
    """Whether the process that started this one as one of several jobs is gone."""
    parent = os.environ.get(PARENT)
    return parent is not None and os.getppid() != int(parent)


def run(todo: Todo, jobs: int, sweep: Path, say: Callable[[str], None]) -> Mapping[Path, str]:
    """Bring the runs to their end, `jobs` at once; folder -> what a run that failed has said. Raises KeyboardInterrupt.

    The cores are shared out: each process has its part of the threads, unless the recipe says how many.
    """
    threads = max(1, (os.cpu_count() or 1) // jobs)
    own = os.environ | {PARENT: str(os.getpid()), SWEEP: str(sweep)}
    own.setdefault("OMP_NUM_THREADS", str(threads))
    failed: dict[Path, str] = {}
    open_: set[subprocess.Popen[str]] = set()
    lock, stop = threading.Lock(), threading.Event()

    def one(recipe: Recipe, folder: Path, file: Path) -> tuple[Recipe, Path, str]:
        if stop.is_set():
            return recipe, folder, "interrupted"
        file.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
        command = [sys.executable, "-m", "fedlora", "run", str(file), "-o", str(folder), "--quiet"]
        p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=own)
        with lock:
            open_.add(p)
        _, said = p.communicate()
        with lock:
            open_.discard(p)
        return recipe, folder, "" if p.returncode == 0 else said.strip()[-2000:] or f"exit code {p.returncode}"

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(jobs) as pool:
        try:
            waiting = [pool.submit(one, r, f, Path(place) / f"{i}.yaml") for i, (r, f) in enumerate(todo)]
            for n, done in enumerate(as_completed(waiting), 1):
                recipe, folder, why = done.result()
                if why:
                    failed[folder] = why
                say(f"{n}/{len(todo)} {recipe.name}" + (f" failed: {why.splitlines()[0]}" if why else " is done"))
        except KeyboardInterrupt:
            stop.set()
            with lock:
                for p in open_:
                    p.terminate()
            raise
    return failed
