"""The C sources as libraries: compiled by the system's compiler when they are first wanted, and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Source(NamedTuple):
    """needs: what the CPU must have, as torch.cpu names it; flags: of the compiler beside FLAGS."""

    needs: tuple[str, ...]
    flags: tuple[str, ...]


Name = Literal["amx", "dropout"]
SOURCES: dict[Name, Source] = {
    "amx": Source(
        ("amx_tile", "amx_bf16", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16"),
        ("-mamx-tile", "-mamx-bf16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
    ),
    "dropout": Source(("avx512_f", "avx512_dq", "avx512_bw", "avx512_vl"),
                      ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")),
}  # fmt: skip
FLAGS = ("-O3", "-std=c11", "-fno-strict-aliasing", "-fPIC", "-fopenmp", "-mprefer-vector-width=512")
SECONDS = 120  # a compiler that takes longer hangs


def folder() -> Path:
    """Where compiled libraries are kept: $XDG_CACHE_HOME/fedlora, by default ~/.cache/fedlora."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedlora"


def openmp() -> str | None:
    """The OpenMP library that PyTorch has loaded. A second one would have threads of its own, which wait for the cores of the first."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = {path for line in maps.splitlines() if "libgomp" in (path := line.split(maxsplit=5)[-1])}
    return min(found, key=lambda path: ("/torch" not in path, path), default=None)  # other packages may bring their own


def _compile(name: Name, compiler: str, threads: str, to: Path) -> None:
    """Raises OSError or subprocess.SubprocessError."""
    to.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.parent) as work:
        half, whole = Path(work) / "half.o", Path(work) / to.name
        for command in (
            [compiler, *FLAGS, *SOURCES[name].flags, "-c", str(_file(name)), "-o", str(half)],
            [compiler, "-shared", str(half), threads, "-lm", "-o", str(whole)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        whole.replace(to)  # at once: another process may do the same now


def _file(name: Name) -> Path:
    return Path(__file__).with_name(f"{name}.c")


@cache
def _loaded(name: Name) -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return f"torch {torch.__version__} does not say what the CPU has"
    able = torch.cpu.get_capabilities()
    if missing := [n for n in SOURCES[name].needs if not able.get(n)]:
        return f"the CPU has no {missing[0]}"
    if not torch.backends.mkldnn.is_available():
        return "PyTorch was built without oneDNN"
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        return "there is no C compiler (cc, or the one that CC names)"
    threads = openmp()
    if threads is None:
        return "PyTorch runs without GNU's OpenMP"
    if name == "amx" and not torch.cpu._init_amx():
        return "the system does not let this process use AMX"
    said = "\0".join(
        (
            _file(name).read_text(),
            _file(name).with_name("hash.h").read_text(),
            *FLAGS,
            *SOURCES[name].flags,
            compiler,
            threads,
        )
    )
    file = folder() / f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.so"
    try:
        if not file.exists():
            _compile(name, compiler, threads, file)
        return ctypes.CDLL(str(file))
    except subprocess.CalledProcessError as e:
        lines = e.stderr.decode(errors="replace").strip().splitlines()
        return f"{compiler} cannot compile it: {lines[0] if lines else e}"
    except (OSError, subprocess.SubprocessError) as e:
        return f"it cannot be compiled and kept in {folder()}: {e}"


def unavailable(name: Name = "amx") -> str | None:
    """Why these kernels cannot be used in this process; None if they can."""
    found = _loaded(name)
    return found if isinstance(found, str) else None


def library(name: Name = "amx") -> ctypes.CDLL:
    """The library; `unavailable` says before whether there is one."""
    found = _loaded(name)
    assert not isinstance(found, str), found
    return found


def fits(*tensors: Tensor | None) -> bool:
    """Whether they are what the kernels compute on."""
    return all(t is None or (t.dtype == torch.bfloat16 and t.device.type == "cpu") for t in tensors)


def at(x: Tensor | None) -> ctypes.c_void_p:
    """Its address, for the library."""
    return ctypes.c_void_p(0 if x is None else x.data_ptr())
