"""The command line in processes that are forked with the heavy libraries already imported: `fedlora` itself starts anew in each.

A test's command is then as fast as its work: importing torch and transformers takes most of the time of a small one.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

LIBRARIES = [
    "torch", "transformers", "transformers.models.auto.modeling_auto", "transformers.models.bert.modeling_bert", "tokenizers",
    "peft", "datasets", "pandas", "pyarrow.parquet", "plotly.graph_objects", "sklearn.metrics", "pydantic", "rich.progress", "typer",
    "yaml", "filelock", "psutil",
]  # fmt: skip
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(LIBRARIES)


def run(
    arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """`fedlora ARGUMENTS` to its end; what it wrote, and its exit code. Raises TimeoutError."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = CONTEXT.Process(target=_child, args=(list(arguments), cwd, dict(environment), out, err))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"fedlora {' '.join(arguments)}: not done after {timeout} s")
        said = [p.read_text(encoding="utf-8") for p in (out, err)]
    return subprocess.CompletedProcess(list(arguments), process.exitcode, *said)


def _child(arguments: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for fd, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
    sys.argv = ["fedlora", *arguments]
    from fedlora.cli import entry
    from fedlora.recipe import device

    device.PRODUCTS = ()  # fp32 on every machine, as in conftest.py
    entry()
