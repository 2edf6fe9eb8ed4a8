"""What `fedlora methods` and the docs say of each method, read off the method itself."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from torch import nn

from ..layers import Layer
from ..tree import stack
from .contract import Client, Context, Method, RoundInfo


def facts(m: type[Method]) -> dict[str, Any]:
    """Name, paper, what is shared and what stays personal (as adapter.part), hyperparameters with defaults."""
    method: Any = m()
    shared, personal = leaves(method)
    return {
        "name": m.name,
        "title": m.title,
        "paper": m.paper,
        "what": (inspect.getdoc(m) or "").splitlines()[0],
        "shared": shared,
        "personal": personal,
        "second_order": method.second_order,
        "options": {f.name: _shown(getattr(method, f.name)) for f in fields(method) if f.name != "optimizer"},
    }


def leaves(method: Any) -> tuple[list[str], list[str]]:
    """What a method sends, either way, and what it keeps in its first round, as parts of an adapter and "head"."""
    layer = (Layer("layer", 64, 64, module=nn.Linear(64, 64)),)
    context = Context({"head": (Layer("head", 2, 64),), "target": layer} | {g: layer for g in method.groups}, 0)
    client = Client("any", 1)
    down = method.broadcast(context, method.init(context), client)
    kept = method.keep(context, client)
    up, _ = method.finish(method.begin(context, RoundInfo(0, 1), stack([down]), stack([kept])))
    label = lambda p: sorted({k.adapter if k.adapter == "head" else f"{k.part}" for k in p if "~" not in k.adapter})  # noqa: E731
    return label([k for k in down if not method.frozen(k)] + list(up)), label(kept)


def _shown(value: Any) -> Any:
    """A hyperparameter's default; a method inside a method by its name."""
    return value.name if isinstance(value, Method) else value
