"""How many clients fit in a block (a memory model of one client's step), freed memory kept for the next step, and the peak."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from .setting import Setting

MOST = 32  # larger blocks bring nothing on any machine measured so far
SHARE = 0.5  # of the memory that is free
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of glibc's mallopt, and their defaults:
TRIMMED, MAPPED = 128 * 1024, 65536


def client_bytes(f: Setting) -> int:
    """Memory one more client of a block takes, bytes: adapters with gradient and two moments, and activations.

    Activations per layer and token follow Korthikanti et al. (arXiv:2205.05198), section 4: about 34 h numbers of the
    base's dtype and 5 heads L of attention; without dropout and recomputation somewhat less, so this is an upper bound.
    """
    adapters = f.parameters()["trainable"] * 4 * 6
    config = getattr(f.model.base, "config", None)
    hidden = getattr(config, "hidden_size", 256)
    layers = getattr(config, "num_hidden_layers", 4)
    heads = getattr(config, "num_attention_heads", 4)
    vocabulary = getattr(config, "vocab_size", 0) if f.task.over_vocabulary else 0
    rows = f.data.splits["train"].rows[:4096]
    length = int(f.data.examples.lengths(rows).max(initial=1))
    width = next(f.model.base.parameters()).element_size()
    tokens = -(-f.plan.batch_size // f.accumulation) * length
    per_token = layers * (34 * hidden + 5 * heads * length) * width / 2 + vocabulary * 12
    if f.model.checkpointing:
        per_token = layers * 2 * hidden * width + (34 * hidden + 5 * heads * length) * width / 2 + vocabulary * 12
    return int(adapters + tokens * per_token * f.method.draws)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def auto_block(f: Setting) -> int:
    """The largest block that fits in half of the free memory, at most MOST clients; 1 where clients train whole models.

    Full fine-tuning gives each client every weight: a block shares no product, so it saves no time (1.04 times the speed of one
    client after another, bench/NOTES.md), and holds the model with gradient and moments once for each client.
    """
    numbers = f.parameters()
    if 2 * numbers["trainable"] > numbers["base"]:
        return 1
    return max(1, min(MOST, int(free_bytes(f.model.device) * SHARE / max(client_bytes(f), 1))))


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Inside, freed memory stays with this process; at the end it goes back to the system.

    glibc returns large freed blocks at once, and a step allocates its activations anew: the page faults took a fifth of the
    time of training on CPUs. Elsewhere than on glibc nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        libc.mallopt(MMAP_MAX, MAPPED)
        libc.mallopt(TRIM_THRESHOLD, TRIMMED)
        libc.malloc_trim(0)


def forget_peak() -> None:
    """`peak_memory` counts from here on: the runs of a sweep share a process. Where that cannot be (not Linux), it goes on."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets the peak resident set


def resident() -> int:
    """Resident set of this process now, bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """Largest resident set of this process, bytes."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss if sys.platform == "darwin" else rss * 1024
