"""What each command does."""

from __future__ import annotations

import contextlib
import json as json_
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from ..errors import FedloraError, StateError, TrainingError
from ..federation.callbacks import Callback, Several
from . import jobs as processes
from . import listing, searches, sweeps, tables
from .interrupts import Interrupted, Pressed
from .progress import Bars, JsonLines

if TYPE_CHECKING:
    from ..federation.run import Federation
    from ..federation.store import Which
    from ..recipe import Recipe
    from ..recipe.search import Plan
    from ..report.budgets import Quantity
    from ..report.formats import Format
    from ..report.read import Records
    from ..serving.export import Served
    from ..serving.serve import Server

DEPLOYMENT = "deployment.json"  # this file stands in the run folder of a server whose clients are at sites
out = Console()
err = Console(stderr=True)


def _console(quiet: bool, json: bool) -> Console:
    """Where a command says what it does beside its results: standard error; nowhere with --json or --quiet."""
    return Console(stderr=True, quiet=quiet or json)


@contextlib.contextmanager
def _watch(metric: str, quiet: bool, json: bool) -> Iterator[Callback]:
    if json:
        yield JsonLines()
    elif quiet:
        yield Callback()
    else:
        with Bars(err, metric) as bars:
            yield bars


def _build(recipe: Recipe, output: Path | None, console: Console) -> Federation:
    with console.status(f"loading {recipe.model.name} and {recipe.data.source}"):
        from ..recipe.build import federation

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fed = federation(recipe, output)
    for w in said:  # our own warnings are for the user; deprecations in libraries are not
        if w.category is UserWarning and "fedlora" in w.filename:
            err.print(f"[yellow]{escape(str(w.message))}[/]", soft_wrap=True, highlight=False)
    return fed


def _execute(recipe: Recipe, output: Path | None, quiet: bool, json: bool, sweep: Path | None = None) -> Path:
    """Run one recipe to its end; returns its folder. sweep: the folder of the sweep that it belongs to."""
    from ..training.tasks import TASKS

    console = _console(quiet, json)
    fed = _build(recipe, output, console)
    console.print(f"base in {fed.numbers}", soft_wrap=True, highlight=False, markup=False)
    try:
        with Pressed() as pressed, _watch(TASKS[recipe.model.task].metric, quiet, json) as watch:
            stopped = fed.run(Several(watch, pressed)).get("stopped")
    except KeyboardInterrupt:
        raise Interrupted(sweep or fed.store.root) from None
    if stopped:
        console.print(f"stopped early: {stopped}", soft_wrap=True, highlight=False, markup=False)
    _report(fed.store.root, quiet or json, sweep)
    return fed.store.root


def _report(folder: Path, quiet: bool, sweep: Path | None = None) -> None:
    """Write the run's report where the plotting library is installed; say so where it is not. The pages of a sweep share one copy
    of the library, in the sweep's folder."""
    from .. import report as pages

    try:
        page = pages.write_run(folder, beside=sweep)
    except pages.MissingPlotly as e:
        err.print(str(e), soft_wrap=True, markup=False)
        return
    if not quiet:
        out.print(f"report: {page}", soft_wrap=True, highlight=False)


def run(recipe: Path, sets: Sequence[str], output: Path | None, quiet: bool, json: bool, jobs: int = 1) -> None:
    from ..recipe import expand_dict, folders, reading
    from ..recipe.search import plan
    from ..recipe.sweep import begun, root

    raw = reading.read(recipe)
    if (made := plan(raw, sets)) is not None:
        given = {"raw": raw, "sets": list(sets), "name": recipe.stem, "output": output and str(output)}
        _searched(made, given, quiet, json, jobs)
        return
    recipes = expand_dict(raw, list(sets))
    if len(recipes) == 1:
        folder = _execute(recipes[0], output, quiet, json, processes.sweep())
        if not json:
            tables.result(out, folder)
        return
    where = folders(recipes, Path("runs") / recipe.stem, output)
    sweep = root(where)
    begun(sweep, recipes, where)
    _sweep(recipes, where, sweep, quiet, json, jobs)


