"""Fingerprints of what a run is computed from: the encoded data, who holds them, and the base's weights.

A run that is resumed with other ones would give numbers that belong to neither; it is refused (`Store.claim`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.examples import Tokens
from ..data.federated import FederatedData
from .setting import Setting

SAMPLE = 65_536  # bytes of each weight that are hashed as they are, beside the sums over all
BLOCK = 1024  # 8-byte numbers in a sum


def of(f: Setting) -> dict[str, str]:
    """Hex digests by what they are of: texts, labels and clients where the data are here, and base. Equal on every device."""
    found = _data(f.data)
    if f.evaluation.generation is not None:
        digest = hashlib.sha256(repr(sorted((f.data.references or {}).items())).encode())
        found |= {"references": _short(digest)}
    if f.start:
        found |= {"adapter": _short(_added(hashlib.sha256(), f.start))}
    return found | {"base": base(f.model.base)}


def _data(data: FederatedData) -> dict[str, str]:
    """Nothing for a server, whose clients' rows are at their sites."""
    if not len(data.examples):
        return {}
    x, texts, labels, clients = data.examples, hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    if isinstance(x, Tokens):
        for part in (x.flat, x.offsets, x.segment, x.prompt, x.chars):
            _add(texts, part)
        words = x.words
        for part in (x.tags, *((words.labels, words.offsets, words.seen) if words else ())):
            _add(labels, part)
        texts.update(str(x.pad_id).encode())
    else:
        for name in sorted(set(x.columns) - {"labels"}):
            texts.update(name.encode())
            _add(texts, x.columns[name])
    for part in (x.labels, data.groups, data.label_maps):
        _add(labels, part)
    labels.update(repr((data.label_names, data.outputs)).encode())
    clients.update("\0".join(data.ids).encode())
    for name in sorted(data.splits):
        clients.update(name.encode())
        _add(clients, data.splits[name].offsets)
        _add(clients, data.splits[name].rows)
    return {"texts": _short(texts), "labels": _short(labels), "clients": _short(clients)}


def base(model: nn.Module) -> str:
    """Digest of a model's weights: names, shapes, the first bytes of each, and sums over blocks of all its bytes, read as 8-byte
    whole numbers.

    The sums see every value (a changed number, swapped rows, another checkpoint) at the speed of memory, where the weights are.
    """
    whole = hashlib.sha256()
    for name, v in sorted(model.state_dict().items()):
        whole.update(f"{name} {v.dtype} {tuple(v.shape)}".encode())
        if not v.numel():
            continue
        flat = v.detach().contiguous().reshape(-1).view(torch.uint8)
        flat = flat.clone() if flat.storage_offset() % 8 else flat  # a view into another tensor
        whole.update(flat[:SAMPLE].cpu().numpy())
        size = len(flat) // (8 * BLOCK) * 8 * BLOCK
        if size > SAMPLE:
            blocks = flat[:size].view(torch.int64).view(-1, BLOCK)
            whole.update(blocks.sum(-1).cpu().numpy())  # sums wrap around, the same everywhere
        whole.update(flat[max(size, SAMPLE) :].cpu().numpy())
    return _short(whole)


def _add(digest: Any, x: np.ndarray | None) -> None:
    if x is None:
        digest.update(b"none")
    else:
        digest.update(f"{x.dtype} {x.shape}".encode())
        digest.update(repr(x.tolist()).encode() if x.dtype.hasobject else np.ascontiguousarray(x))


def _added(digest: Any, start: Mapping[tuple[str, str], Tensor]) -> Any:
    for name, v in sorted(start.items()):
        digest.update(repr(name).encode())
        _add(digest, v.numpy())
    return digest


def _short(digest: Any) -> str:
    return str(digest.hexdigest()[:32])
