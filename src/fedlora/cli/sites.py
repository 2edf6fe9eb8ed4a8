"""Commands for real sites: server, client, status, and the group federation; what they do is in deployment.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import Json, Output, Quiet, Recipe, Sets, app
from .journal import LogFormat

__all__ = ["app"]

federation = typer.Typer(help="Keys and trials of a federation of real sites.")
app.add_typer(federation, name="federation")


@federation.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


Insecure = Annotated[bool, typer.Option("--insecure", help="No TLS and no keys. For trials on one machine.")]


@app.command()
def server(
    recipe: Recipe,
    listen: Annotated[str, typer.Option(help="Address and port for clients.")] = "0.0.0.0:8443",
    tls_cert: Annotated[Path | None, typer.Option(help="The server's certificate, PEM.", show_default=False)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.", show_default=False)] = None,
    clients_keys: Annotated[
        Path | None, typer.Option(help="Folder of <id>.pub: who may connect.", show_default=False)
    ] = None,
    insecure: Insecure = False,
    log_format: Annotated[LogFormat, typer.Option(help="Of the log: text, or a JSON object a line.")] = LogFormat.text,
    log_file: Annotated[Path | None, typer.Option(help="Add the log to this file too.", show_default=False)] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="host:port for Prometheus; :PORT is this machine alone.", show_default=False),
    ] = None,
    sets: Sets = None,
    output: Output = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Serve a recipe to clients at their sites, to its end. Started again with the same output, it goes on."""
    from . import deployment

    deployment.server(
        recipe,
        sets or [],
        output,
        listen,
        tls_cert,
        tls_key,
        clients_keys,
        insecure,
        quiet,
        json,
        log_format,
        log_file,
        metrics,
    )


@app.command()
def client(
    id: Annotated[str, typer.Option("--id", help="This site, as the server knows its key.", show_default=False)],
    server: Annotated[str, typer.Option(help="host:port of the server.", show_default=False)],
    data: Annotated[
        list[str], typer.Option(help="File of rows, or a database; repeat for more files.", show_default=False)
    ],
    ca: Annotated[
        Path | None,
        typer.Option(help="Authority of the server's certificate, PEM; else the system's.", show_default=False),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="This site's private key.", show_default=False)] = None,
    insecure: Insecure = False,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Column of the text, if not the recipe's; twice for pairs.", show_default=False),
    ] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label.", show_default=False)] = None,
    template: Annotated[str | None, typer.Option(help="Text made of columns.", show_default=False)] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Column of the prompt; twice for instruction and input.", show_default=False),
    ] = None,
    completion: Annotated[str | None, typer.Option(help="Column of the completion.", show_default=False)] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Of the files, if not the recipe's: utf-8, cp1252, ...", show_default=False)
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="Of the files, if not by their endings: csv, xlsx, ...", show_default=False)
    ] = None,
    delimiter: Annotated[
        str | None, typer.Option(help="Of CSV files, if not found in their first rows: ';', tab.", show_default=False)
    ] = None,
    sheet: Annotated[str | None, typer.Option(help="Of a workbook that has several.", show_default=False)] = None,
    query: Annotated[
        str | None, typer.Option(help="SELECT ..., where --data is a database's URL.", show_default=False)
    ] = None,
    missing: Annotated[
        str | None, typer.Option(help="Rows without a value: refuse (an error) or drop.", show_default=False)
    ] = None,
    clients: Annotated[
        str | None,
        typer.Option(help="Column that names a client for each row: many clients at one site.", show_default=False),
    ] = None,
    state: Annotated[Path, typer.Option(help="Folder for personal adapters.")] = Path("fedlora-state"),
    model: Annotated[
        str | None, typer.Option(help="Load the base from here instead of by the recipe's name.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option()] = "auto",
    block: Annotated[int | None, typer.Option(min=1, help="Clients trained at once.", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(min=1, show_default=False)] = None,
    share_histogram: Annotated[
        bool,
        typer.Option("--share-histogram", help="Tell the server how many rows of each class there are, if it asks."),
    ] = False,
    share_scores: Annotated[
        bool, typer.Option("--share-scores", help="Tell the server losses and scores, rounded as the policy says.")
    ] = False,
    policy: Annotated[
        Path | None,
        typer.Option(help="What the server may ask (YAML); without it the strict default.", show_default=False),
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(help="Digest of a recipe that needs no question; repeat for more.", show_default=False),
    ] = None,
    trust_server: Annotated[
        bool,
        typer.Option("--trust-server", help="No policy: the server chooses columns, model and what is trained."),
    ] = False,
) -> None:
    """Train at this site for a server. Rows stay here; what else may leave, and for what, is this site's policy."""
    from . import deployment

    columns = {
        "text": text, "label": label, "template": template, "prompt": prompt, "completion": completion, "encoding": encoding,
        "format": format, "delimiter": delimiter, "sheet": sheet, "query": query, "missing": missing,
    }  # fmt: skip
    deployment.client(
        id, server, data, ca, key, insecure, columns, clients, state, model, device, block, threads, share_histogram,
        share_scores, policy, accept or [], trust_server,
    )  # fmt: skip


@app.command()
def status(
    folder: Annotated[
        Path, typer.Argument(help="Run folder of a server, of a run, or of a sweep.", show_default=False)
    ],
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing it.")] = False,
    json: Json = False,
) -> None:
    """Show where a run stands: round and score; with a server also clients, who is late, and bytes."""
    from . import deployment

    deployment.status(folder, watch, json)


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="Run folder of a run or a server.", show_default=False)],
    listen: Annotated[
        str, typer.Option(help="host:port; :PORT and port 0, a free one, are this machine alone.")
    ] = "127.0.0.1:0",
    open: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """A live page of a run or a deployment, for the browser of this machine, until Ctrl-C."""
    from . import deployment

    deployment.watch(folder, listen, open)


@federation.command()
def keys(
    ids: Annotated[list[str], typer.Argument(help="Ids of the sites.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")] = Path("keys"),
    host: Annotated[
        list[str] | None,
        typer.Option(help="Names and addresses by which clients reach the server.", show_default=False),
    ] = None,
) -> None:
    """Make an authority, the server's certificate, and a key pair for each site."""
    from . import deployment

    deployment.keys(ids, output, host or ["localhost", "127.0.0.1"])


@federation.command(name="try")
def try_(
    recipe: Recipe,
    clients: Annotated[
        int | None, typer.Option(min=2, help="Clients, if the data do not say.", show_default=False)
    ] = None,
    sets: Sets = None,
    output: Output = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """A whole federation of real processes with TLS on this machine, cleaned up afterwards."""
    from . import deployment

    deployment.try_out(recipe, clients, sets or [], output, quiet, json)
