"""What the commands for real sites do."""

from __future__ import annotations

import contextlib
import json as json_
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..data.addresses import hidden, scheme, unfit
from ..deploy.notes import Note
from ..errors import ConfigError, FedloraError, Problem, StateError, printable
from ..federation.callbacks import Callback, Several
from ..federation.records import TrainLine, read_lines
from . import journal, listing, sweeps, tables
from .actions import _report, _watch, err, out
from .interrupts import Interrupted, Pressed
from .journal import LogFormat
from .metrics import Metrics
from .progress import Log, now


@contextlib.contextmanager
def _flower() -> Iterator[None]:
    """Raise an error that says what to install, if Flower is not installed."""
    try:
        yield
    except ModuleNotFoundError as e:
        if e.name not in ("flwr", "cryptography", "uvicorn", "httpx"):
            raise
        raise FedloraError(
            f"real sites need Flower, and {e.name} is not installed: pip install 'fedlora[flower]'"
        ) from e


def _say(quiet: bool) -> Callable[[str], None]:
    """Lines with the time: what a server or a client says is read hours later, too."""

    def say(text: str) -> None:
        if not quiet:
            # It may hold what the other side has sent.
            first, *more = (printable(line, 10**6) for line in text.split("\n"))
            err.print("\n".join([f"{now()} {first}", *more]), soft_wrap=True, highlight=False, markup=False)

    return say


def _one(recipe: Path, sets: Sequence[str]) -> Any:
    from ..recipe import expand

    found = expand(recipe, list(sets))
    if len(found) > 1:
        raise ConfigError([Problem("sweep", f"{len(found)} runs", "one run at a time", "remove the sweep")])
    return found[0]


def server(
    recipe: Path, sets: Sequence[str], output: Path | None, listen: str, tls_cert: Path | None, tls_key: Path | None,
    clients_keys: Path | None, insecure: bool, quiet: bool, json: bool, log_format: LogFormat = LogFormat.text,
    log_file: Path | None = None, metrics: str | None = None,
) -> None:  # fmt: skip
    from ..deploy.coordinator import check
    from ..training.tasks import TASKS

    with _flower():
        from ..flower import server as flower
    r = _one(recipe, sets)
    problems: list[Problem] = []
    host, port, tls, known = "", 0, None, None
    try:
        check(r)
    except ConfigError as e:
        problems += e.problems
    try:
        host, port = flower.address(listen)
    except ConfigError as e:
        problems += e.problems
    try:
        tls, known = flower.security(tls_cert, tls_key, clients_keys, insecure)
    except ConfigError as e:
        problems += e.problems
    numbers, to_file = None, None
    try:
        to_file = None if log_file is None else journal.into(log_file, log_format, _say(False))
    except ConfigError as e:
        problems += e.problems
    try:
        where = None if metrics is None else flower.address(metrics, "--metrics", "127.0.0.1")
        numbers = None if where is None or problems else Metrics(*where)
    except ConfigError as e:
        problems += e.problems
    if problems:
        raise ConfigError(problems)
    as_json = log_format is LogFormat.json and not quiet
    shown = journal.errors(log_format) if as_json else _say(quiet or json)
    say = journal.all_of(shown, *([to_file] if to_file else []), *([numbers.hear] if numbers else []))
    logs = [shown] * as_json + [to_file] * (to_file is not None)

    if insecure:
        warning = "--insecure: everybody who reaches this port can take part, and read along"
        if as_json:
            say(Note(warning, "insecure"))
        else:
            err.print(f"[yellow]{warning}[/]", soft_wrap=True)

    def ready(port: int) -> None:
        say(Note(f"serving {r.name} on {host}:{port}", "serving", name=r.name, host=host, port=port))
        if numbers:
            say(Note(f"metrics on port {numbers.port}", "metrics", port=numbers.port))

    folder = output or r.output_folder()
    _finish(
        folder,
        r,
        quiet,
        json,
        lambda watch: flower.run(r, folder, host, port, tls, known, watch, say, ready),
        TASKS[r.model.task].metric,
        [*(Log(s, TASKS[r.model.task].metric) for s in logs if s), *([numbers] if numbers else [])],
        as_json,
    )


