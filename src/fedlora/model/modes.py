"""Which modules of a frozen base are switched between training and evaluation around a step.

Those that may drop or recompute something in training are, and no others. Layers with running statistics stay in evaluation
mode: in training they would normalise over the rows of all clients of a block, and nothing of a frozen base may change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ..errors import ModelError

# Exact classes that compute the same in both modes. Any other may read its mode, a user's own module included.
INDIFFERENT = frozenset(
    {
        nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict,
        nn.GELU, nn.SiLU, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.Conv1d, nn.Conv2d,
    }
)  # fmt: skip


class Modes:
    """The modules of a base in evaluation mode that are set to training around a step.

    Raises ModelError for a layer that normalises over the rows of a batch even in evaluation mode.
    """

    def __init__(self, base: nn.Module):
        self._base = base
        for name, m in base.named_modules():
            if isinstance(m, _BatchNorm) and m.running_mean is None:
                raise ModelError(
                    f"model: {name!r} is a {type(m).__name__} without running statistics, so a row's output depends on the other "
                    "rows of a batch, which may be another client's; give it track_running_stats=True, or use LayerNorm"
                )
        self._switched = [m for m in base.modules() if type(m) not in INDIFFERENT and not isinstance(m, _NormBase)]

    def train(self, on: bool) -> None:
        """Set the mode of the modules that may mind it. nn.Module.train walks through all of them, at every step."""
        for m in self._switched:
            object.__setattr__(m, "training", on)

    def settle(self, step: Callable[[], None]) -> None:
        """Run a step of training and leave in evaluation mode whatever changed its own buffers in it, a layer of the user's
        own that counts or averages. Raises ModelError for one that changes in evaluation mode as well.
        """
        while changed := self._changed(step):
            owners = {id(m) for _, m in changed}
            if not owners & {id(m) for m in self._switched}:
                name, m = changed[0]
                raise ModelError(
                    f"model: {name!r}, a buffer of {type(m).__name__}, changes whenever the base is used, so clients would train on "
                    "different bases and no run could be resumed; let it change in training mode only, or register the buffer "
                    "with persistent=False if it is a cache"
                )
            self._switched = [m for m in self._switched if id(m) not in owners]

    def _changed(self, step: Callable[[], None]) -> list[tuple[str, nn.Module]]:
        """Buffers of the state dict that a step changes, with their modules. They are set back."""
        held: list[tuple[str, nn.Module, str, Tensor, Tensor]] = []
        for path, m in self._base.named_modules():
            for n, b in m.named_buffers(recurse=False):
                if n not in m._non_persistent_buffers_set:
                    held.append((f"{path}.{n}".lstrip("."), m, n, b, b.clone()))
        step()
        found = []
        for name, m, n, buffer, before in held:
            now = m._buffers[n]
            if now is None or now.shape != before.shape or not torch.equal(now, before):
                found.append((name, m))
                buffer.copy_(before)
            m._buffers[n] = buffer
        return found
