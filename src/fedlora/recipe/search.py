"""`sweep.search`: hyperparameters of each method chosen on validation, by short runs of which every method gets the same number.

    sweep:
      method.name: [homlora, pf2lora]
      run.seed: [0, 1, 2, 3, 4]
      search:
        fields: {train.lr: [1.0e-4, 1.0e-3]}                       # candidates of every method
        methods: {pf2lora: {method.lr_personal: [0.01, 0.1]}}      # and more of one
        rounds: 3                                                  # of a trial
        trials: 2                                                  # of each setting

A setting is a combination of the other axes without seeds. Its candidates are the product of the lists; where that is more than
`trials`, a draw without replacement from `seed` decides which are tried. All trials have one seed, which no run of the sweep has.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError

from ..errors import ConfigError, Problem
from ..seeds import np_rng
from . import problems
from .core import Recipe
from .overrides import check
from .sections import Count, Natural, Section, Text
from .sweep import Pairs, Parts, labelled, read, unique

Lists = dict[Text, Annotated[list[Any], Field(min_length=1)]]


class Search(Section):
    """How hyperparameters are chosen before a sweep runs: by short runs, on validation."""

    fields: Lists = Field(default_factory=dict)
    """Paths of every method with the values to try."""
    methods: dict[Text, Lists] = Field(default_factory=dict)
    """Method -> further paths of this method with the values to try."""
    rounds: Count | None = None
    """Of a trial; null takes federation.rounds."""
    trials: Count | None = None
    """Of each setting, the same for all; null takes the smallest number of candidates that a setting has."""
    seed: Natural | None = None
    """Of all trials; null takes the one after the largest of run.seed."""


@dataclass(frozen=True)
class Trial:
    """One short run. choice: the path of each searched field and its value."""

    choice: Pairs
    recipe: Recipe


@dataclass(frozen=True)
class Setting:
    """What is compared, over seeds: its name, its own pairs of path and value, and its trials."""

    name: str
    method: str
    pairs: Pairs
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Plan:
    """A sweep whose hyperparameters are searched. settings: in the order of the sweep."""

    parts: Parts
    settings: tuple[Setting, ...]
    trials: int
    rounds: int
    seed: int

    def runs(self, chosen: Sequence[Pairs]) -> list[Recipe]:
        """The runs of the sweep, with the chosen pairs of each setting. Raises ConfigError."""
        out: list[Recipe] = []
        bad: list[Problem] = []
        for s, pick in zip(self.settings, chosen, strict=True):
            for seed in self.parts.seeds:
                try:
                    out.append(self.parts.recipe([*s.pairs, *pick, *seed], [*s.pairs, *seed]))
                except ConfigError as e:
                    bad += e.problems
        if bad:
            raise ConfigError(unique(bad))
        return out


def plan(raw: Mapping[str, Any], sets: Sequence[str] = ()) -> Plan | None:
    """The search that a recipe's mapping describes; None where it has none. Raises ConfigError with all problems."""
    p = read(raw, sets)
    if p.search is None:
        return None
    bad: list[Problem] = list(p.problems)
    search, odd = _validated(p.search)
    bad += odd
    if search is None or bad:
        raise ConfigError(unique(bad or [Problem("sweep", raw.get("sweep"), "at least one setting")]))
    bad += _odd(search)
    if bad:
        raise ConfigError(unique(bad))
    seeds = [v for pairs in p.seeds for path, v in pairs if path == "run.seed" and isinstance(v, int)]
    seed = max(seeds, default=int(_field(p.base, "run", "seed", 0))) + 1 if search.seed is None else search.seed
    if seed in seeds:
        bad.append(Problem("sweep.search.seed", seed, "a seed that no run of the sweep has", "take another"))
    rounds = search.rounds or int(_field(p.base, "federation", "rounds", 0)) or None
    settings: list[Setting] = []
    for pairs in p.settings:
        try:
            settings.append(_setting(p, search, pairs, seed, rounds))
        except ConfigError as e:
            bad += e.problems
    used = {s.method for s in settings}
    bad += [
        Problem(f"sweep.search.methods.{m}", m, "a method of this sweep", f"it has {', '.join(sorted(used))}")
        for m in search.methods
        if settings and not bad and m not in used
    ]
    least = min((len(s.trials) for s in settings), default=0)
    trials = search.trials or least
    if settings and trials > least:
        short = min(settings, key=lambda s: len(s.trials))
        bad.append(
            Problem("sweep.search.trials", trials, f"at most {least}, the candidates of {short.name}: every method gets the same number",
                    "name more values to try")
        )  # fmt: skip
    if bad:
        raise ConfigError(unique(bad))
    first = settings[0].trials[0].recipe
    if not _validates(first):
        raise ConfigError(
            [
                Problem(
                    "partition.validation",
                    first.partition.validation,
                    "rows to choose on: a share above 0, or data.validation",
                )
            ]
        )
    some = tuple(Setting(s.name, s.method, s.pairs, _drawn(s.trials, trials, seed)) for s in settings)
    return Plan(p, some, trials, first.federation.rounds, seed)