def _searched(
    made: Plan, given: Mapping[str, Any], quiet: bool, json: bool, jobs: int, sweep: Path | None = None
) -> None:
    """A sweep that begins with a search. given: what makes its plan again; sweep: its folder, where it is gone on with."""
    from ..recipe import folders
    from ..recipe.sweep import begun
    from ..recipe.sweep import root as common

    root, output = Path("runs") / given["name"], Path(given["output"]) if given["output"] else None
    where = folders(made.runs([s.trials[0].choice for s in made.settings]), root, output)
    sweep = sweep or common(where)
    if not sweeps.is_sweep(sweep):
        begun(sweep, [], [], given)
    console = _console(quiet, json)

    def trials(todo: searches.Todo) -> Mapping[Path, str]:
        left = [(r, f) for r, f in todo if not sweeps.finished(f)]
        return _runs(left, sweep, True, json, jobs, lambda text: console.print(text, soft_wrap=True, highlight=False))

    chosen = searches.search(made, sweep, trials, lambda text: console.print(text, soft_wrap=True, highlight=False))
    recipes = made.runs(chosen)
    where = folders(recipes, root, output)
    begun(sweep, recipes, where, given)
    _sweep(recipes, where, sweep, quiet, json, jobs)


def _runs(
    todo: searches.Todo, sweep: Path, quiet: bool, json: bool, jobs: int, say: Callable[[str], None]
) -> Mapping[Path, str]:
    """Bring runs to their end; folder -> why a run has failed, of those that have."""
    failed: dict[Path, str] = {}
    try:
        if jobs > 1:
            return processes.run(todo, jobs, sweep, say)
        for (r, folder), said in zip(todo, sweeps.headings([r.name for r, _ in todo]), strict=True):
            say(said)
            try:
                _execute(r, folder, quiet, json, sweep)
            except Interrupted:
                raise
            except FedloraError as e:
                failed[folder] = str(e)
                say(f"{r.name} failed: {e}")
    except KeyboardInterrupt:  # while a model is loaded
        raise Interrupted(sweep) from None
    return failed


def _sweep(
    recipes: Sequence[Recipe], where: Sequence[Path], sweep: Path, quiet: bool, json: bool, jobs: int = 1
) -> None:
    """The runs of a sweep, then their comparison."""
    todo = [(r, f) for r, f in zip(recipes, where, strict=True) if not sweeps.finished(f)]
    console = _console(quiet, json)
    if len(todo) < len(recipes):
        console.print(f"{len(recipes) - len(todo)} of {len(recipes)} runs are done already", highlight=False)
    failed = _runs(todo, sweep, quiet, json, jobs, lambda text: console.print(Text(text, style="bold"), soft_wrap=True))
    have = [f for f in where if f not in failed]
    if have:
        compare(have, sweep / "comparison.html", json, sweep)
    if failed:
        named = "; ".join(f"{f.name}: {why}" for f, why in list(failed.items())[:3])
        raise TrainingError(f"{len(failed)} of {len(recipes)} runs have failed: {named}")


def run_from(
    start: Path, recipe: Path | None, sets: Sequence[str], output: Path | None, quiet: bool, json: bool
) -> None:  # fmt: skip
    """Go on from a finished run, by default with its own recipe, in a folder beside it."""
    from ..recipe import Recipe

    changes = [f"federation.start={start}", *sets]
    if recipe is not None:
        run(recipe, changes, output, quiet, json)
        return
    own = recipe_of(start).model_dump(mode="json", exclude_unset=True)
    new = Recipe.from_dict(own, sets=changes)
    folder = _execute(new, output or start.parent / f"{start.name}-{new.hash}", quiet, json)
    if not json:
        tables.result(out, folder)


def resume(folder: Path, quiet: bool, json: bool, jobs: int = 1) -> None:
    from ..recipe.search import plan

    if sweeps.is_sweep(folder) and not listing.is_run(folder):
        if (given := sweeps.searched(folder)) is not None and not sweeps.runs(folder):
            made = plan(given["raw"], given["sets"])
            assert made is not None, "it was planned when the sweep began"
            _searched(made, given, quiet, json, jobs, folder)
            return
        _sweep(*sweeps.recipes(folder), folder, quiet, json, jobs)
        return
    recipe = recipe_of(folder)
    if (folder / DEPLOYMENT).exists():
        raise StateError(
            f"{folder}: a run over sites; start fedlora server again with --output {folder}, its clients come back"
        )
    _execute(recipe, folder, quiet, json)
    if not json:
        tables.result(out, folder)