def try_out(
    recipe: Path, clients: int | None, sets: Sequence[str], output: Path | None, quiet: bool, json: bool
) -> None:
    from ..deploy.coordinator import check
    from ..training.tasks import TASKS

    with _flower():
        from ..flower import trial
    r = _one(recipe, sets)
    with err.status("partitioning the data"):
        r, ids = trial.prepared(r, clients)
    check(r)
    folder = output or r.output_folder()
    _finish(
        folder,
        r,
        quiet,
        json,
        lambda watch: trial.try_out(r, ids, folder, watch, _say(quiet or json)),
        TASKS[r.model.task].metric,
    )


def _finish(
    folder: Path, recipe: Any, quiet: bool, json: bool, run: Callable[[Any], Any], metric: str, more: Sequence[Callback] = (),
    logged: bool = False,
) -> None:  # fmt: skip
    """Run under a progress display, then the result and the report, as for a simulation. more: who else hears of the run;
    logged: whether one of these writes to standard error, so that no display does."""
    try:
        plain = not (quiet or json or err.is_terminal)  # bars are for a terminal
        shown: Any = contextlib.nullcontext(Log(_say(False), metric)) if plain else _watch(metric, quiet, json)
        if logged:
            shown = _watch(metric, not json, json)
        with Pressed() as pressed, shown as watch:
            run(Several(watch, *more, pressed))
    except KeyboardInterrupt:
        raise Interrupted(folder, "start the same command again") from None
    finally:
        for m in more:
            if isinstance(m, Metrics):
                m.close()
    _report(folder, quiet or json)
    if not json:
        tables.result(out, folder)


def client(
    id: str, server: str, data: Sequence[str], ca: Path | None, key: Path | None, insecure: bool,
    columns: Mapping[str, Any], clients: str | None, state: Path, model: str | None, device: str, block: int | None,
    threads: int | None, share_histogram: bool, share_scores: bool, policy: Path | None, accept: Sequence[str], trust_server: bool,
) -> None:  # fmt: skip
    with _flower():
        from ..flower import client as flower
        from ..flower.keys import check_id, private_key
    from ..deploy.site import Holding, guarded

    check_id(id)
    problems = []
    if insecure and (ca or key):
        problems.append(Problem("--insecure", "beside --ca or --key", "alone", "drop it, or drop those"))
    if not insecure and key is None:
        problems.append(Problem("--key", None, "this site's private key", "or --insecure for a trial on one machine"))
    if ca is not None and not ca.is_file():
        problems.append(Problem("--ca", str(ca), "a PEM file that exists"))
    problems += [
        Problem("--data", d, "a file that exists")
        for d in data
        if scheme(d) is None and "*" not in d and not Path(d).expanduser().exists()
    ]
    if ":" not in server:
        problems.append(Problem("--server", server, "host:port", "for example fl.example.org:8443"))
    if trust_server and (policy or accept or share_scores):
        problems.append(
            Problem("--trust-server", "beside --policy, --accept or --share-scores", "alone", "it needs none of them")
        )
    problems += [
        Problem("--accept", a, "64 hex digits, as the server prints them when it starts")
        for a in accept
        if not (len(a) == 64 and set(a) <= set("0123456789abcdef"))
    ]
    said = {k: v for k, v in columns.items() if v}
    for field in ("text", "prompt"):
        if field in said:
            said[field] = said[field][0] if len(said[field]) == 1 else list(said[field])
    rules = None
    try:
        rules = None if trust_server else _policy(policy, said, model, share_histogram, share_scores)
    except ConfigError as e:
        problems += e.problems
    else:
        query = said.get("query") if rules is None else rules.data.query
        wrong = [unfit(d, query) for d in data]
        names = {"data.source": "--data", "data.query": "--query"}
        problems += [replace(p, field=names[p.field]) for p in wrong[:1] if p]
        if len(data) > 1 and (away := [d for d in data if scheme(d) is not None]):
            problems.append(
                Problem("--data", hidden(away[0]), "files, or one database alone", "start a client for each")
            )
    if problems:
        raise ConfigError(problems)
    holding = Holding(
        id, data[0] if len(data) == 1 else list(data), said, clients, model, device, block, threads, rules
    )
    keys = None if key is None else private_key(key)
    state.mkdir(parents=True, exist_ok=True)
    lock = FileLock(state / ".lock", timeout=0)
    say = _say(False)
    try:
        with lock, Pressed() as pressed:
            if rules is None:
                err.print(
                    "[yellow]--trust-server: the server chooses which columns are read and what is sent[/]",
                    soft_wrap=True,
                )
            else:
                say(f"policy of this site ({policy or 'the default'}):\n{rules.to_yaml()}")
            site = guarded(holding, state, accept=accept, ask=_ask(), say=say, histograms=share_histogram)
            flower.serve(flower.Uplink(server, ca, keys, insecure), site, say, pressed.stop)
    except Timeout:
        raise StateError(f"--state {state}: another client uses it; give each client a folder of its own") from None
    except KeyboardInterrupt:
        pass
    say("stopped; what the server has accepted is kept here")


