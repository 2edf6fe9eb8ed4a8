"""Compressed messages with error feedback (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019, arXiv:1901.09847).

    client   p = (up - down) + e;  sends c = C(p);  e <- p - c          e is kept by the client, 0 at first
    server   up = down + c

C is one of
    topk     the ceil(share * n) entries of largest magnitude of each leaf, as values and positions
    randk    so many entries drawn at random (Stich et al., NeurIPS 2018, arXiv:1809.07599)
    int4     whole numbers from -7 to 7 times a scale per row, the row's largest magnitude / 7; two numbers a byte

With rounding: stochastic, a number between two steps goes up with the probability of its distance to the lower one, so that int4 is
right in the mean (QSGD: Alistarh et al., NeurIPS 2017, arXiv:1610.02132). Draws are functions of (seed, round, client, leaf).

Choices: random entries travel with their positions, as the largest do. e is what truly did not arrive, the rounding of the
message's precision included. A client that prunes its rank, or whose stage has other leaves, drops the rest of e with them. Facts
that an upload states travel as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...errors import Problem, UploadError
from ...methods.contract import Client, Method, RoundInfo
from ...seeds import rng
from ...tree import Key, Params, cut_rank, pad_rank, rank
from .guard import Guard, no_change, ranked, stated_ranks, values

VALUE, INDEX, NIBBLES, STEP = "~value", "~index", "~nibbles", "~step"  # end the part of a leaf that carries another
MOST = 7  # of four bits with a sign


@dataclass(frozen=True)
class Feedback(Guard):
    """A small message now, the rest of it later. form: topk, randk or int4; share: of the entries that the first two send; rounding: of
    int4; seed: of draws."""

    name: ClassVar[str] = "feedback"
    title: ClassVar[str] = "Compression with error feedback"
    paper: ClassVar[str] = "arXiv:1901.09847"
    remembers: ClassVar[bool] = True
    encodes: ClassVar[bool] = True
    form: Literal["topk", "randk", "int4"] = "topk"
    share: float = 0.1
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int = 0

    def problems(self) -> list[Problem]:
        bad = []
        if self.form not in ("topk", "randk", "int4"):
            bad.append(Problem("form", self.form, "topk, randk or int4"))
        if self.rounding not in ("nearest", "stochastic"):
            bad.append(Problem("rounding", self.rounding, "nearest or stochastic"))
        if not 0 < self.share <= 1:
            bad.append(Problem("share", self.share, "a number in (0, 1]", "0.01 to 0.1 are usual"))
        return bad

    def cannot(self, method: Method) -> str | None:
        return no_change(method) or super().cannot(method)

    def leave(self, up: Params, down: Params, state: Params, info: RoundInfo, client: Client) -> Params:
        return up | {k: v + _like(k, state[k], v) for k, v in values(up, down).items() if k in state}

    def remember(self, meant: Params, arrived: Params, down: Params, state: Params) -> Params:
        return {k: v - arrived[k] for k, v in values(meant, down).items()}

    def encode(self, up: Params, down: Params, info: RoundInfo, client: Client) -> Params:
        carried = values(up, down)
        out = {k: v for k, v in up.items() if k not in carried}
        for k, v in carried.items():
            c = _like(k, v, down[k]) - _like(k, _like(k, down[k], v), down[k])  # in the shape that both sides know
            draw = rng("feedback", self.seed, info.round, client.id, str(k))
            if self.form == "int4":
                out |= _int4(k, c, draw if self.rounding == "stochastic" else None)
            else:
                out |= _some(k, c, self.share, draw if self.form == "randk" else None)
        return out

    def decode(self, message: Params, down: Params) -> Params:
        end = NIBBLES if self.form == "int4" else VALUE
        ranks = stated_ranks(message)
        out = {k: v for k, v in message.items() if "~" not in k.part}
        if whole := sorted(map(str, values(out, down))):
            raise UploadError(f"leaves {whole[:3]} are not compressed, as this run has it")
        for k in message:
            if not k.part.endswith(end):
                continue
            at = k._replace(part=k.part.removesuffix(end))
            if at not in down or at in out:
                raise UploadError(f"leaf {k} carries {at}, which the client was not sent or has sent as it is")
            c = _rows(at, message, down[at]) if self.form == "int4" else _dense(at, message, down[at])
            full = down[at] + c
            r = ranks.get((at.adapter, at.layer), ranks.get((at.adapter, "")))
            out[at] = full if r is None or not ranked(at) else cut_rank(at, full, max(r, 0)).contiguous()
        used = {at._replace(part=at.part + e) for at in out for e in (VALUE, INDEX, NIBBLES, STEP)}
        if stray := sorted(str(k) for k in message if "~" in k.part and k not in used):
            raise UploadError(f"leaves {stray[:3]} belong to no compressed leaf")
        return {k: out[k] for k in sorted(out)}


def _like(k: Key, v: Tensor, like: Tensor) -> Tensor:
    """`v` with the rank of `like`: cut, or padded with zeros."""
    if not ranked(k) or v.shape == like.shape:
        return v
    r = rank(k, like)
    return cut_rank(k, v, r) if rank(k, v) > r else pad_rank(k, v, r)


def _some(k: Key, c: Tensor, share: float, draw: torch.Generator | None) -> Params:
    """The largest entries of c, or random ones: values float32 [n] at ascending flat positions int32 [n]."""
    n = math.ceil(share * c.numel())
    chosen = c.flatten().abs().topk(n).indices if draw is None else torch.randperm(c.numel(), generator=draw)[:n]
    at = chosen.sort().values
    return {
        k._replace(part=k.part + VALUE): c.flatten()[at],
        k._replace(part=k.part + INDEX): at.to(torch.int32 if c.numel() < 2**31 else torch.int64),
    }


def _dense(k: Key, message: Params, like: Tensor) -> Tensor:
    """Inverse of `_some`, in the shape of `like`."""
    value = message[k._replace(part=k.part + VALUE)]
    at = message.get(k._replace(part=k.part + INDEX))
    whole = at is not None and at.dtype in (torch.int32, torch.int64) and at.ndim == value.ndim == 1
    if not whole or at is None or len(at) != len(value) or not value.is_floating_point():
        raise UploadError(f"leaf {k} does not come as values at positions")
    at = at.long()
    if len(at) and not (int(at[0]) >= 0 and int(at[-1]) < like.numel() and bool((at[1:] > at[:-1]).all())):
        raise UploadError(f"leaf {k} has positions that are not ascending from 0 to {like.numel() - 1}")
    return torch.zeros(like.numel()).index_copy(0, at, value.float()).view(like.shape)


def _int4(k: Key, c: Tensor, draw: torch.Generator | None) -> Params:
    """Rows of c as uint8 [rows, ceil(columns / 2)], low half first, and their steps float32 [rows, 1]."""
    rows = c.reshape(-1, c.shape[-1]) if c.ndim else c.reshape(1, 1)
    step = rows.abs().amax(-1, keepdim=True) / MOST
    exact = (rows / step.masked_fill(step == 0, 1.0)).nan_to_num()
    near = (
        exact.round() if draw is None else (exact + torch.rand(exact.shape, generator=draw)).floor().clamp(-MOST, MOST)
    )
    whole = near.to(torch.int16) + MOST + 1
    if whole.shape[1] % 2:
        whole = torch.cat([whole, whole.new_full((len(whole), 1), MOST + 1)], 1)
    packed = (whole[:, 0::2] | (whole[:, 1::2] << 4)).to(torch.uint8)
    return {k._replace(part=k.part + NIBBLES): packed, k._replace(part=k.part + STEP): step}


def _rows(k: Key, message: Params, like: Tensor) -> Tensor:
    """Inverse of `_int4`, in the shape of `like`."""
    packed, step = message[k._replace(part=k.part + NIBBLES)], message.get(k._replace(part=k.part + STEP))
    columns = like.shape[-1] if like.ndim else 1
    rows = like.numel() // max(columns, 1)
    fits = packed.dtype == torch.uint8 and list(packed.shape) == [rows, -(-columns // 2)]
    if not fits or step is None or list(step.shape) != [rows, 1] or not step.is_floating_point():
        raise UploadError(f"leaf {k} does not come as {rows} rows of {columns} numbers of four bits with a step each")
    whole = torch.stack([packed & 15, packed >> 4], -1).reshape(rows, -1)[:, :columns].to(torch.int16) - MOST - 1
    return (whole.float() * step.float()).view(like.shape)
