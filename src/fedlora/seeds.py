"""Randomness is a function of its path: (seed, "round", t, client, ...).

No global generator is ever read, so order, resume, block size and runtime change nothing.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def number(*path: object) -> int:
    """A 63-bit number that depends on every element of `path` and on nothing else."""
    digest = hashlib.blake2b(repr(path).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rng(*path: object) -> torch.Generator:
    """A CPU torch generator for `path`."""
    import torch

    return torch.Generator().manual_seed(number(*path))


def np_rng(*path: object) -> np.random.Generator:
    """A numpy generator for `path`."""
    import numpy as np

    return np.random.default_rng(number(*path))
