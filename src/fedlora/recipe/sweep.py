"""One file, many runs: the product of the lists under `sweep`.

    sweep:
      method.name: [homlora, fedsa]     # one run for each combination
      run.seed: [0, 1, 2]
      variants:                         # and for each of these, several fields at once
        - {train.lr: 1e-3}
        - {train.lr: 1e-2, train.steps: 5}

`search` beside them chooses hyperparameters first (search.py).

Overrides hold for every run; one of a swept path replaces its list (and `--set "sweep.run.seed=[0, 1]"` sets a list).
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, Problem
from ..files import sealed
from . import reading
from .core import Recipe
from .overrides import assign, check, parsed

Pairs = list[tuple[str, Any]]


def expand(path: str | Path, sets: Sequence[str] = ()) -> list[Recipe]:
    """The runs that a recipe file describes: one, or all of its sweep. Raises ConfigError with the problems of all."""
    return expand_dict(reading.read(path), sets)


def expand_dict(raw: Mapping[str, Any], sets: Sequence[str] = ()) -> list[Recipe]:
    """`expand` for a mapping such as a YAML file holds."""
    p = read(raw, sets)
    problems = list(p.problems)
    if p.search is not None:
        expected = "a sweep whose fields are all chosen"
        problems.append(Problem("sweep.search", p.search, expected, "fedlora sweep and fedlora.recipe.search make it"))
    recipes: list[Recipe] = []
    for chosen in p.combinations:
        try:
            recipes.append(p.recipe(chosen, chosen))
        except ConfigError as e:
            problems += e.problems
    problems += _twins(recipes)
    if problems:
        raise ConfigError(unique(problems))
    return recipes


@dataclass(frozen=True)
class Parts:
    """A file with a sweep, taken apart. base: the recipe without it; fixed: what --set has set for every run; search: the
    mapping under sweep.search, None without one."""

    base: dict[str, Any]
    fixed: Pairs
    axes: list[list[Pairs]]
    search: Any
    problems: list[Problem]

    @property
    def combinations(self) -> list[Pairs]:
        """One for each run."""
        return _product(self.axes)

    @property
    def settings(self) -> list[Pairs]:
        """One for each setting: all but the axis of seeds."""
        return _product([a for a in self.axes if not _of_seeds(a)])

    @property
    def seeds(self) -> list[Pairs]:
        """The alternatives of the axis of seeds; a single empty one without it."""
        return _product([a for a in self.axes if _of_seeds(a)])

    def recipe(self, pairs: Pairs, named: Pairs) -> Recipe:
        """The recipe with these pairs, called after `named` where the file has a sweep and nobody has given a name. Raises ConfigError."""
        changed, problems = assign(self.base, [*pairs, *self.fixed])
        if (self.axes or named) and not any(path == "name" for path, _ in [*pairs, *self.fixed]):
            changed["name"] = "-".join([str(self.base.get("name", "run")), *labelled(named)])
        try:
            recipe = Recipe.from_dict(changed)
        except ConfigError as e:
            problems += e.problems
        if problems:
            raise ConfigError(problems)
        return recipe


def read(raw: Mapping[str, Any], sets: Sequence[str] = ()) -> Parts:
    """The parts of a mapping such as a YAML file holds. Raises ConfigError where it is no mapping."""
    raw = reading.mapping(raw, "recipe")
    pairs, problems = parsed(sets)
    fixed = [(p, v) for p, v in pairs if not p.startswith("sweep.")]
    given = raw.get("sweep")
    search = given.get("search") if isinstance(given, Mapping) else None
    plain = {k: v for k, v in given.items() if k != "search"} if isinstance(given, Mapping) else given
    axes, wrong = _axes(plain, [(p.removeprefix("sweep."), v) for p, v in pairs if p.startswith("sweep.")])
    axes = [a for a in axes if not (len(a[0]) == 1 and a[0][0][0] in dict(fixed))]
    return Parts({k: v for k, v in raw.items() if k != "sweep"}, fixed, axes, search, [*problems, *wrong])


def _product(axes: list[list[Pairs]]) -> list[Pairs]:
    return [[pair for part in choice for pair in part] for choice in itertools.product(*axes)]


def _of_seeds(axis: list[Pairs]) -> bool:
    return all([path for path, _ in pairs] == ["run.seed"] for pairs in axis)


FILE = "sweep.json"


def begun(
    folder: Path, recipes: Sequence[Recipe], where: Sequence[Path], search: Mapping[str, Any] | None = None
) -> None:
    """Note the runs of a sweep, also those that have not begun. search: what makes the plan of its search anew."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = [
        {"folder": f.relative_to(folder).as_posix(), "recipe": r.model_dump(mode="json", exclude_unset=True)}
        for r, f in zip(recipes, where, strict=True)
    ]
    sealed.write(folder / FILE, {"runs": runs} | ({} if search is None else {"search": search}))


