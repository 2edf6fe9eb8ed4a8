"""`fedlora federation try`: a whole federation of real processes with real TLS on this machine, for a first look.

Each client process holds the rows that the recipe's partition gives it, so the result is that of `fedlora run`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..deploy.site import Site
from ..errors import ConfigError, DataError, Problem
from ..federation.callbacks import Callback
from ..federation.run import Federation
from ..recipe import Recipe, build
from ..training.tasks import TASKS
from . import client, door, keys, server

LOOPBACK = "127.0.0.1"


def prepared(recipe: Recipe, clients: int | None) -> tuple[Recipe, list[str]]:
    """The recipe for so many clients, with the names of its classes; and the clients' ids. Raises ConfigError."""
    data = build.data_of(recipe, build.tokenizer_of(recipe))
    if clients is not None and len(data.ids) != clients:
        if recipe.data.client is not None or recipe.partition.kind == "column":
            raise ConfigError([Problem("--clients", clients, f"{len(data.ids)}, as the data say", "leave it out")])
        recipe = recipe.override(f"partition.clients={clients}")
        data = build.data_of(recipe, build.tokenizer_of(recipe))
    bad = [c for c in data.ids if not set(c) <= keys.ALLOWED]
    if bad:
        raise DataError(
            f"federation try: client {bad[0]!r} cannot name a key file, expected letters, digits, '.', '_' and '-'"
        )
    if names := TASKS[recipe.model.task].names(data):
        recipe = recipe.override(f"data.classes={list(names)!r}")
    return recipe.override(f"deployment.clients={len(data.ids)}"), list(data.ids)


def try_out(
    recipe: Recipe, ids: Sequence[str], output: Path | None, watch: Callback, say: Callable[[str], None]
) -> tuple[Federation, dict[str, Any]]:
    """Run what `prepared` returned with one process per client; whatever happens, they and their keys are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="fedlora-") as folder, contextlib.ExitStack() as stack:
        root = Path(folder)
        keys.make(root / "keys", [LOOPBACK, "localhost"], ids)
        (root / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        tls, known = server.security(
            root / "keys" / "server.pem", root / "keys" / "server.key", root / "keys" / "clients", False
        )

        def start(port: int) -> None:
            for k in range(len(ids)):
                stack.enter_context(_process(root, k, ids[k], port))

        each = max(door.EACH, 16 * len(ids))  # all of them come from this machine
        return server.run(recipe, output, LOOPBACK, 0, tls, known, watch, say, start, each)


@contextlib.contextmanager
def _process(root: Path, k: int, id: str, port: int) -> Iterator[None]:
    """One client. It ends when its standard input does, so it outlives nobody."""
    command = [sys.executable, "-m", "fedlora.flower.trial", str(root), str(k), id, str(port)]
    with open(root / f"{k}.log", "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def input_closed() -> threading.Event:
    """An event that is set once whoever holds this process's standard input lets go of it."""
    closed = threading.Event()

    def wait() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock a thread must not hold when the process ends
            pass
        closed.set()

    threading.Thread(target=wait, daemon=True).start()
    return closed


def main(root: Path, k: int, id: str, port: int) -> None:
    """A client process of a trial."""
    stop = input_closed()
    recipe = Recipe.load(root / "recipe.yaml")

    def make(_: Mapping[str, Any], folder: Path) -> Federation:
        mine = recipe.override("run.keep=all", "federation.clients_per_round=null", "federation.min_clients=1")
        return build.federation(mine, folder, lambda r, tokenizer: build.data_of(r, tokenizer).only(k))

    site = Site(make, root / "state" / str(k), say=print)
    uplink = client.Uplink(
        f"{LOOPBACK}:{port}", root / "keys" / "ca.pem", keys.private_key(root / "keys" / "clients" / f"{id}.key")
    )
    client.serve(uplink, site, print, stop)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
