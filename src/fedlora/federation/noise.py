"""Gaussian noise for trees of leaves: drawn from the run's seed in a simulation, from a secret key in a deployment.

A simulation must resume bit for bit, so its noise is a function of (seed, round): whoever knows the seed can take it away, and
epsilon says what a deployment with the same numbers would promise. A deployment draws a fresh key of 256 bits for every
aggregate, expands it by ChaCha20 and forgets it. The bits of a round that is done again, over other uploads, must be others:
the difference of two sums under the same noise is the difference of the uploads.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import FedloraError
from ..seeds import rng
from ..tree import Key

Draw = Callable[[tuple[int, ...]], Tensor]  # shape -> standard normal values, float64


def seeded(*path: object) -> Draw:
    """Noise that is a function of its path."""
    generator = rng(*path)
    return lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def secret() -> Draw:
    """Noise from a key that nobody knows and that is forgotten with the function."""
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
    except ModuleNotFoundError as e:
        raise FedloraError("secret noise needs the package cryptography: pip install 'fedlora[privacy]'") from e
    stream = Cipher(algorithms.ChaCha20(secrets.token_bytes(32), bytes(16)), mode=None).encryptor()

    def draw(shape: tuple[int, ...]) -> Tensor:
        n = int(np.prod(shape, dtype=np.int64))
        bits = np.frombuffer(stream.update(bytes(8 * n)), np.uint64) >> np.uint64(11)
        uniform = torch.from_numpy((bits.astype(np.float64) + 0.5) * 2.0**-53)  # in (0, 1), never at its ends
        return torch.special.ndtri(uniform).view(shape)

    return draw


def gaussian(like: Mapping[Key, Tensor], std: float, draw: Draw) -> dict[Key, Tensor]:
    """N(0, std^2) for every entry of `like`, float64, in the order of the leaves' names."""
    return {k: draw(tuple(like[k].shape)) * std for k in sorted(like)}
