"""What `fedlora doctor` shows: what this machine has, what is on, and what would switch more on."""

from __future__ import annotations

import importlib.util
import json as json_
import os
import platform
import re
import shutil
import sys
from importlib import metadata
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..units import size

VERSIONS = ("torch", "transformers", "peft", "datasets", "numpy", "flwr")
NUMBERS = {"float32": "fp32", "bfloat16": "bf16"}
MAKERS = ("bench", "dev")  # extras for those who change or measure fedlora


class Finding(NamedTuple):
    """What was looked at, what was found, whether it is on (None: neither), and what would switch it on."""

    what: str
    found: str
    on: bool | None = None
    remedy: str = ""


def findings() -> list[Finding]:
    """Everything, in the order in which it is shown. Nothing is downloaded or changed, but operators may be compiled."""
    return [*_versions(), *_processor(), *_gpu(), *_operators(), *_extras(), *_places()]


def _versions() -> list[Finding]:
    from .. import __version__
    from ..federation import summary

    have = summary.versions(VERSIONS)
    said = ", ".join(f"{n} {v}" for n, v in have.items())
    return [Finding("fedlora", __version__), Finding("python", platform.python_version()), Finding("libraries", said)]


def _processor() -> list[Finding]:
    import psutil
    import torch

    from ..federation.summary import processor
    from ..recipe.device import PRODUCTS, products

    cores, memory = psutil.cpu_count(logical=False) or os.cpu_count(), psutil.virtual_memory().total
    said = f"{processor()}, {cores} cores, {torch.get_num_threads()} threads of torch, {size(memory)} of memory"
    fast = products("cpu")
    wanted = " or ".join(n for _, n in PRODUCTS)
    return [
        Finding("processor", said),
        Finding("bf16 products", fast, True)
        if fast
        else Finding("bf16 products", "none", False, f"a processor with {wanted}; fp32 is used on this one"),
    ]


def _gpu() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [Finding("GPU", ", ".join(f"{p.name}, {size(p.total_memory)}" for p in names), True)]
    if torch.backends.mps.is_available():
        return [Finding("GPU", "Apple's, as mps", True)]
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        return [
            Finding("GPU", "torch was built without CUDA", False, "a build of torch with CUDA: pytorch.org says which")
        ]
    return [Finding("GPU", "none that torch can use", None)]


def _operators() -> list[Finding]:
    import torch

    from .. import kernels
    from ..federation.summary import FOR

    compiler = shutil.which(os.environ.get("CC") or "cc")
    found = [
        Finding("C compiler", compiler, True)
        if compiler
        else Finding("C compiler", "none", False, "install gcc or clang, or name one in CC")
    ]
    why = kernels.missing()
    if why is not None:
        wants = "install gcc or clang" if "compiler" in why else ""
        return [*found, Finding("compiled operators", why, False, wants)]
    forms = {dtype: kernels.serving(getattr(torch, dtype)) for dtype in ("float32", "bfloat16")}
    on = ", ".join(f"{NUMBERS[dtype]} on {FOR[name]}" for dtype, name in forms.items() if name)
    return [*found, Finding("compiled operators", f"attention, activations and dropout: {on}", True)]


def _extras() -> list[Finding]:
    """The extras that pyproject.toml declares, as the installed package tells them."""
    wanted: dict[str, list[str]] = {}
    for line in metadata.requires("fedlora") or []:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"""extra\s*==\s*['"]([^'"]+)""", line)
        if name and extra and extra[1] not in MAKERS and name[0] != "fedlora":
            wanted.setdefault(extra[1], []).append(name[0])
    out = []
    for group, names in sorted(wanted.items()):
        lost = [n for n in names if not _installed(n)]
        if lost:
            out.append(Finding(f"extra {group}", f"lacks {', '.join(lost)}", False, f'pip install "fedlora[{group}]"'))
        else:
            out.append(Finding(f"extra {group}", ", ".join(names), True))
    return out


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return importlib.util.find_spec(name.replace("-", "_")) is not None
    return True


def _places() -> list[Finding]:
    from huggingface_hub import constants, get_token

    from ..files import cache

    place = cache.folder()
    kept = Finding("cache", str(place), True) if place else Finding("cache", "off", False, "unset FEDLORA_CACHE")
    if constants.HF_HUB_OFFLINE:
        hub = Finding("Hugging Face hub", "offline by HF_HUB_OFFLINE", False, "unset HF_HUB_OFFLINE")
    elif get_token():
        hub = Finding("Hugging Face hub", "logged in", True)
    else:
        hub = Finding("Hugging Face hub", "not logged in", None, "for gated models: hf auth login")
    return [kept, hub]


def doctor(json: bool, out: Console) -> None:
    """Print the findings."""
    found = findings()
    if json:
        sys.stdout.write(json_.dumps([f._asdict() for f in found]) + "\n")
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    marks: dict[Any, Text] = {True: Text("on", style="green"), False: Text("off", style="yellow"), None: Text("")}
    for f in found:
        said = Text(f.found)
        if f.remedy:
            said.append(f"\n{f.remedy}", style="cyan")
        grid.add_row(marks[f.on], f.what, said)
    out.print(grid)
