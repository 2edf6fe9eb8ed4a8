"""Where a run computes, and in which numbers: the device of model.device, and what model.dtype "auto" stands for there.

The rule is measured (bench/NOTES.md), and reads the processor alone: the same machine always gets the same numbers. What it has chosen is
written into the resolved recipe and its hash, so a run is resumed, and repeated elsewhere, in the numbers that it began in.
"""

from __future__ import annotations

import platform
from typing import NamedTuple

from ..errors import ConfigError, Problem

# bf16 products of a CPU, fastest first: as torch.cpu names the instructions, and what they are called.
PRODUCTS = (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16"))
SLOWER = "3 to 6 times"  # a round in bf16 beside fp32, on a CPU with AVX-512 and without bf16 products


class Numbers(NamedTuple):
    """dtype: fp32, bf16 or int8; why: the reason, as a phrase; warning: what it costs here, "" for nothing that one should know."""

    dtype: str
    why: str
    warning: str = ""


def device_of(name: str, field: str = "model.device") -> str:
    """The device to run on; "auto" takes cuda, then mps, then the CPU."""
    import torch

    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(d for d in ("cuda", "mps", "cpu") if found[d])
    if not found.get(name.split(":")[0]):
        have = [d for d, ok in found.items() if ok]
        raise ConfigError([Problem(field, name, f"a device of this machine ({', '.join(have)})", "use auto")])
    return name


def products(device: str) -> str:
    """What computes bf16 products on this device, "" for nothing that is known to."""
    import torch

    kind = device.split(":")[0]
    if kind == "cuda":
        return "the GPU" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else ""
    able = torch.cpu.get_capabilities() if kind == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return next((said for name, said in PRODUCTS if able.get(name)), "")


def numbers(dtype: str, device: str) -> Numbers:
    """What model.dtype stands for on model.device. A device that this machine lacks is treated as the CPU: it is refused elsewhere."""
    try:
        kind = device_of(device)
    except ConfigError:
        kind = "cpu"
    fast = products(kind)
    if dtype == "auto":
        if fast:
            return Numbers("bf16", f"{fast} computes bf16 products")
        here = {"cuda": "this GPU", "mps": "mps"}.get(kind.split(":")[0], f"this CPU ({platform.machine()})")
        return Numbers("fp32", f"{here} is not known to gain from bf16")
    if dtype == "bf16" and not fast and kind == "cpu":
        return Numbers(
            dtype, "the recipe says so",
            f"model.dtype: bf16 on a CPU without bf16 products (neither {' nor '.join(said for _, said in PRODUCTS)}): a round takes "
            f"about {SLOWER} as long as in fp32; set model.dtype to auto or fp32",
        )  # fmt: skip
    return Numbers(dtype, "the recipe says so")
