"""A page of a run or a deployment that follows it: a small web server for whoever sits at this machine.

It serves the report's own page at /, the plotting library at /plotly.js, and at /state what changes when the page is out of date.
The page asks for that every second. Nothing can be changed through it.
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import ConfigError, FedloraError, Problem, StateError, printable
from ..files import sealed
from ..units import seconds
from . import html_of, need_plotly
from .page import Block, Tile, run_page
from .read import records

FILES = ("metrics.jsonl", "summary.json", "status.json", "recipe.json")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Scripts and styles stand in the page; nothing is asked of another address, and no other page may frame it.
POLICY = "default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'"


def version(folder: Path) -> str:
    """Another text whenever one of the run's files has changed."""
    found = []
    for name in FILES:
        try:
            s = (folder / name).stat()
            found.append(f"{s.st_mtime_ns}.{s.st_size}")
        except FileNotFoundError:
            found.append("-")
    return " ".join(found)


def live_page(folder: Path) -> dict[str, Any]:
    """The report's page of a run folder, with where a deployment stands. Raises StateError for a folder that holds no run."""
    page = run_page(records(folder))
    status = sealed.read(folder / "status.json")
    if status is None:
        return page
    ago = seconds(max(time.time() - status["updated"], 0.0))
    stands = f"round {status['round']} of {status['rounds']}" if status.get("round") is not None else "before round 1"
    tile = Tile("now", status["state"], f"{stands}, said {ago} before this page was made")
    doing = status.get("clients", {})
    head = ("site", "client", "state")
    rows = [(site, c, doing.get(c, "here")) for site, held in sorted(status["sites"].items()) for c in held]
    rows += [(site, "–", f"cannot join: {why}") for site, why in sorted(status.get("failed", {}).items())]
    rows = [(printable(a, 200), printable(b, 200), printable(c, 200)) for a, b, c in rows]  # a site's own words
    block = Block("Who is there", "", table=[head, *rows], wide=True) if rows else None
    return page | {"tiles": [tile, *page["tiles"]], "blocks": [*([block] if block else []), *page["blocks"]]}


class Live(ThreadingHTTPServer):
    """Serves a run folder at an address; port 0 takes a free one. Raises ConfigError for an address that cannot be had,
    MissingPlotly, and StateError for a folder that holds no run."""

    daemon_threads = True

    def __init__(self, folder: Path, host: str = "127.0.0.1", port: int = 0):
        need_plotly()
        if not folder.is_dir():
            raise StateError(f"{folder}: no such folder; give a run folder, as `fedlora ls` lists them")
        records(folder)
        from plotly.offline import get_plotlyjs

        self.folder, self.library = folder, get_plotlyjs().encode()
        self.hosts = LOOPBACK if host in LOOPBACK else ()
        self._made, self._lock = ("", ""), Lock()
        try:
            super().__init__((host, port), _Handler)
        except OSError as e:
            raise ConfigError(
                [Problem("--listen", f"{host}:{port}", f"a free address of this machine ({e.strerror})")]
            ) from e
        self.url = f"http://{host}:{self.server_address[1]}/"

    def page(self) -> str:
        """The page as it is now, made once for each state of the run. While a file is being written, the one before."""
        with self._lock:
            now = version(self.folder)
            if now != self._made[0]:
                try:
                    self._made = now, html_of(live_page(self.folder), link="plotly.js", live=now)
                except (FedloraError, KeyError, ValueError) as e:
                    text = self._made[1] or _waiting(str(e))
                    self._made = "", text
            return self._made[1]


def _waiting(why: str) -> str:
    """A page that asks again, where the run cannot be read yet."""
    said = html.escape(printable(why))
    return f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="2"><title>fedlora</title><p>{said}</p>'


class _Handler(BaseHTTPRequestHandler):
    server: Live
    server_version, sys_version = "fedlora", ""

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0].strip("[]") or self.headers.get("Host", "")
        if self.server.hosts and host not in self.server.hosts:
            # A page of another site, whose name was made to mean this machine, must not read the run.
            self._answer(403, "text/plain", b"this page is for this machine alone")
            return
        made: dict[str, tuple[str, Callable[[], bytes]]] = {
            "/": ("text/html; charset=utf-8", lambda: self.server.page().encode()),
            "/state": ("application/json", lambda: json.dumps({"version": version(self.server.folder)}).encode()),
            "/plotly.js": ("text/javascript; charset=utf-8", lambda: self.server.library),
        }
        path = self.path.partition("?")[0]
        if path not in made:
            self._answer(404, "text/plain", b"there is no such page")
            return
        kind, body = made[path]
        self._answer(200, kind, body(), path == "/plotly.js")

    def _answer(self, code: int, kind: str, body: bytes, keep: bool = False) -> None:
        self.send_response(code)
        headers = {
            "Content-Type": kind, "Content-Length": str(len(body)), "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": POLICY, "Cache-Control": "max-age=86400" if keep else "no-store",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""
