"""The Python face of the command line: run a recipe, open a finished run, adapt your own module."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor, nn

from . import report
from .arguments import checked
from .errors import ConfigError, DataError, Problem, StateError
from .federation.callbacks import Callback
from .federation.outcome import Summary
from .federation.run import Federation
from .files import sealed
from .model.adapted import Adapted
from .model.targets import matching
from .recipe import Recipe, build, expand, expand_dict, folders, places
from .recipe.checked import Check
from .recipe.checked import checked as look
from .recipe.sweep import begun
from .report import frames
from .report.budgets import Quantity
from .report.read import records
from .serving import evaluate as scoring
from .serving import export
from .serving.predict import predict_columns, predict_texts
from .training.metrics import Scores
from .training.task import Prediction
from .tree import Params

if TYPE_CHECKING:
    import pandas


@checked
def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    sets: Sequence[str] | Mapping[str, Any] = (),
    output: str | Path | None = None,
    watch: Callback | None = None,
) -> Summary:
    """Run a recipe (a YAML file, a mapping or a Recipe) to its end; returns the summary, as in summary.json.

    sets: fields that take other values, {"train.lr": 1e-3} or ["train.lr=1e-3"]. A folder that holds an interrupted run of
    the same recipe is taken up where it was. Raises ConfigError with all problems of the recipe at once.
    """
    return build.federation(_recipe(recipe, sets), output).run(watch)


@checked
def check(
    recipe: str | Path | Mapping[str, Any] | Recipe, sets: Sequence[str] | Mapping[str, Any] = (), measure: bool = True
) -> Check:
    """What a recipe would do: facts of its run and its data, and what it takes by a few steps that are thrown away.

    sets: as in run. measure: whether these steps are tried; without them memory is estimated and time is not told. Raises
    ConfigError with all problems of the recipe at once.
    """
    return look(_recipe(recipe, sets), measure)


@checked
def sweep(
    recipe: str | Path | Mapping[str, Any],
    sets: Sequence[str] | Mapping[str, Any] = (),
    output: str | Path = "runs",
    watch: Callback | None = None,
) -> list[Summary]:
    """Run every combination of a recipe's section sweep, each in a folder of its own below `output`; returns their summaries.

    sets: as in run; {"sweep.run.seed": [0, 1]} gives a list to sweep over. Runs that are done already are not trained again, so
    an interrupted sweep goes on when it is called again. fl.compare(output) compares them.
    """
    texts = _sets(sets)
    recipes = expand_dict(recipe, texts) if isinstance(recipe, Mapping) else expand(recipe, texts)
    where = folders(recipes, Path(output), Path(output))
    begun(Path(output), recipes, where)
    return [build.federation(r, f).run(watch) for r, f in zip(recipes, where, strict=True)]


@checked
def results(folder: str | Path | Sequence[str | Path] = "runs") -> pandas.DataFrame:
    """All runs at or below a folder, or several, as a pandas DataFrame: one row for each run and view.

    Columns: folder, name, method, seed, state, view, chosen_round, every metric on test, costs, and each field of the recipes in
    which the runs differ. Raises StateError where there is no run.
    """
    return frames.results(_several(folder))


@checked
def compare(
    folder: str | Path | Sequence[str | Path] = "runs", output: str | Path | None = None, equal: Quantity | None = None
) -> pandas.DataFrame:
    """The table of `fedlora compare` as a pandas DataFrame: one row for each setting, seeds together, for the runs at or below a
    folder or several. output: where the page with curves is written, if at all. equal: "steps", "rows", "tokens", "bytes" or "seconds": every run is
    read up to where all have used equally much, per client. Raises StateError where there is no run."""
    found = frames.found(_several(folder))
    table = frames.comparison(found, equal)
    if output is not None:
        report.write_comparison(found, output, equal=equal)
    return table


def _several(folder: str | Path | Sequence[str | Path]) -> list[str | Path]:
    return [folder] if isinstance(folder, str | Path) else list(folder)


def _sets(sets: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Overrides as the command writes them. Raises ConfigError for a text alone."""
    if isinstance(sets, Mapping):
        return [f"{path}={json.dumps(_plain(path, v))}" for path, v in sets.items()]
    return list(sets)


