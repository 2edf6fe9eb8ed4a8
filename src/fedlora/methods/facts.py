"""What `fedlora methods` and the docs say of each method, read off the method itself."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from ..method import Method, Scene
from ..model import Site


def facts(m: type[Method]) -> dict[str, Any]:
    """Name, paper, what is shared and what stays personal (as adapter.part), hyperparameters with defaults."""
    method: Any = m()
    layer = (Site("layer", 512, 512),)
    scene = Scene({"head": (Site("head", 2, 512),), "target": layer} | {g: layer for g in method.groups}, 0)
    from ..method import Client

    client = Client("any", 1)
    down = method.broadcast(scene, method.init(scene), client)
    kept = method.keep(scene, client)
    label = lambda p: sorted({k.adapter if k.adapter == "head" else f"{k.part}" for k in p if "~" not in k.adapter})  # noqa: E731
    return {
        "name": m.name,
        "title": m.title,
        "paper": m.paper,
        "what": (inspect.getdoc(m) or "").splitlines()[0],
        "shared": label(down),
        "personal": label(kept),
        "second_order": method.second_order,
        "options": {f.name: _shown(getattr(method, f.name)) for f in fields(method) if f.name != "optimizer"},
    }


def _shown(value: Any) -> Any:
    """A hyperparameter's default; a method inside a method by its name."""
    return value.name if isinstance(value, Method) else value
