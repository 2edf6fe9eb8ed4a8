"""The commands and their options; what they do is in actions.py and measures.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..training.tasks import NAMES
from . import completing

app = typer.Typer(
    name="fedlora",
    help="Federated fine-tuning of foundation models with low-rank adapters.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

Recipe = Annotated[Path, typer.Argument(help="Recipe (YAML).", show_default=False)]
Folder = Annotated[Path, typer.Argument(help="Run folder.", show_default=False, autocompletion=completing.runs)]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="a.b=c",
        help="Override a field of the recipe.",
        show_default=False,
        autocompletion=completing.sets,
    ),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where to write.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result.")]
Round = Annotated[
    Literal["best", "last"],
    typer.Option(help="Whose models: of the round with the best validation scores, or of the last one."),
]
Clients = Annotated[
    list[str] | None,
    typer.Option(
        "--client",
        "-c",
        help="A client's model; repeat for more.",
        show_default=False,
        autocompletion=completing.clients,
    ),
]
AllClients = Annotated[bool, typer.Option("--all-clients", help="Every client's model.")]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Runs of a sweep at once, each in a process of its own.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of bars and tables.")]


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe (YAML).", show_default=False)] = None,
    sets: Sets = None,
    output: Output = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Go on from this finished run: new data, more rounds.", show_default=False
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Run a recipe (or a sweep of them) to its end, with a report. An interrupted run is taken up where it was.

    With --from, a recipe may be left out: the finished run's own is taken, with the changes of --set.
    """
    from . import actions

    if start is not None:
        actions.run_from(start, recipe, sets or [], output, quiet, json)
    elif recipe is None:
        raise typer.BadParameter("give a recipe, or a finished run with --from")
    else:
        actions.run(recipe, sets or [], output, quiet, json)


@app.command()
def sweep(
    recipe: Recipe, sets: Sets = None, output: Output = None, jobs: Jobs = 1, quiet: Quiet = False, json: Json = False
) -> None:
    """Run all runs of a sweep, its search first, several at once if asked; an interrupted sweep is taken up."""
    from . import actions

    actions.run(recipe, sets or [], output, quiet, json, jobs)


@app.command()
def resume(folder: Folder, jobs: Jobs = 1, quiet: Quiet = False, json: Json = False) -> None:
    """Go on with an interrupted run, or a sweep of runs."""
    from . import actions

    actions.resume(folder, quiet, json, jobs)


@app.command()
def check(
    recipe: Recipe,
    sets: Sets = None,
    json: Json = False,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Try a few local steps, to tell time and memory.")
    ] = True,
) -> None:
    """Validate a recipe and show what would run, what it takes and what is odd in its data; keeps nothing."""
    from . import actions

    actions.check(recipe, sets or [], json, measure)


@app.command()
def methods(
    cost: Annotated[
        str | None,
        typer.Option(
            "--cost", metavar="MODEL", help="Measure every method on this model: a hub id, a folder, or minilm."
        ),
    ] = None,
    task: Annotated[str, typer.Option(help=f"With --cost: one of {', '.join(NAMES)}.")] = "classification",
    json: Json = False,
) -> None:
    """List the methods, their papers and what they share; or what they cost on a model."""
    from . import measures

    if cost is None:
        measures.methods(json)
    else:
        measures.cost(cost, task, json)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Copy this one to the current folder.", show_default=False)] = None,
    json: Json = False,
) -> None:
    """List the recipes that come with fedlora, or copy one to the current folder, to run it and to change it."""
    from . import measures

    if name is None:
        measures.recipes(json)
    else:
        measures.copy_recipe(name)