def recipe_of(folder: Path) -> Recipe:
    """The recipe stored with a run, its files found again."""
    from ..recipe import places

    return places.located(places.recipe_in(folder), folder)


def opened(folder: Path, recipe: Recipe | None = None) -> tuple[Recipe, Federation]:
    """A finished or interrupted run, ready to serve. recipe: the stored one, where it has been read already."""
    recipe = recipe or recipe_of(folder)
    if (folder / DEPLOYMENT).exists():
        from ..deploy.coordinator import reopened

        return recipe, reopened(recipe, folder)
    return recipe, _build(recipe, folder, err)


def check(recipe: Path, sets: Sequence[str], json: bool, measure: bool) -> None:
    from ..recipe import expand_dict, reading
    from ..recipe.search import plan
    from . import checks

    raw = reading.read(recipe)
    if (made := plan(raw, sets)) is None:
        checks.check(expand_dict(raw, sets), json, measure, out, err)
        return
    trials = {t.recipe.hash: t.recipe for s in made.settings for t in s.trials}
    runs = made.runs([s.trials[0].choice for s in made.settings])
    checks.check([*trials.values(), *runs], json, measure, out, err)


def report(folder: Path, output: Path | None) -> None:
    from .. import report as pages
    from ..recipe import places

    if sweeps.is_sweep(folder) and not listing.is_run(folder):
        have = [f for f, _ in sweeps.runs(folder) if listing.is_run(f)]
        for f in have:
            _report(f, False, folder)
        compare(have or [folder], output or folder / "comparison.html", False, folder)
        return
    places.recipe_in(folder)
    out.print(f"report: {pages.write_run(folder, output)}", soft_wrap=True, highlight=False)


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """The run folders among `folders` and right below them."""
    found: list[Path] = []
    for folder in folders:
        if folder.is_file() and (folder.name == "comparison.html" or folder.match("plotly-*.min.js")):
            continue  # `compare runs/sweep/*` also names what the sweep wrote beside its runs
        inside = (
            [folder] if (folder / "recipe.yaml").exists() else sorted(p.parent for p in folder.glob("*/recipe.yaml"))
        )
        if not inside:
            raise StateError(f"{folder}: no run folder here or below; give folders that `fedlora run` wrote")
        found += inside
    if not found:
        raise StateError(f"{folders[0]}: a page, no run folder; give folders that `fedlora run` wrote")
    return found


def _scored(folders: Sequence[Path]) -> list[Path]:
    """Those runs that have a score of a trained model, or are at their end; says which are left out. Raises StateError for none."""
    from ..report.read import records

    known = {f: records(f) for f in folders}
    have = [f for f, r in known.items() if r.summary is not None or any(x.round for x in r.evals())]
    left = [f for f in folders if f not in have]
    if not have:
        raise StateError(
            f"{folders[0]}: none of {len(folders)} runs has a score yet; fedlora resume goes on with a run"
        )
    if left:
        names = ", ".join(f.name for f in left[:3]) + (", ..." if len(left) > 3 else "")
        said = f"left out, no score yet: {len(left)} of {len(folders)} runs ({names})"
        err.print(said, soft_wrap=True, highlight=False, markup=False)
    return have