def root(where: Sequence[Path]) -> Path:
    """The folder of a sweep whose runs are in these folders."""
    return Path(os.path.commonpath([f.parent for f in where]))


def folders(recipes: Sequence[Recipe], root: Path, given: Path | None = None) -> list[Path]:
    """The folder of each run of a sweep: inside `given` if there is one, else as run.output says, else inside `root`.

    Raises ConfigError if run.output gives several runs one folder.
    """
    if given or "output" not in recipes[0].run.model_fields_set:
        return [(given or root) / f"{r.name}-{r.hash}" for r in recipes]
    out = [r.output_folder() for r in recipes]
    if len(set(out)) < len(out):
        expected = f"a folder of its own for each of {len(recipes)} runs"
        raise ConfigError([Problem("run.output", recipes[0].run.output, expected, "add {name} or {hash}")])
    return out


def _axes(sweep: Any, extra: Pairs) -> tuple[list[list[Pairs]], list[Problem]]:
    """Each axis as its alternatives, each of these as pairs of path and value."""
    if sweep is None and not extra:
        return [], []
    if sweep is not None and not isinstance(sweep, Mapping):
        return [], [Problem("sweep", sweep, "a mapping of paths to lists", "write sweep: {run.seed: [0, 1, 2]}")]
    axes: list[list[Pairs]] = []
    problems: list[Problem] = []
    for path, values in {**(sweep or {}), **dict(extra)}.items():
        where = f"sweep.{path}"
        if not isinstance(values, list) or not values:
            problems.append(Problem(where, values, "a list of values, at least one", f"write {path}: [...]"))
        elif path == "variants":
            odd = [v for v in values if not isinstance(v, Mapping) or not all(isinstance(k, str) for k in v)]
            problems += [Problem(where, v, "a mapping of paths to values", "write {train.lr: 1e-3}") for v in odd]
            axes.append([list(v.items()) for v in values if v not in odd])
        elif (wrong := check(str(path), values)) is not None:
            problems.append(Problem(where, values, wrong.expected, wrong.remedy))
        else:
            axes.append([[(path, v)] for v in values])
    return ([] if problems else axes), problems


def labelled(chosen: Pairs) -> list[str]:
    """What tells a run from the others of its sweep, fit for a folder's name: "fedsa", "seed1", "lr0.001"."""
    named = [str(v) if isinstance(v, str) else f"{p.rpartition('.')[2]}{v}" for p, v in chosen]
    return [re.sub(r"[^A-Za-z0-9._]+", "-", n).strip("-") or "x" for n in named]


def _twins(recipes: Sequence[Recipe]) -> list[Problem]:
    """Runs of a sweep that are one and the same."""
    first: dict[str, Recipe] = {}
    problems = []
    for r in recipes:
        twin = first.setdefault(r.hash, r)
        if twin is not r:
            problems.append(
                Problem("sweep", f"{twin.name}, {r.name}", "runs that differ", "drop the one or the override")
            )
    return problems


def unique(problems: Sequence[Problem]) -> list[Problem]:
    """Each problem once, though many runs of a sweep have it."""
    return list({(p.field, repr(p.got), p.expected): p for p in problems}.values())