@app.command()
def init(
    source: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="A file or folder of data, or a hub id.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--from", metavar="RECIPE", help="Start from this recipe: a shipped one's name, or a file."),
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Column of the text; twice for pairs.", show_default=False)
    ] = None,
    label: Annotated[str | None, typer.Option(help="Column of the labels.", show_default=False)] = None,
    prompt: Annotated[str | None, typer.Option(help="Column of the prompts.", show_default=False)] = None,
    completion: Annotated[str | None, typer.Option(help="Column of the answers.", show_default=False)] = None,
    client: Annotated[str | None, typer.Option(help="Column that names each row's client.", show_default=False)] = None,
    task: Annotated[str | None, typer.Option(help=f"One of {', '.join(NAMES)}.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help="A hub id, a folder, or minilm.", show_default=False)] = None,
    output: Output = None,
    ask: Annotated[bool, typer.Option("--ask/--no-ask", help="At a terminal, ask for the columns.")] = True,
) -> None:
    """Write a commented recipe for a file of data: columns are asked for or guessed; or copy a recipe (--from)."""
    from . import begin

    pair = None if not text else text[0] if len(text) == 1 else tuple(text)
    given = {"text": pair, "label": label, "prompt": prompt, "completion": completion, "client": client, "task": task}
    begin.init(source, base, given, model, output, ask)


@app.command()
def example(
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("runs/example.html"),
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of every method.")] = 400,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json: Json = False,
) -> None:
    """PF2LoRA's synthetic example: clients whose true updates have different ranks, and what each method makes of them."""
    from . import measures

    measures.example(output, rounds, seed, json)


@app.command()
def bench(
    regime: Annotated[
        list[str] | None,
        typer.Option(
            help="small, middle and large (the default): many clients of few rows, or few of many. wide: many of many."
        ),
    ] = None,
    system: Annotated[list[str] | None, typer.Option(help="Systems to measure; default: all.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each, after one that warms up.")] = 3,
    method: Annotated[
        str, typer.Option(help="What clients do; other systems than fedlora do homlora only.")
    ] = "homlora",
    model: Annotated[str, typer.Option(help="A hub id, a folder, or minilm.")] = "minilm",
    task: Annotated[str, typer.Option(help=f"One of {', '.join(NAMES)}.")] = "classification",
    source: Annotated[str, typer.Option(help="Texts: a file, or demo for those that Python carries.")] = "demo",
    text: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    threads: Annotated[int, typer.Option(min=1)] = 2,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1 and so on, or auto; peers but the loop are for the CPU.")
    ] = "cpu",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("bench/results"),
) -> None:
    """Measure speed beside plain PyTorch + PEFT, on the same work, in alternation."""
    from . import measures

    measures.bench(regime or [], system or [], rounds, method, model, task, source, text, threads, device, output)


