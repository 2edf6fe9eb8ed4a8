"""`fedlora server`: SuperLink, run and rounds in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..deploy.coordinator import coordinator
from ..errors import ConfigError, Problem
from ..federation.callbacks import Callback
from ..federation.run import Federation
from ..recipe import Recipe
from .door import EACH
from .keys import public_keys
from .link import GridLink
from .records import LARGEST
from .superlink import TLS, SuperLink


def address(listen: str, option: str = "--listen", anywhere: str = "0.0.0.0") -> tuple[str, int]:
    """host and port of "host:port", "[v6]:port" or ":port", which is at `anywhere`. Raises ConfigError."""
    host, _, port = listen.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError([Problem(option, listen, "host:port", f"for example {anywhere}:8443")])
    return host.strip("[]") or anywhere, int(port)


def security(
    tls_cert: Path | None, tls_key: Path | None, clients_keys: Path | None, insecure: bool
) -> tuple[TLS | None, dict[str, bytes] | None]:
    """TLS and the keys that may connect. Raises ConfigError for anything missing, unless it is said with --insecure."""
    if insecure:
        if tls_cert or tls_key or clients_keys:
            raise ConfigError([Problem("--insecure", "beside TLS files or keys", "alone", "drop it, or drop those")])
        return None, None
    bad = [
        Problem(flag, None, what, "make all of them: fedlora federation keys; or say --insecure for a trial")
        for flag, value, what in (
            ("--tls-cert", tls_cert, "the server's certificate (PEM)"),
            ("--tls-key", tls_key, "its key (PEM)"),
            ("--clients-keys", clients_keys, "a folder of <id>.pub files"),
        )
        if value is None
    ]
    bad += [
        Problem(flag, str(value), "a file that exists")
        for flag, value in (("--tls-cert", tls_cert), ("--tls-key", tls_key))
        if value is not None and not value.is_file()
    ]
    if bad:
        raise ConfigError(bad)
    assert tls_cert is not None and tls_key is not None and clients_keys is not None
    return TLS(tls_cert, tls_key), public_keys(clients_keys)


def run(
    recipe: Recipe, output: Path | None, host: str, port: int, tls: TLS | None, keys: dict[str, bytes] | None,
    watch: Callback, say: Callable[[str], None] = lambda text: None, ready: Callable[[int], None] = lambda port: None,
    each: int = EACH,
) -> tuple[Federation, dict[str, Any]]:  # fmt: skip
    """Serve a recipe's run to its end; returns it and its summary. ready: hears the port once clients may connect.
    each: connections of one address."""
    with contextlib.ExitStack() as stack:

        def link() -> GridLink:
            superlink = stack.enter_context(SuperLink(host, port, tls, keys, LARGEST, say, each))
            ready(superlink.port)
            return GridLink(superlink.grid, superlink.online, known=sorted(keys or ()))

        fed = coordinator(recipe, output, link, say)
        return fed, fed.run(watch)
