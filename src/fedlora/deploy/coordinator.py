"""A recipe as the server of a deployment sees it: model and method, and no data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.federated import roster
from ..errors import ConfigError, Problem, StateError
from ..federation.guards.bound import Bound
from ..federation.guards.dp import DP
from ..federation.guards.guard import Place
from ..federation.guards.secagg import SecAgg
from ..federation.run import Federation
from ..federation.setting import Sampling
from ..methods.contract import Method
from ..recipe import Recipe, build
from ..training.tasks import TASKS
from .attendance import Link
from .audit import digest
from .remote import Remote, Terms
from .site import FOLDER_OF_SERVER, SHOWN


def check(recipe: Recipe) -> None:
    """Raise ConfigError with everything in a recipe that sites cannot do."""
    bad: list[Problem] = []
    if TASKS[recipe.model.task].named and recipe.data.classes is None:
        bad.append(
            Problem(
                "data.classes", None, "the names of the classes",
                "list them: a site knows its own labels only, and does not tell others which it holds",
            )
        )  # fmt: skip
    if recipe.method_object().pooled:
        bad.append(
            Problem("method.name", recipe.method.name, "a method whose data stay with their clients", "choose another")
        )
    if odd := [v for v in recipe.evaluation.views if v not in SHOWN]:
        bad.append(
            Problem("evaluation.views", odd, f"{' or '.join(SHOWN)}", "the others need data of several sites at once")
        )
    if recipe.evaluation.clients is not None:
        bad.append(
            Problem(
                "evaluation.clients",
                recipe.evaluation.clients,
                "null",
                "every client that is here scores its own model",
            )
        )
    if recipe.model.adapter is not None:
        what = "merge the adapter into the base and give every site that"
        bad.append(Problem("model.adapter", recipe.model.adapter, "null in a deployment", what))
    if any(isinstance(g, SecAgg) for g in recipe.guard_objects()):
        what = "sites do not speak it yet, and the server would see every upload: drop it"
        bad.append(Problem("federation.guards", "secagg", "no secure aggregation in a deployment", what))
    if recipe.federation.cohort == "poisson":
        what = "who is online is no coin of the server's"
        bad.append(Problem("federation.cohort", "poisson", "uniform or fixed in a deployment", what))
    if recipe.federation.patience is not None:
        bad.append(
            Problem(
                "federation.patience", recipe.federation.patience, "null in a deployment", "stop the server instead"
            )
        )
    if recipe.train.class_weights == "balanced":
        bad.append(
            Problem("train.class_weights", "balanced", "a list in a deployment", "a site knows its own classes only")
        )
    if recipe.federation.start is not None:
        bad.append(
            Problem("federation.start", recipe.federation.start, "null in a deployment", "sites keep their own leaves")
        )
    if recipe.evaluation.analyses:
        bad.append(
            Problem("evaluation.analyses", list(recipe.evaluation.analyses), "none", "they look into personal leaves")
        )
    if recipe.partition.permute_labels or recipe.partition.unseen:
        bad.append(Problem("partition", "permute_labels or unseen", "neither", "sites are as they are"))
    if bad:
        raise ConfigError(bad)


def coordinator(
    recipe: Recipe, output: str | Path | None, link: Callable[[], Link], say: Callable[[str], None] = lambda text: None
) -> Federation:
    """The server's federation: its clients are those that come. link: opened when the run starts. Raises ConfigError."""
    check(recipe)
    nobody = roster([], {"train": []}, recipe.data.classes or ())
    d = recipe.deployment
    terms = Terms(d.clients or recipe.federation.min_clients, d.deadline, d.over_selection, d.attempts)
    fed = build.federation(recipe, output, lambda r, tokenizer: nobody)
    fed.sampling = bounded(fed.sampling, fed.method, d.bound)
    fed.deployed = deployed(recipe, terms)
    told = told_to_sites(recipe)

    def runtime(fed: Federation, watch: Any) -> Remote:
        say(f"sites accept this recipe with --accept {digest(told)}")
        return Remote(fed, watch, link(), terms, told, say)

    fed.runtime = runtime
    return fed


def bounded(sampling: Sampling, method: Method, times: float | None) -> Sampling:
    """The sampling of a deployment: with the guard `bound` as the first to see what arrives, unless the recipe has its own."""
    own = any(isinstance(g, (Bound, DP)) for g in sampling.guards)  # dp bounds every client by itself
    if times is None or own or Bound(times).cannot(method):
        return sampling
    return replace(sampling, guards=(*sampling.guards, Bound(times)))


def deployed(recipe: Recipe, terms: Terms) -> Place:
    """Where guards stand at a server. Who is online is nobody's random choice, so no sampling makes privacy cheaper: every client
    is taken to be in every round."""
    n = recipe.federation.clients_per_round
    most = terms.clients if n is None or isinstance(n, float) else n
    return Place(recipe.run.seed, recipe.federation.rounds, most, float(most), "everybody", fresh=True)


def elsewhere(name: str) -> bool:
    """Whether a model's name is a place in one machine's file system."""
    return Path(name).is_absolute() or name.startswith("~")


def told_to_sites(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe a site is told: all but where the server's own files are."""
    raw: dict[str, Any] = json.loads(json.dumps(recipe.resolved()))
    raw["data"] |= {"source": "(of the site)", "validation": None, "test": None}
    if elsewhere(raw["model"]["name"]):
        raw["model"]["name"] = FOLDER_OF_SERVER + Path(raw["model"]["name"]).name
    raw["run"]["output"] = "."
    return raw


def reopened(recipe: Recipe, folder: Path) -> Federation:
    """A server's run from its folder, to serve or export its shared model."""

    def no_link() -> Link:
        raise StateError(f"{folder}: this run is not being served")

    fed = coordinator(recipe, folder, no_link)
    known = fed.store.read_json("partition.json")
    if not known.get("sizes"):
        raise StateError(f"{folder}: no client has joined this run yet")
    fed.enrol(roster(known["ids"], known["sizes"], fed.data.label_names))
    return fed
