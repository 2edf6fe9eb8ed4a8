"""Groups of layers that adapters live on, found in the modules of a base.

target      the layers model.targets names (LoRA, VeRA, sparse)
head        the task head
linear      every Linear or Conv1D of the base outside the head
bias        every layer with a bias (BitFit, arXiv:2106.10199: normalisation layers too)
all         every parameter: linear layers, normalisations, embeddings (full fine-tuning)
outputs     the output projections of attention and of the feed-forward (Houlsby, arXiv:1902.00751)
keys_values the projections to keys and to values ((IA)^3, arXiv:2205.05638)
ffn_output  the output projection of the feed-forward only (Pfeiffer, arXiv:2005.00247; (IA)^3)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..errors import ModelError
from ..layers import layer_of

# architecture -> (attention output, feed-forward output), as patterns on module paths
OUTPUTS: dict[str, tuple[str, ...]] = {
    "bert": (r".*\.attention\.output\.dense", r".*\.layer\.\d+\.output\.dense"),
    "albert": (r".*\.attention\.dense", r".*\.ffn_output"),
    "distilbert": (r".*\.attention\.out_lin", r".*\.ffn\.lin2"),
    "gpt2": (r".*\.attn\.c_proj", r".*\.mlp\.c_proj"),
    "llama": (r".*\.self_attn\.o_proj", r".*\.mlp\.down_proj"),
    "t5": (r".*\.(SelfAttention|EncDecAttention)\.o", r".*\.DenseReluDense\.wo"),
    "bart": (r".*\.(self_attn|encoder_attn)\.out_proj", r".*\.fc2"),
}
OUTPUTS |= dict.fromkeys(("roberta", "xlm-roberta", "electra", "deberta", "deberta-v2"), OUTPUTS["bert"])
OUTPUTS |= dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma", "phi3"), OUTPUTS["llama"])

KEYS_VALUES: dict[str, tuple[str, ...]] = {  # architecture -> keys and values, likewise
    "bert": (r".*\.attention\.self\.(key|value)",),
    "albert": (r".*\.attention\.(key|value)",),
    "distilbert": (r".*\.attention\.(k_lin|v_lin)",),
    "deberta": (r".*\.attention\.self\.in_proj",),  # one layer computes queries, keys and values
    "deberta-v2": (r".*\.attention\.self\.(key|value)_proj",),
    "gpt2": (r".*\.attn\.c_attn",),  # the same layer also computes the queries
    "llama": (r".*\.self_attn\.(k|v)_proj",),
    "phi3": (r".*\.self_attn\.qkv_proj",),  # the same layer also computes the queries
    "t5": (r".*\.(SelfAttention|EncDecAttention)\.(k|v)",),
    "bart": (r".*\.(self_attn|encoder_attn)\.(k|v)_proj",),
}
KEYS_VALUES |= dict.fromkeys(("roberta", "xlm-roberta", "electra"), KEYS_VALUES["bert"])
KEYS_VALUES |= dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma"), KEYS_VALUES["llama"])


def group(name: str, base: nn.Module, model_type: str, targets: Sequence[str], head: Sequence[str]) -> list[str]:
    """Module paths of the group `name`. Raises ModelError where the architecture has none."""
    if name in ("target", "head"):
        return list(targets if name == "target" else head)
    layers = {n: (m, s) for n, m in base.named_modules() if n and n not in head and (s := layer_of(n, m)) is not None}
    linear = [n for n, (m, _) in layers.items() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    tied = getattr(getattr(base, "config", None), "tie_word_embeddings", False)
    embeddings: Any = getattr(base, "get_output_embeddings", None)
    outside = embeddings() if embeddings is not None else None
    # Trained as part of the table that it shares.
    linear = [n for n in linear if not (tied and layers[n][0] is outside)]
    if name == "linear":
        return linear
    if name == "bias":
        found = [n for n, (m, s) in layers.items() if s.bias]
        if not found:
            raise ModelError(f"BitFit: {type(base).__name__} has no biases to train; choose another adapter")
        return found
    if name == "all":
        every = [n for n in layers if n in linear or not isinstance(layers[n][0], nn.Linear)]
        own = {n: id(next(layers[n][0].parameters(recurse=False))) for n in every}
        first = {own[n]: n for n in reversed(every)}  # one parameter under several names has one delta
        every = [n for n in every if first[own[n]] == n]
        held = {id(p) for n in [*every, *head] for p in base.get_submodule(n).parameters()}
        lost = [n for n, p in base.named_parameters() if id(p) not in held]
        if lost:
            raise ModelError(
                f"full: {lost[0]!r} ({len(lost)} such parameters) of {type(base).__name__} belongs to no layer that can carry a "
                "delta (Linear, Conv1D, LayerNorm, RMSNorm, Embedding), so not every parameter would be trained; use another adapter"
            )
        return every
    tables: dict[str, dict[str, tuple[str, ...]]] = {
        "keys_values": KEYS_VALUES,
        "outputs": OUTPUTS,
        "ffn_output": {k: v[1:] for k, v in OUTPUTS.items()},
    }
    if model_type not in tables[name]:
        what = "keys and values are in" if name == "keys_values" else "the sublayers end in"
        raise ModelError(
            f"{name}: where {what} architecture {model_type!r} is not known; "
            f"use lora, or add the architecture to fedlora.model.groups.{'KEYS_VALUES' if name == 'keys_values' else 'OUTPUTS'}"
        )
    patterns = tables[name][model_type]
    return [n for n in linear if any(re.fullmatch(p, n) for p in patterns)]


def groups(
    names: Iterable[str], base: nn.Module, model_type: str, targets: Sequence[str], head: Sequence[str]
) -> dict[str, list[str]]:
    """The groups a method needs, and always target and head."""
    return {n: group(n, base, model_type, targets, head) for n in dict.fromkeys(("target", "head", *names))}
