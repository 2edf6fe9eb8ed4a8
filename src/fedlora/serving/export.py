"""The models of a finished run: whose deltas to serve, and writing them as PEFT folders."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ..checkpoints import peft, pretrained
from ..errors import DataError, StateError, near
from ..federation import inputs
from ..federation.callbacks import Callback
from ..federation.run import Federation
from ..federation.views import served, whole
from ..methods.contract import ServerState
from ..recipe.build import tokenizer_of
from ..training.tasks import TASKS
from ..tree import Params

if TYPE_CHECKING:
    from torch import nn

    from ..recipe import Recipe


def server_of(fed: Federation) -> ServerState:
    """The last committed round."""
    loaded = fed.store.load_server()
    if loaded is None:
        raise StateError(f"{fed.store.root}: no round is committed yet; run it first")
    fed.store.same({"base": inputs.base(fed.model.base)})
    return ServerState.restored(*loaded)


def deltas_of(fed: Federation, client: str | None) -> Params:
    """Model-ready deltas of a client's personal model, or of the global one for None."""
    if client is not None and client not in fed.index:
        raise DataError(f"client {client!r} is not in this run; {near(client, fed.data.ids)}")
    k = None if client is None else fed.index[client]
    ready = None if client is None else fed.store.load_served(client)
    if ready is not None:  # a site has no server's state, but what its clients ended with
        return ready
    engine, server = fed.engine(Callback()), server_of(fed)
    return whole(fed, engine, server) if k is None else served(fed, engine, server, [k], "personal")[0]


def export_models(recipe: Recipe, fed: Federation, out: Path, clients: Sequence[str], merged: bool) -> list[Path]:
    """Write one PEFT (or merged) folder for the global model, or one per client under `out`; returns the folders."""
    source = pretrained.locate(recipe.model.name)
    names = TASKS[recipe.model.task].names(fed.data)

    def plain() -> nn.Module:
        with warnings.catch_warnings():  # what there is to say of the head was said when the run was opened
            warnings.simplefilter("ignore")
            loaded = pretrained.load(
                recipe.model.name, recipe.model.task, len(names) or 2, seed=recipe.run.seed, revision=recipe.model.revision,
                names=names,
            )  # fmt: skip
        return loaded.base

    head = tuple(s.name for s in fed.model.groups.get("head", ()))
    tokenizer = tokenizer_of(recipe)
    written = []
    whose: list[str | None] = [*clients] or [None]
    for client in whose:
        folder = out if client is None else out / quote(client, safe="")
        deltas = deltas_of(fed, client)
        written.append(peft.export(plain, head, deltas, recipe.model.task, source, folder, merged, tokenizer))
    return written
