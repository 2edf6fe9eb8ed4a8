"""Concept shift: every client has its own order of the labels, whatever the partition."""

from __future__ import annotations

import numpy as np

from ...seeds import np_rng


def label_permutation(clients: int, classes: int, seed: int) -> np.ndarray:
    """Concept shift: int64 [clients classes], a random order of the classes for each client; it maps a label to the client's.

    A client's permutation does not depend on how many clients there are.
    """
    return np_rng(seed, "partition", "permutation").permuted(np.tile(np.arange(classes), (clients, 1)), axis=1)
