"""Compiled forms of a few of PyTorch's operators in fp32 and bf16, on CPUs with AMX, AVX-512 or AVX2.

They compute what the operators compute, from the same arguments, with derivatives of any order; nothing above knows of them.
Where the CPU, the compiler or the shape does not fit, PyTorch's own operators do the work.
"""

from __future__ import annotations

import torch

from .attention import MOST
from .fused import Fused, Now
from .hooks import Compiled
from .int8 import to_int8
from .library import first, serving, unavailable
from .packing import Packing
from .words import WordLosses

__all__ = [
    "MOST",
    "Compiled",
    "Fused",
    "Now",
    "Packing",
    "WordLosses",
    "missing",
    "serving",
    "to_int8",
    "unavailable",
    "useful",
]


def useful(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a base of this dtype on this device gains from them, and this process has them."""
    return device.type == "cpu" and serving(dtype) is not None and first("dropout", "dropout2") is not None


def missing() -> str | None:
    """Why this process has none of them; None if it has some."""
    return unavailable("vector2") or unavailable("dropout2")
