"""The C sources as libraries: compiled by the system's compiler when they are first wanted, and kept in the user's cache.

A library is loaded from the cache if it is this user's and whole; else it is compiled anew. Without a cache (files/cache.py) it is compiled
for this process alone.
"""

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

from ..files import cache as user_cache


class Source(NamedTuple):
    """needs: what the CPU must have, as torch.cpu names it; flags: of the compiler beside FLAGS; text: the C file, by default NAME.c."""

    needs: tuple[str, ...]
    flags: tuple[str, ...]
    text: str = ""


Name = Literal["amx", "vector", "vector2", "dropout", "dropout2"]
SOURCES: dict[Name, Source] = {
    "amx": Source(
        ("amx_tile", "amx_bf16", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16"),
        ("-mamx-tile", "-mamx-bf16", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
    ),
    "vector": Source(("avx512_f", "avx512_dq", "avx512_bw", "avx512_vl"),
                     ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-ffp-contract=fast")),
    "vector2": Source(("avx2", "fma3"), ("-mavx2", "-mfma", "-ffp-contract=fast", "-Wno-psabi"), "vector"),
    "dropout": Source(("avx512_f", "avx512_dq", "avx512_bw", "avx512_vl"),
                      ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl")),
    "dropout2": Source(("avx2",), ("-mavx2",), "dropout"),
}  # fmt: skip
FLAGS = ("-O3", "-std=c11", "-fno-strict-aliasing", "-fPIC", "-fopenmp", "-mprefer-vector-width=512")
DTYPES = frozenset({torch.float32, torch.bfloat16})  # what the kernels compute on
SECONDS = 120  # a compiler that takes longer hangs


def openmp() -> str | None:
    """The OpenMP library that PyTorch has loaded. A second one would have threads of its own, which wait for the cores of the first."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    found = {path for line in maps.splitlines() if "libgomp" in (path := line.split(maxsplit=5)[-1])}
    return min(found, key=lambda path: ("/torch" not in path, path), default=None)  # other packages may bring their own


def _compiled(name: Name, compiler: str, threads: str, place: Path | None, file: str) -> ctypes.CDLL:
    """The library from its place in the cache, or made there. place: None where nothing is kept.

    Raises OSError or subprocess.SubprocessError.
    """
    if place is not None and user_cache.read(place / file) is not None:
        return ctypes.CDLL(str(place / file))
    with tempfile.TemporaryDirectory() as work:  # readable by this user alone
        half, whole = Path(work) / "half.o", Path(work) / file
        for command in (
            [compiler, *FLAGS, *SOURCES[name].flags, "-c", str(_file(name)), "-o", str(half)],
            [compiler, "-shared", str(half), threads, "-lm", "-o", str(whole)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
        if place is None:
            return ctypes.CDLL(str(whole))
        user_cache.write(place / file, whole.read_bytes())
    return ctypes.CDLL(str(place / file))


def _file(name: Name) -> Path:
    return Path(__file__).with_name(f"{SOURCES[name].text or name}.c")


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
            *(header.read_text() for header in sorted(_file(name).parent.glob("*.h"))),
            *FLAGS,
            *SOURCES[name].flags,
            compiler,
            threads,
        )
    )
    file = f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:16]}.so"
    short = Path(compiler).name  # this text is read in reports: it names no folders
    try:
        return _compiled(name, compiler, threads, user_cache.room("compiled"), file)
    except subprocess.CalledProcessError as e:
        lines = e.stderr.decode(errors="replace").strip().splitlines()
        return f"{short} cannot compile it: {lines[0] if lines else f'exit code {e.returncode}'}"
    except subprocess.SubprocessError:
        return f"{short} did not end within {SECONDS} s"
    except OSError as e:
        return f"it cannot be kept or loaded: {e.strerror or 'not a library of this system'}"


def unavailable(name: Name = "amx") -> str | None:
    """Why these kernels cannot be used in this process; None if they can."""
    found = _loaded(name)
    return found if isinstance(found, str) else None


def library(name: Name = "amx") -> ctypes.CDLL:
    """The library; `unavailable` says before whether there is one."""
    found = _loaded(name)
    assert not isinstance(found, str), found
    return found


def first(*names: Name) -> Name | None:
    """The first of these libraries that can be used here; None for none."""
    return next((n for n in names if unavailable(n) is None), None)


def serving(dtype: torch.dtype) -> Name | None:
    """The library whose attention computes in this dtype here; None for none."""
    if dtype not in DTYPES:
        return None
    return first("amx", "vector", "vector2") if dtype == torch.bfloat16 else first("vector", "vector2")


def fits(*tensors: Tensor | None) -> bool:
    """Whether they are what the kernels compute on: all of one dtype, on the CPU."""
    dtypes = {t.dtype for t in tensors if t is not None}
    return len(dtypes) == 1 and dtypes <= DTYPES and all(t is None or t.device.type == "cpu" for t in tensors)


def at(x: Tensor | None) -> ctypes.c_void_p:
    """Its address, for the library."""
    return ctypes.c_void_p(0 if x is None else x.data_ptr())
