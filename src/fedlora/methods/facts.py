"""What `fedlora methods` and the docs say of each method, read off the method itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.analyses import product_error
from ..layers import Layer
from ..tree import Key, Params, select, stack, unstack
from .contract import Client, Context, Method, RoundInfo, Upload

WIDTH = 768  # of the layer of which bytes are told: a projection of BERT-base
SEEN = 1e-5  # a relative error below this is rounding in fp32


def facts(m: type[Method]) -> dict[str, Any]:
    """What is known of a method with its default hyperparameters; leaves are named by their part, the head as "head".

    trained, shared, personal, frozen: of a client in its first round; frozen leaves come down or follow from the seed. down, up: bytes
    of one client's first messages in fp32 for one layer of WIDTH x WIDTH, without head. exact: whether the product of what two
    clients' uploads become is the mean of their products; None where that is not defined.
    """
    method: Any = m()
    context, down, kept, up, trained = _first(method, WIDTH)
    shared, personal = _sides(method, down, kept, up)
    return {
        "name": m.name,
        "title": m.title,
        "paper": m.paper,
        "family": m.family,
        "what": (inspect.getdoc(m) or "").splitlines()[0],
        "trained": _label(trained),
        "shared": shared,
        "personal": personal,
        "frozen": _label(k for k in [*method.fixed(context), *select(down, method.frozen)] if k.layer),
        "down": _bytes(down),
        "up": _bytes(up) if method.sends else 0,
        "exact": exact(method),
        "second_order": method.second_order,
        "options": {f.name: _shown(getattr(method, f.name)) for f in fields(method) if f.name != "optimizer"},
    }


def leaves(method: Any) -> tuple[list[str], list[str]]:
    """What a method sends, either way, and what it keeps in its first round, as parts of an adapter and "head"."""
    _, down, kept, up, _ = _first(method)
    return _sides(method, down, kept, up)


def _sides(method: Any, down: Params, kept: Params, up: Params) -> tuple[list[str], list[str]]:
    return _label([k for k in down if not method.frozen(k)] + list(up)), _label(kept)


def exact(method: Any) -> bool | None:
    """The exactness meter on two clients that have moved every factor of their first upload at random."""
    context, _, _, up, _ = _first(method)
    moved = [{k: _moved(k, v, seed) for k, v in up.items()} for seed in (1, 2)]
    uploads = [Upload(Client(str(i), n), p) for i, (n, p) in enumerate(zip((1, 3), moved, strict=True))]
    server = method.init(context)
    new = method.aggregate(context, server, uploads)
    frozen = method.fixed(context)
    beside = frozen | method.beside(server)
    error = product_error(
        [(beside | u.params, method.weight(u)) for u in uploads], frozen | method.aggregated(server, new)
    )
    return None if error is None else error < SEEN


def _moved(k: Key, v: Tensor, seed: int) -> Tensor:
    """A matrix of an adapter with noise on it; other leaves as they are."""
    if v.ndim < 2 or k.adapter == "head" or not v.is_floating_point():
        return v
    noise = torch.randn(v.shape, generator=torch.Generator().manual_seed(seed))
    return v + 0.1 * noise


def _first(method: Any, width: int = 64) -> tuple[Context, Params, Params, Params, list[Key]]:
    """A setting of one square layer; what comes down, is kept and goes up in a client's first round without a step; what is trained."""
    layer = (Layer("layer", width, width, module=nn.Linear(width, width)),)
    context = Context({"head": (Layer("head", 2, width),), "target": layer} | {g: layer for g in method.groups}, 0)
    client = Client("any", 1)
    down = method.broadcast(context, method.init(context), client)
    kept = method.keep(context, client)
    work = method.begin(context, RoundInfo(0, 1), stack([down]), stack([kept]))
    up = unstack(method.finish(work)[0], 1)[0]
    plain = [k for k in up | kept if k.part != "rank" and not method.frozen(k)]
    return context, down, kept, up, list(work.get("train", plain))


def _label(leaves: Iterable[Key]) -> list[str]:
    return sorted({k.adapter if k.adapter == "head" else k.part for k in leaves if "~" not in k.adapter})


def _bytes(p: Params) -> int:
    return sum(v.numel() * v.element_size() for k, v in p.items() if k.adapter != "head")


def _shown(value: Any) -> Any:
    """A hyperparameter's default; a method inside a method by its name."""
    return value.name if isinstance(value, Method) else value
