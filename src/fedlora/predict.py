"""Text in, label or continuation out: the model of a client, or the global one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import DataError
from .federation import Federation
from .tree import Params, stack


@dataclass(frozen=True)
class Said:
    """One prediction. text: the input; answer: label name, value or continuation; confidence: of a label, else None."""

    text: str
    answer: str
    confidence: float | None = None


def predict_texts(
    f: Federation,
    tokenizer: Any,
    deltas: Params,
    texts: Sequence[str | tuple[str, str]],
    max_length: int,
    new_tokens: int = 64,
) -> list[Said]:
    """What the model with model-ready `deltas` says of each text (or pair of texts)."""
    if not texts:
        raise DataError("predict: got no text, expected at least one; give it as an argument or with --file")
    if f.task.kind == "causal-lm":
        return [_continue(f, tokenizer, deltas, t if isinstance(t, str) else " ".join(t), new_tokens) for t in texts]
    first = [t if isinstance(t, str) else t[0] for t in texts]
    second = [t[1] for t in texts if not isinstance(t, str)]
    pairs = {"text_pair": second} if second else {}
    encoded = tokenizer(first, **pairs, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    batch = {n: v[None].to(f.model.device) for n, v in encoded.items()}
    with torch.inference_mode():
        y = f.model.forward(_one(f, deltas), batch)[0].float().cpu()
    if f.task.kind == "regression":
        return [Said(_shown(t), f"{v:.4f}") for t, v in zip(texts, y.flatten().tolist(), strict=True)]
    p, c = y.softmax(-1).max(-1)
    names = f.data.label_names
    return [Said(_shown(t), names[j], q) for t, j, q in zip(texts, c.tolist(), p.tolist(), strict=True)]


def _one(f: Federation, deltas: Params) -> Params:
    return {k: v.to(f.model.device) for k, v in stack([deltas]).items()}


def _shown(t: str | tuple[str, str]) -> str:
    return t if isinstance(t, str) else " | ".join(t)


def _continue(f: Federation, tokenizer: Any, deltas: Params, text: str, new_tokens: int) -> Said:
    """Greedy continuation."""
    encoded = tokenizer(text, return_tensors="pt").to(f.model.device)
    encoded.pop("token_type_ids", None)
    with torch.inference_mode(), f.model.serving(_one(f, deltas)):
        base: Any = f.model.base
        ids = base.generate(**encoded, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return Said(text, tokenizer.decode(ids[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True).strip())