def _plain(path: str, value: Any) -> Any:
    """A value that a recipe can hold. Raises ConfigError for any other."""
    value = value.item() if isinstance(value, np.generic) else value
    value = str(value) if isinstance(value, Path) else value
    if isinstance(value, Mapping):
        return {k: _plain(f"{path}.{k}", v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(path, v) for v in value]
    if isinstance(value, str | int | float | bool | None):
        return value
    raise ConfigError([Problem(path, value, "a value that a recipe can hold: a number, a text, a list or null")])


def _recipe(recipe: str | Path | Mapping[str, Any] | Recipe, sets: Sequence[str] | Mapping[str, Any]) -> Recipe:
    texts = _sets(sets)
    if isinstance(recipe, Recipe):
        return recipe.override(*texts) if texts else recipe
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(dict(recipe), sets=texts)
    return Recipe.load(Path(recipe), sets=texts)


@dataclass(repr=False)
class Run:
    """A run folder, opened: predict with and export the models it holds. recipe: None for a run made of objects."""

    folder: Path
    recipe: Recipe | None
    federation: Federation

    def __repr__(self) -> str:
        f = self.federation
        return f"Run({self.folder}: {f.method.title}, {f.training} clients)"

    @checked
    def deltas(self, client: str | None = None, round: Literal["best", "last"] = "best") -> Params:
        """Model-ready leaves of a client's personal model, or of the global one, of the best or the last round."""
        return export.deltas_of(self.federation, client, round)

    @checked
    def predict(
        self, texts: Sequence[Any] | Mapping[str, Any], client: str | None = None, new_tokens: int = 64,
        round: Literal["best", "last"] = "best",
    ) -> list[Prediction]:  # fmt: skip
        """What a client's model, or the global one, says of each text, pair of texts, or row (a dict by column).

        The recipe's template is filled as in training. Of a run made of objects, texts are its columns: {"x": array [n ...]}.
        """
        deltas = self.deltas(client, round)
        if self.recipe is None:
            return predict_columns(self.federation, deltas, texts)
        if isinstance(texts, Mapping):
            raise DataError("predict: got one dict, expected a list of texts or rows; write [{...}]")
        tokenizer, data = build.tokenizer_of(self.recipe), self.recipe.data.model_dump()
        return predict_texts(self.federation, tokenizer, deltas, texts, data, new_tokens)

    @checked
    def evaluate(
        self, data: str | Path | None = None, clients: Sequence[str] = (), sets: Sequence[str] | Mapping[str, Any] = (),
        round: Literal["best", "last"] = "best", split: str = "test",
    ) -> dict[str, Scores]:  # fmt: skip
        """Scores of clients' models, or of the global one, by model: on `data` (a file, folder or hub id), or on the run's own split.

        sets: how texts are written and scored, such as {"generation.scores": ["bleu"]}.
        """
        source = None if data is None else str(data)
        if self.recipe is None:
            if source is not None or sets:
                raise DataError("evaluate: a run made of objects is scored on its own rows; leave data and sets out")
            return scoring.own_scores(self.federation, clients, split, round)
        _, found = scoring.evaluate(self.recipe, self.federation, clients, source, split, _sets(sets), round)
        return {e.model: e.scores for e in found}

    @checked
    def export(
        self, out: str | Path, clients: Sequence[str] = (), merged: bool = False, round: Literal["best", "last"] = "best"
    ) -> list[Path]:  # fmt: skip
        """Write PEFT folders (or merged models) for the global model, or one per client under `out`.

        round: the best one on validation (on test without one), whose scores the summary tells, or the last one.
        """
        if self.recipe is None:
            raise StateError(
                f"{self.folder}: a run made of objects names no pretrained model, so there is nothing that PEFT could load; "
                "run.deltas() gives the trained leaves"
            )
        return export.export_models(self.recipe, self.federation, Path(out), clients, merged, round)[1]


@checked
def load(folder: str | Path, federation: Federation | None = None) -> Run:
    """Open a run. federation: for one made of objects, the same fl.Federation again, since a folder holds no Python objects.

    Raises StateError for a folder that holds no run, or another one.
    """
    folder = Path(folder)
    if federation is None:
        if folder.is_dir() and not (folder / "recipe.yaml").exists() and _of_objects(folder):
            raise StateError(
                f"{folder}: a run made of objects, which no folder holds; make them again and give them, as in "
                f"fl.load({str(folder)!r}, fl.Federation(model, task, data, method, {str(folder)!r}))"
            )
        recipe = places.located(places.recipe_in(folder), folder)
        return Run(folder, recipe, build.federation(recipe, folder))
    about = records(folder)
    if about.hash != federation.recipe_hash:
        raise StateError(
            f"{folder}: belongs to a run {about.hash}, not to {federation.recipe_hash}; give the federation that it was made of, "
            "with the same method, model, data and seed"
        )
    return Run(folder, None, federation if federation.store.root == folder else replace(federation, output=folder))


def _of_objects(folder: Path) -> bool:
    found = sealed.read(folder / "recipe.json")
    return found is not None and not found.get("recipe")


@checked
def adapt(
    base: nn.Module,
    targets: str | Sequence[str],
    head: Sequence[str] = (),
    call: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] | None = None,
) -> Adapted:
    """A frozen base from any nn.Module.

    targets: name endings or one regular expression, as in PEFT; head: module paths trained densely. `call` turns
    (base, inputs [N ...]) into the output [N ...]; default `base(**inputs)`.
    """
    chosen = [n for n in matching(base, targets) if n not in head]
    return Adapted(base, {"target": chosen, "head": tuple(head)}, call)
