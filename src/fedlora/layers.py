"""One layer of the base that can carry deltas, and its own weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .errors import ModelError


@dataclass(frozen=True)
class Layer:
    """One place that can carry deltas.

    group: the group of layers it was found in (model/groups.py). module: the base's layer, None for a layer that was made without a base.
    Neither is compared: a layer is what its name and shape say.
    """

    name: str  # module path in the base
    out: int
    in_: int
    bias: bool = True  # whether the base has a bias there
    kind: str = "linear"  # linear | norm | embedding
    group: str = field(default="", compare=False)
    module: Any = field(default=None, compare=False, repr=False)

    def weight(self) -> Tensor:
        """The base's weight there, [o i]; forms that start from it ask for it. Raises ModelError for a layer without a base."""
        if self.module is None:
            raise ModelError(
                f"layer {self.name!r}: its delta starts from the base's weight, and this layer was made without a base; "
                "take the layers from an Adapted model's groups"
            )
        return base_weight(self.module)


def base_weight(module: Any) -> Tensor:
    """A linear layer's weight as [o i]; GPT-2's Conv1D holds it the other way round."""
    w: Tensor = module.weight
    return w.mT if type(module).__name__ == "Conv1D" else w


def layer_of(name: str, module: Any) -> Layer | None:
    """The layer at `module`, None for a module that cannot carry deltas."""
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.Linear):
        return Layer(name, module.out_features, module.in_features, bias, module=module)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2: weight [in out]
        return Layer(name, module.nf, module.weight.shape[0], bias, module=module)
    if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("RMSNorm", "T5LayerNorm")):
        return Layer(name, module.weight.shape[-1], module.weight.shape[-1], bias, "norm", module=module)
    if isinstance(module, nn.Embedding):
        return Layer(name, module.embedding_dim, module.num_embeddings, False, "embedding", module=module)
    return None
