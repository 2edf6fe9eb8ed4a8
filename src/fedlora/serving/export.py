"""The models of a finished run: whose deltas to serve, and writing them as PEFT folders."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ..checkpoints import peft, pretrained
from ..errors import DataError, StateError, near
from ..federation import inputs
from ..federation.callbacks import Callback
from ..federation.records import read_lines
from ..federation.run import Federation
from ..federation.store import Which
from ..federation.summary import chosen_round
from ..federation.views import served, whole
from ..methods.contract import ServerState
from ..recipe.build import tokenizer_of
from ..training.tasks import TASKS
from ..tree import Params
from .card import card

if TYPE_CHECKING:
    from ..recipe import Recipe


@dataclass(frozen=True)
class Served:
    """Whose models: the server's state and which round's it is. chosen_on: the split on which the best round was chosen."""

    server: ServerState | None  # None at a site, which has what its clients ended with
    round: int | None
    best: int | None
    chosen_on: str = "validation"

    def __str__(self) -> str:
        if self.round is None:
            return "the round with which the run ended at this site"
        if self.best is None:
            return f"round {self.round}, the last"
        if self.round == self.best:
            return f"round {self.round}, the best on {self.chosen_on}"
        return f"round {self.round}, the last; round {self.best} is the best on {self.chosen_on}"


def served_of(fed: Federation, which: Which = "best") -> Served:
    """The state of the best or the last committed round. Raises StateError where none is committed."""
    loaded = fed.store.load_state(which)
    if loaded is None:
        raise StateError(f"{fed.store.root}: no round is committed yet; run it first")
    fed.store.same({"base": inputs.base(fed.model.base)})
    best, split = chosen_round(read_lines(fed.store.root), fed.task.metric, fed.task.lower)
    return Served(ServerState.restored(*loaded), loaded[0], best, split)


def deltas_of(fed: Federation, client: str | None, which: Which = "best") -> Params:
    """Model-ready deltas of a client's personal model, or of the global one for None, of the best or the last round."""
    return models_of(fed, [client], which)[1][0]


def need_client(client: str, ids: Sequence[str]) -> None:
    """Raise DataError for a client that is not among those of the run."""
    if client not in ids:
        raise DataError(f"client {client!r} is not in this run; {near(client, ids)}")


def models_of(fed: Federation, clients: Sequence[str | None], which: Which = "best") -> tuple[Served, list[Params]]:
    """The round, and the model-ready deltas of each client; None is the global model. Raises DataError for a stranger."""
    for client in clients:
        if client is not None:
            need_client(client, fed.data.ids)
    ended = [None if c is None else fed.store.load_served(c) for c in clients]
    if all(p is not None for p in ended):  # a site has no server's state, but what its clients ended with
        return Served(None, None, None), [p for p in ended if p is not None]
    of = served_of(fed, which)
    assert of.server is not None
    engine = fed.engine(Callback())
    return of, [
        whole(fed, engine, of.server) if c is None else served(fed, engine, of.server, [fed.index[c]], "personal")[0]
        for c in clients
    ]


def export_models(
    recipe: Recipe, fed: Federation, out: Path, clients: Sequence[str], merged: bool, which: Which = "best"
) -> tuple[Served, list[Path]]:
    """Write one PEFT (or merged) folder for the global model, or one per client under `out`; which round's, and the folders."""
    source = pretrained.known_as(recipe.model.name)
    names = TASKS[recipe.model.task].names(fed.data)

    def loaded() -> pretrained.Pretrained:
        with warnings.catch_warnings():  # what there is to say of the head was said when the run was opened
            warnings.simplefilter("ignore")
            return pretrained.load(
                recipe.model.name, recipe.model.task, len(names) or 2, seed=recipe.run.seed, revision=recipe.model.revision,
                names=names,
            )  # fmt: skip

    head = loaded().head  # saved whether it was trained or not: a base that lacks it would have another drawn
    tokenizer = tokenizer_of(recipe)
    written = []
    whose: list[str | None] = [*clients] or [None]
    of, models = models_of(fed, whose, which)
    for client, deltas in zip(whose, models, strict=True):
        folder = out if client is None else out / quote(client, safe="")
        text = card(recipe, fed, of, client, source, merged)
        written.append(
            peft.export(
                lambda: loaded().base,
                head,
                deltas,
                recipe.model.task,
                source,
                folder,
                merged,
                tokenizer,
                text,
                recipe.model.revision,
            )
        )
    return of, written
