"""The Python face of the command line: run a recipe, open a finished run, adapt your own module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .federation.callbacks import Callback
from .federation.run import Federation
from .federation.store import Which
from .model.adapted import Adapted
from .model.targets import matching
from .recipe import Recipe, build, places
from .recipe.checked import Check, checked
from .serving import evaluate as scoring
from .serving import export
from .serving.predict import Request, predict_texts
from .training.metrics import Scores
from .training.task import Prediction
from .tree import Params


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    sets: Sequence[str] = (),
    output: str | Path | None = None,
    watch: Callback | None = None,
) -> dict[str, Any]:
    """Run a recipe (a YAML file, a mapping or a Recipe) to its end; returns the summary, as in summary.json.

    A folder that holds an interrupted run of the same recipe is taken up where it was. Raises ConfigError with all
    problems of the recipe at once.
    """
    return build.federation(_recipe(recipe, sets), output).run(watch)


def check(recipe: str | Path | Mapping[str, Any] | Recipe, sets: Sequence[str] = (), measure: bool = True) -> Check:
    """What a recipe would do: facts of its run and its data, and what it takes by a few steps that are thrown away.

    measure: whether these steps are tried; without them memory is estimated and time is not told. Raises ConfigError with all
    problems of the recipe at once.
    """
    return checked(_recipe(recipe, sets), measure)


def _recipe(recipe: str | Path | Mapping[str, Any] | Recipe, sets: Sequence[str]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.from_dict(dict(recipe), sets=list(sets))
    return Recipe.load(Path(recipe), sets=list(sets))


@dataclass
class Run:
    """A run folder, opened: predict with and export the models it holds."""

    folder: Path
    recipe: Recipe
    federation: Federation

    def deltas(self, client: str | None = None, round: Which = "best") -> Params:
        """Model-ready leaves of a client's personal model, or of the global one, of the best or the last round."""
        return export.deltas_of(self.federation, client, round)

    def predict(
        self, texts: Sequence[Request], client: str | None = None, new_tokens: int = 64, round: Which = "best"
    ) -> list[Prediction]:
        """What a client's model, or the global one, says of each text, pair of texts, or row (a dict by column).

        The recipe's template is filled as in training.
        """
        tokenizer, data = build.tokenizer_of(self.recipe), self.recipe.data.model_dump()
        return predict_texts(self.federation, tokenizer, self.deltas(client, round), texts, data, new_tokens)

    def evaluate(
        self, data: str | Path | None = None, clients: Sequence[str] = (), sets: Sequence[str] = (), round: Which = "best",
        split: str = "test",
    ) -> dict[str, Scores]:  # fmt: skip
        """Scores of clients' models, or of the global one, by model: on `data` (a file, folder or hub id), or on the run's own split.

        sets: how texts are written and scored, such as "generation.scores=[bleu]".
        """
        source = None if data is None else str(data)
        _, found = scoring.evaluate(self.recipe, self.federation, clients, source, split, sets, round)
        return {e.model: e.scores for e in found}

    def export(
        self, out: str | Path, clients: Sequence[str] = (), merged: bool = False, round: Which = "best"
    ) -> list[Path]:
        """Write PEFT folders (or merged models) for the global model, or one per client under `out`.

        round: the best one on validation (on test without one), whose scores the summary tells, or the last one.
        """
        return export.export_models(self.recipe, self.federation, Path(out), clients, merged, round)[1]


def load(folder: str | Path) -> Run:
    """Open a run that a recipe made."""
    recipe = places.located(places.recipe_in(Path(folder)), Path(folder))
    return Run(Path(folder), recipe, build.federation(recipe, folder))


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