def table(folders: Sequence[Path], output: Path | None, format: Format, equal: Quantity | None = None) -> None:
    """Write the comparison's table to a file, or to standard output."""
    from ..report.comparison import reading, side_by_side
    from ..report.formats import written
    from ..report.tables import compare_rows

    rows = compare_rows(_read(_scored(run_folders(folders)), equal))
    text = written(format, rows, side_by_side(rows), reading(rows))
    if output is None:
        sys.stdout.write(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        out.print(str(output), soft_wrap=True, highlight=False, markup=False)


def _read(folders: Sequence[Path], equal: Quantity | None) -> list[Records]:
    """The runs, cut where they have used equally much, which is said."""
    from ..report import budgets
    from ..report.comparison import amount
    from ..report.read import records

    runs = [records(f) for f in folders]
    if equal is None:
        return runs
    cut, least = budgets.equal(runs, equal)
    err.print(f"equal {equal}: every run up to its last round within {amount(equal, least)} a client", highlight=False)
    return cut


def compare(
    folders: Sequence[Path], output: Path | None, json: bool, sweep: Path | None = None, equal: Quantity | None = None
) -> None:
    from .. import report as pages
    from ..report.tables import compare_rows, grouped, paired

    found = _scored(run_folders(folders))
    runs = _read(found, equal)
    rows = compare_rows(runs)
    if json:
        sys.stdout.write(json_.dumps(rows) + "\n")
    else:
        tables.comparison(out, rows)
        tables.pairs(out, paired(grouped(runs)))
    try:
        page = pages.write_comparison(
            found, output or (folders[0] if len(folders) == 1 else Path()) / "comparison.html", sweep, equal
        )
    except pages.MissingPlotly as e:
        err.print(str(e), soft_wrap=True, markup=False)
        return
    if not json:
        out.print(f"report: {page}", soft_wrap=True, highlight=False)


def export(
    folder: Path, output: Path, clients: Sequence[str], all_clients: bool, merged: bool, which: Which, server: Server | None = None
) -> None:  # fmt: skip
    from ..checkpoints.pretrained import known_as
    from ..serving import serve
    from ..serving.export import export_models

    recipe, fed = opened(folder)
    if server is not None:
        serve.check(server, recipe.model.task, merged)
    chosen = list(fed.data.ids[: fed.training]) if all_clients else list(clients)
    with err.status("exporting"):
        of, written = export_models(recipe, fed, output, chosen, merged, which)
    _of_round(of)
    if server is not None:
        names = chosen or ["global"]
        written.append(serve.write(output, server, known_as(recipe.model.name), dict(zip(names, written, strict=True))))
    for path in written:
        out.print(str(path), soft_wrap=True, highlight=False, markup=False)


def push(
    folder: Path, repo: str, clients: Sequence[str], all_clients: bool, merged: bool, which: Which, public: bool
) -> None:  # fmt: skip
    import tempfile

    from ..serving.export import export_models
    from ..serving.push import push as upload

    recipe, fed = opened(folder)
    chosen = list(fed.data.ids[: fed.training]) if all_clients else list(clients)
    with tempfile.TemporaryDirectory() as place:
        with err.status("exporting"):
            of, _ = export_models(recipe, fed, Path(place), chosen, merged, which)
        _of_round(of)
        with err.status(f"uploading to {repo}"):
            address = upload(Path(place), repo, not public)
    out.print(address, soft_wrap=True, highlight=False, markup=False)


def evaluate(
    folder: Path, data: str | None, split: str, clients: Sequence[str], all_clients: bool, sets: Sequence[str], output: Path | None,
    json: bool, which: Which,
) -> None:  # fmt: skip
    from ..recipe.build import tokenizer_of
    from ..serving import evaluate as scoring

    recipe, fed = opened(folder)
    chosen = list(fed.data.ids[: fed.training]) if all_clients else list(clients)
    with err.status("scoring"):
        of, found = scoring.evaluate(recipe, fed, chosen, data, split, sets, which)
    _of_round(of)
    if json:
        for e in found:
            sys.stdout.write(json_.dumps({"model": e.model, **e.scores}) + "\n")
    else:
        tables.scores(out, {e.model: e.scores for e in found})
    if output is not None:
        if any(e.written is not None for e in found):
            for path in scoring.write_answers(output, found, tokenizer_of(recipe)):
                err.print(str(path), soft_wrap=True, highlight=False, markup=False)
        else:
            err.print(
                "nothing was written: set generation.scores, e.g. --set generation.scores=[bleu]",
                soft_wrap=True,
                markup=False,
            )


def _of_round(of: Served) -> None:
    """Say which round's model it is, since a run has several."""
    more = "; --round last takes the last one's" if of.round is not None and of.round == of.best else ""
    err.print(f"model of {of}{more}", soft_wrap=True, highlight=False, markup=False)


def demo(output: Path, sets: Sequence[str], quiet: bool) -> None:
    from importlib.resources import as_file, files

    with as_file(files("fedlora.data") / "demo.yaml") as recipe:
        run(recipe, sets, output, quiet, False)