def _policy(path: Path | None, columns: Mapping[str, Any], model: str | None, histograms: bool, scores: bool) -> Any:
    from ..deploy.policy import Policy

    found = Policy() if path is None else Policy.load(path)
    return found.with_columns(columns, model, histograms, scores)


def _ask() -> Callable[[str], bool] | None:
    """A function that asks whoever sits at this terminal; None if nobody does."""
    if not sys.stdin.isatty():
        return None
    return lambda question: err.input(question, markup=False).strip().lower() in ("y", "yes")


def keys(ids: Sequence[str], output: Path, hosts: Sequence[str]) -> None:
    with _flower():
        from ..flower.keys import bundle, make, valid_until
    made = make(output, hosts, ids)

    def told(text: str) -> None:
        out.print(text, soft_wrap=True, highlight=False, markup=False)

    for path in made:
        told(str(path))
    told(f"keep at the server: {output / 'server.pem'}, {output / 'server.key'}, {output / 'clients'} (the .pub files)")
    told(f"keep secret, and needed only to make more of these: {output / 'ca.key'}")
    for id in ids:
        told(f"give to {id}, over a channel you trust: {bundle(output, id, hosts[0])}")
    for what, file in (("the authority", "ca.pem"), ("the server's certificate", "server.pem")):
        told(f"{what} ({file}) is valid until {valid_until(output / file):%Y-%m-%d}; sites' keys have no end")
    told("a new server certificate: remove server.pem and server.key, run this again, and start the server again")


def status(folder: Path, watch: bool, json: bool) -> None:
    simulated = not (folder / "status.json").exists() and (sweeps.is_sweep(folder) or listing.is_run(folder))
    if simulated:
        runs = sweeps.facts(folder) if sweeps.is_sweep(folder) else [listing.facts(folder)]
        if json:
            sys.stdout.write("".join(json_.dumps(f) + "\n" for f in runs))
        else:
            listing.show(out, runs, folder)
        return
    if json:
        sys.stdout.write(json_.dumps(_status(folder)) + "\n")
        return
    if not watch:
        out.print(tables.status(_status(folder)))
        return
    from rich.live import Live

    with Live(tables.status(_status(folder)), console=out, auto_refresh=False) as live:
        while True:
            found = _status(folder)
            live.update(tables.status(found), refresh=True)
            if found["state"] == "done":
                return
            time.sleep(1.0)


def watch(folder: Path, listen: str, open: bool) -> None:
    import webbrowser

    from ..report.live import Live

    if sweeps.is_sweep(folder) and not listing.is_run(folder):
        names = ", ".join(f.name for f, _ in sweeps.runs(folder)[:3])
        raise StateError(f"{folder}: a sweep; give one of its runs ({names}), or fedlora status {folder}")
    host, _, port = listen.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError([Problem("--listen", listen, "host:port", "for example 127.0.0.1:8080")])
    live = Live(folder, host.strip("[]") or "127.0.0.1", int(port))
    out.print(f"watching {folder}: {live.url} (Ctrl-C ends it)", soft_wrap=True, highlight=False, markup=False)
    if not live.hosts:
        err.print("[yellow]everybody who reaches this address can read the run[/]", soft_wrap=True)
    if open:
        webbrowser.open(live.url)
    with Pressed(), contextlib.suppress(KeyboardInterrupt), live:
        live.serve_forever(0.2)


def _status(folder: Path) -> dict[str, Any]:
    """status.json with what the run's records add. Raises StateError."""
    from ..files import sealed

    found = sealed.read(folder / "status.json")
    if found is None:
        raise StateError(f"{folder}: no status.json: give the run folder of a fedlora server")
    lines = read_lines(folder)
    sent = {d: sum(x.sent(d) for x in lines if isinstance(x, TrainLine)) for d in ("up", "down")}
    spent = sealed.read(folder / "privacy.json")
    return found | {
        "privacy": spent and {k: spent[k] for k in ("epsilon", "delta", "budget")},
        "bytes": sent,
        "done": max((x.round for x in lines), default=0),
        "age": time.time() - found["updated"],
    }
