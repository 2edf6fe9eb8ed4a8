"""How many clients fit in a block: a memory model of one client's step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .federation import Federation

MOST = 32  # larger blocks bring nothing on any machine measured so far
SHARE = 0.5  # of the memory that is free


def client_bytes(f: Federation) -> int:
    """Memory one more client of a block takes, bytes: adapters with gradient and two moments, and activations.

    Activations per layer and token follow Korthikanti et al. (arXiv:2205.05198), section 4: about 34 h numbers of the
    base's dtype and 5 heads L of attention; without dropout and recomputation somewhat less, so this is an upper bound.
    """
    adapters = f.parameters()["trainable"] * 4 * 6
    config = getattr(f.model.base, "config", None)
    hidden = getattr(config, "hidden_size", 256)
    layers = getattr(config, "num_hidden_layers", 4)
    heads = getattr(config, "num_attention_heads", 4)
    vocabulary = getattr(config, "vocab_size", 0) if f.task.kind == "causal-lm" else 0
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


def auto_block(f: Federation) -> int:
    """The largest block that fits in half of the free memory, at most MOST clients."""
    return max(1, min(MOST, int(free_bytes(f.model.device) * SHARE / max(client_bytes(f), 1))))
