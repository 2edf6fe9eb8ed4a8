"""Messages as bytes: safetensors with a small JSON header. What the ledger counts is exactly what a network would carry.

Every runtime sends these bytes, so a simulated run and a deployed one report the same traffic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..errors import UploadError
from ..tree import Key, Params, rank, rank_axis

HEADER = "fedlora"  # the one metadata entry of a message
Precision = Literal["fp32", "fp16", "bf16", "int8"]
SCALE = "~scale"  # ends the part of a leaf that holds another's scales
MOST_LEAVES = 2**17  # of a message or a state; a 70B model with a delta in every layer has a few thousand
LONGEST_NAME = 1024  # characters
SLACK = 1e-3  # of a norm: sums in float32 are not exact


@dataclass(frozen=True)
class Traffic:
    """Bytes on the wire: payload of adapters and of the head, and framing (names, shapes, header)."""

    adapter: int = 0
    head: int = 0
    framing: int = 0

    @property
    def total(self) -> int:
        """All bytes."""
        return self.adapter + self.head + self.framing

    def as_dict(self) -> dict[str, int]:
        """The parts as JSON has them."""
        return {"adapter": self.adapter, "head": self.head, "framing": self.framing}

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.adapter + other.adapter, self.head + other.head, self.framing + other.framing)


def encode(params: Params, header: Mapping[str, Any] | None = None) -> bytes:
    """One message. header: JSON values that travel with the leaves (round, number of examples)."""
    tensors = {str(k): v.detach().cpu().contiguous() for k, v in params.items()}
    return save(tensors, {HEADER: _json(header)})


def decode(message: bytes, most: int = MOST_LEAVES) -> tuple[Params, dict[str, Any]]:
    """Leaves and header of a message of at most `most` leaves. Raises UploadError for bytes that are none: cut off, altered or
    foreign. Names are counted before any leaf is made."""
    try:
        length = int.from_bytes(message[:8], "little")
        described = json.loads(message[8 : 8 + length])
        if len(described) > most + 1:
            raise ValueError(f"{len(described) - 1} leaves, expected at most {most}")
        if max(map(len, described)) > LONGEST_NAME:
            raise ValueError(f"a leaf whose name is longer than {LONGEST_NAME} characters")
        header = json.loads(described["__metadata__"][HEADER])
        if not isinstance(header, dict):
            raise TypeError("its header holds no fields")
        tensors = load(message)
        return {Key.parse(k): tensors[k] for k in sorted(tensors)}, header  # the loader's own order varies
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UploadError(
            f"message of {len(message)} bytes cannot be read ({str(e)[:200]}), expected leaves written by fedlora; "
            "it was cut off, altered or sent by something else"
        ) from e


def pack(params: Params, precision: Precision = "fp32") -> Params:
    """Leaves as they travel. int8: each row of a float32 leaf (its last axis) becomes whole numbers from -127 to 127, rounded
    to nearest, times a float32 scale, the row's largest magnitude / 127. Other dtypes (ranks) pass through.
    """
    if precision == "fp32":
        return params
    out: Params = {}
    for k, v in params.items():
        if v.dtype != torch.float32 or not v.ndim:
            out[k] = v
        elif precision == "int8":
            scale = v.abs().amax(-1, keepdim=True) / 127
            out[k] = (v / scale.masked_fill(scale == 0, 1.0)).nan_to_num().round().to(torch.int8)
            out[k._replace(part=k.part + SCALE)] = (
                scale  # a row with a value that is not finite has such a scale, so the upload is still refused
            )
        else:
            out[k] = v.to(torch.float16 if precision == "fp16" else torch.bfloat16)
    return out


def unpack(params: Params, precision: Precision | None = None) -> Params:
    """Inverse of `pack`, up to its rounding: every real leaf as float32.

    precision: what the sender was told to use; None takes a message as it is. Raises UploadError where leaf and scale do
    not fit, for a scale without a leaf, and for a leaf of another precision.
    """
    if precision is not None:
        _of_precision(params, precision)
    if all(v.dtype in (torch.float32, torch.int64) and not k.part.endswith(SCALE) for k, v in params.items()):
        return params
    out: Params = {}
    for k, v in params.items():
        if k.part.endswith(SCALE):
            continue
        scale = params.get(k._replace(part=k.part + SCALE))
        if scale is not None:
            if v.dtype != torch.int8 or list(scale.shape) != [*v.shape[:-1], 1]:
                raise UploadError(f"leaf {k} is {list(v.shape)} {v.dtype}, its scales {list(scale.shape)} do not fit")
            out[k] = v.float() * scale.float()
        else:
            out[k] = v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
    return out


def _of_precision(params: Params, precision: Precision) -> None:
    """Raise UploadError unless a message is one that `pack` makes at this precision."""
    real = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    for k, v in params.items():
        scaled = k._replace(part=k.part + SCALE) in params
        if k.part.endswith(SCALE):
            whose = params.get(k._replace(part=k.part.removesuffix(SCALE)))
            right = precision == "int8" and whose is not None and whose.dtype == torch.int8 and v.dtype == torch.float32
        elif precision == "int8":
            right = scaled if v.dtype == torch.int8 else not v.is_floating_point() or (not v.ndim and not scaled)
        else:
            right = not scaled and (not v.is_floating_point() or v.dtype == (real if v.ndim else torch.float32))
            right = right and v.dtype != torch.int8
        if not right:
            raise UploadError(f"leaf {k} is {list(v.shape)} {v.dtype}, expected a message of {precision}")


def size(params: Params, header: Mapping[str, Any] | None = None) -> int:
    """Bytes of `encode(params, header)`, without making them."""
    return _size(tuple((k, v.dtype, v.shape) for k, v in params.items()), _json(header))


@lru_cache(maxsize=512)  # clients of a run send the same leaves round after round
def _size(leaves: tuple[tuple[Key, torch.dtype, torch.Size], ...], header: str) -> int:
    at = 0
    described: dict[str, Any] = {"__metadata__": {HEADER: header}}
    for k, dtype, shape in sorted(leaves, key=lambda x: (-_ORDER[x[1]], str(x[0]))):  # safetensors' own order
        end = at + shape.numel() * dtype.itemsize
        described[str(k)] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = len(json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-text // 8) * 8 + at


def measure(params: Params, message: bytes | int) -> Traffic:
    """Split the bytes of a message (or their number) into adapters, head and framing."""
    total = message if isinstance(message, int) else len(message)
    head = sum(v.nbytes for k, v in params.items() if k.adapter == "head")
    payload = sum(v.nbytes for v in params.values())
    return Traffic(payload - head, head, total - payload)


class Leaf(NamedTuple):
    """What a leaf must look like."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Spec = Mapping[Key, Leaf]