def best(scores: Sequence[float | None], lower: bool) -> int | None:
    """The place of the best score, the first of equals; None where no trial has one."""
    have = [(-s if lower else s, -i) for i, s in enumerate(scores) if s is not None and math.isfinite(s)]
    return -max(have)[1] if have else None


def edges(trials: Sequence[Trial], at: int) -> list[str]:
    """Fields whose chosen number is the smallest or the largest of three or more: a better one may lie beyond."""
    out = []
    for path, value in trials[at].choice:
        tried = sorted({v for t in trials for p, v in t.choice if p == path and isinstance(v, (int, float))})
        if len(tried) > 2 and value in (tried[0], tried[-1]):
            out.append(path)
    return out


def _validated(raw: Any) -> tuple[Search | None, list[Problem]]:
    """The section, or what is wrong with it."""
    where = "sweep.search"
    if not isinstance(raw, Mapping):
        return None, [Problem(where, raw, "a mapping", "write search: {fields: {train.lr: [1e-4, 1e-3]}}")]
    try:
        return Search.model_validate_json(problems.dumps(where, raw), strict=True), []
    except ValidationError as e:
        meanings = {n: f.description or "" for n, f in Search.model_fields.items()}
        return None, problems.of_fields(where, e, raw, dict.fromkeys(Search.model_fields, None), meanings)
    except ConfigError as e:
        return None, list(e.problems)


def _odd(search: Search) -> list[Problem]:
    """Paths that no recipe has, and a search of nothing."""
    bad = [
        Problem(f"sweep.search.{where}.{path}", values, wrong.expected, wrong.remedy)
        for where, lists in [("fields", search.fields), *((f"methods.{m}", v) for m, v in search.methods.items())]
        for path, values in lists.items()
        if (wrong := check(path, values)) is not None
    ]
    if not search.fields and not any(search.methods.values()):
        bad.append(
            Problem("sweep.search.fields", {}, "at least one field to search", "write fields: {train.lr: [...]}")
        )
    return bad


def _setting(p: Parts, search: Search, pairs: Pairs, seed: int, rounds: int | None) -> Setting:
    """A setting with all its candidates as trials."""
    plain = p.recipe(pairs, pairs)
    method = plain.method.name
    lists = {**search.fields, **search.methods.get(method, {})}
    trials: list[Trial] = []
    bad: list[Problem] = []
    short = [("run.seed", seed), *([("federation.rounds", rounds)] if rounds else [])]
    for values in itertools.product(*lists.values()):
        choice = list(zip(lists, values, strict=True))
        try:
            trials.append(Trial(choice, p.recipe([*pairs, *choice, *short], [*pairs, *choice])))
        except ConfigError as e:
            bad += e.problems
    if bad:
        raise ConfigError(bad)
    return Setting("-".join(labelled(pairs)) or plain.name, method, pairs, tuple(trials))


def _drawn(trials: tuple[Trial, ...], n: int, seed: int) -> tuple[Trial, ...]:
    """`n` of them in their order."""
    if n == len(trials):
        return trials
    return tuple(trials[i] for i in sorted(np_rng("search", seed).permutation(len(trials))[:n]))


def _validates(r: Recipe) -> bool:
    return r.partition.validation > 0 or r.data.validation is not None


def _field(raw: Mapping[str, Any], section: str, field: str, usual: Any) -> Any:
    inner = raw.get(section)
    value = inner.get(field, usual) if isinstance(inner, Mapping) else usual
    return value if isinstance(value, int) and not isinstance(value, bool) else usual