@app.command()
def report(folder: Folder, output: Output = None) -> None:
    """Write the HTML report of a run, one file that needs no other; or those of a sweep, with their comparison."""
    from . import actions

    actions.report(folder, output)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders of run folders.", show_default=False)],
    output: Output = None,
    to: Annotated[
        Literal["csv", "markdown", "latex"] | None,
        typer.Option("--to", help="Write the table alone, here or to --output.", show_default=False),
    ] = None,
    equal: Annotated[
        Literal["steps", "rows", "tokens", "bytes", "seconds"] | None,
        typer.Option(
            "--equal", help="Read every run up to where all have used equally much, per client.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compare runs: a table here, and an HTML page."""
    from . import actions

    if to is not None:
        actions.table(folders, output, to, equal)
    else:
        actions.compare(folders, output, json, equal=equal)


@app.command()
def export(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.", show_default=False)],
    client: Clients = None,
    all_clients: AllClients = False,
    merged: Annotated[bool, typer.Option("--merged", help="The merged model instead of a PEFT adapter.")] = False,
    round: Round = "best",
    serve: Annotated[
        Literal["vllm", "sglang"] | None,
        typer.Option(
            help="Also write serve.sh, which serves these adapters by their clients' names.", show_default=False
        ),
    ] = None,
) -> None:
    """Export PEFT folders: the global model, or the models of clients."""
    from . import actions

    actions.export(folder, output, client or [], all_clients, merged, round, serve)


@app.command()
def push(
    folder: Folder,
    repo: Annotated[str, typer.Argument(help="OWNER/NAME of the model repository.", show_default=False)],
    client: Annotated[
        list[str] | None, typer.Option("--client", "-c", help="A client's model; repeat for more.", show_default=False)
    ] = None,
    all_clients: Annotated[bool, typer.Option("--all-clients", help="Every client's model.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="The merged model instead of a PEFT adapter.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; it is private otherwise.")
    ] = False,
    round: Round = "best",
) -> None:
    """Export to the Hugging Face hub: the global model, or those of clients in folders of their names."""
    from . import actions

    actions.push(folder, repo, client or [], all_clients, merged, round, public)


@app.command()
def predict(
    folder: Folder,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            help="Texts; for pairs put ' ||| ' between the two; for a template of several columns, JSON objects.",
            show_default=False,
        ),
    ] = None,
    client: Annotated[
        str | None,
        typer.Option(
            "--client", "-c", help="Use this client's model.", show_default=False, autocompletion=completing.clients
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="Rows of a data file with the columns of training, or a text a line; - is standard input.",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Longest continuation, tokens.")] = 64,
    json: Json = False,
    round: Round = "best",
) -> None:
    """Text in, label or continuation out: texts given here, in a file, or on standard input."""
    from . import answers

    answers.predict(folder, texts or [], client, file, new_tokens, json, round)


@app.command()
def evaluate(
    folder: Folder,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            help="Rows to score on: a file, folder or hub id. Default: the run's own.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[Literal["test", "validation"], typer.Option(help="Which of the run's own rows.")] = "test",
    client: Clients = None,
    all_clients: AllClients = False,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="generation.b=c", help="How texts are written and scored.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for what language models write.", show_default=False)
    ] = None,
    json: Json = False,
    round: Round = "best",
) -> None:
    """Score the models of a finished run: the global one, or those of clients."""
    from . import actions

    actions.evaluate(folder, data, split, client or [], all_clients, sets or [], output, json, round)


@app.command()
def attack(
    folder: Folder,
    kind: Annotated[
        Literal["membership", "inversion", "both"],
        typer.Option(help="Was a row trained on; which words stand behind an upload."),
    ] = "both",
    rows: Annotated[int, typer.Option(min=10, help="Rows of a client in and out of training that are judged.")] = 200,
    trials: Annotated[int, typer.Option(min=2, help="Uploads inverted of each size.")] = 8,
    batch: Annotated[
        list[int] | None, typer.Option(help="Rows a step; repeat for more.", show_default="1, 4, 16, 32")
    ] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Local steps; repeat for more.", show_default="1, 10")] = None,
    json: Json = False,
    round: Round = "last",
) -> None:
    """Attack a run of your own, from its folder: what its models and its uploads tell about its rows."""
    from . import attacks

    attacks.attack(folder, kind, rows, trials, batch or [1, 4, 16, 32], steps or [1, 10], json, round)


@app.command()
def ls(
    folder: Annotated[Path, typer.Argument(help="Folder of runs.")] = Path("runs"),
    json: Json = False,
) -> None:
    """List the runs in a folder and below: state, score and age."""
    from . import listing
    from .actions import out

    listing.ls(folder, json, out)


@app.command()
def doctor(json: Json = False) -> None:
    """Show what this machine has (processor, compiler, GPU, extras), what is on, and what would switch more on."""
    from . import doctor as look
    from .actions import out

    look.doctor(json, out)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all of it.")] = False, json: Json = False
) -> None:
    """Show what the cache holds (tokens of texts, compiled operators), or clear it. FEDLORA_CACHE=off keeps nothing."""
    from . import cached

    cached.show(clear, json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the runs.")] = Path("runs/demo"),
    sets: Sets = None,
    quiet: Quiet = False,
) -> None:
    """Compare four methods on the standard library's own documentation, with a real encoder; about five minutes."""
    from . import actions

    actions.demo(output, sets or [], quiet)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if not version and context.invoked_subcommand is None:
        typer.echo(context.get_help())
    if version:
        from .. import __version__

        typer.echo(f"fedlora {__version__}")
        raise typer.Exit