def expect(params: Params) -> dict[Key, Leaf]:
    """The specification that `params` itself meets."""
    return {k: Leaf(tuple(v.shape), v.dtype) for k, v in params.items()}


def _named(params: Params, spec: Spec) -> None:
    if params.keys() != spec.keys():
        extra, lost = (
            [str(k)[:80] for k in sorted(a.keys() - b.keys())[:3]] for a, b in ((params, spec), (spec, params))
        )
        raise UploadError(f"leaves differ from the declared ones: unexpected {extra}, missing {lost}")


def validate(params: Params, spec: Spec, norm_bound: float | None = None, ranks_may_shrink: bool = False) -> None:
    """Refuse an upload that is not what was declared, before it touches the server's state. Raises UploadError.

    norm_bound: largest Frobenius norm of all leaves together. ranks_may_shrink: a smaller rank than declared is fine
    (HetLoRA prunes) down to 1, a larger one never.
    """
    _named(params, spec)
    for k, v in params.items():
        want = spec[k]
        axis = rank_axis(k)
        shape = list(want.shape)
        if ranks_may_shrink and axis is not None and v.ndim == len(shape) and 1 <= rank(k, v) <= shape[axis]:
            shape[axis] = rank(k, v)
        if list(v.shape) != shape or v.dtype != want.dtype:
            raise UploadError(f"leaf {k} is {list(v.shape)} {v.dtype}, expected {list(want.shape)} {want.dtype}")
    norm = finite(params)
    _stated_norms(params)
    if ranks_may_shrink:
        _one_rank(params)
    if norm_bound is not None and norm > norm_bound:
        raise UploadError(f"norm {norm:.3g} exceeds the bound {norm_bound:.3g}")


def finite(params: Params) -> float:
    """`magnitude`. Raises UploadError for values that are not finite."""
    n = magnitude(params)
    if not math.isfinite(n):
        for k, v in params.items():
            bad = int((~torch.isfinite(v)).sum()) if v.is_floating_point() else 0
            if bad:
                raise UploadError(f"leaf {k} has {bad} non-finite values of {v.numel()}, expected finite numbers")
    return n


def magnitude(params: Params) -> float:
    """Frobenius norm of all leaves together, in float64; infinite or NaN where a value is."""
    leaves = [v for v in params.values() if v.is_floating_point() and v.numel()]
    if not leaves:
        return 0.0
    norms = torch.stack([n.double() for n in torch._foreach_norm(leaves)])
    if not torch.isfinite(norms).all():  # squares of float32 that overflow are no fault
        norms = torch.stack([v.double().norm() for v in leaves])
    return float(norms.norm())


def finite_state(params: Params, bound: float | None = None) -> str | None:
    """Why leaves must not become a server's state: a value that is not finite, or a norm above `bound`; None where all is well."""
    n = magnitude(params)
    if not math.isfinite(n):
        bad = [str(k) for k, v in params.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
        return f"{len(bad)} leaves are not finite, {bad[0] if bad else 'in their norm'} first"
    if bound is not None and n > bound * (1 + SLACK):
        return f"their norm {n:.3g} exceeds {bound:.3g}, which no aggregate of the uploads can have"
    return None


def _stated_norms(params: Params) -> None:
    """Norms that a client states are no negative numbers, and that of a whole model is the root of its layers' squares. One
    whose factors do not travel cannot be computed from what does."""
    stated: dict[str, dict[str, float]] = {}
    for k, v in params.items():
        if k.part == "norm" and not v.ndim:
            if v < 0:
                raise UploadError(f"leaf {k} is {float(v):.3g}, expected a norm, which is never negative")
            stated.setdefault(k.adapter, {})[k.layer] = float(v)
    for adapter, layers in stated.items():
        whole, each = layers.pop("", None), math.hypot(*layers.values())
        if layers and whole is not None and abs(whole - each) > 1e-2 * max(whole, each):
            raise UploadError(f"leaf {adapter}//norm is {whole:.3g}, expected {each:.3g}: that of its layers together")


def _one_rank(params: Params) -> None:
    """Halves of one adapter have one rank, and it is the one they state; a stated rank without a layer is all layers'."""
    stated = {(k.adapter, k.layer): int(v) for k, v in params.items() if k.part == "rank" and v.numel() == 1}
    for (adapter, layer), r in stated.items():
        if r < 1:
            raise UploadError(f"leaf {adapter}/{layer}/rank is {r}, expected 1 or more")
    at: dict[tuple[str, str], int] = dict(stated)
    for k, v in params.items():
        if rank_axis(k) is None:
            continue
        r, want = rank(k, v), stated.get((k.adapter, ""), at.setdefault((k.adapter, k.layer), rank(k, v)))
        if r != want:
            raise UploadError(
                f"leaf {k} has rank {r}, expected {want}: that of another leaf of its layer, or the stated one"
            )


_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_ORDER = {dtype: i for i, dtype in enumerate(_DTYPES)}


def _json(header: Mapping[str, Any] | None) -> str:
    return json.dumps(dict(header or {}), separators=(",", ":"), sort_keys=True)
