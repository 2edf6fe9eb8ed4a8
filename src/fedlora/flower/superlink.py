"""Flower's SuperLink inside the server's process.

Of its three APIs only the fleet's faces the network: the control API has no authentication of its own, and whoever reaches
it can start a run or register a key. The run's token, which the runtime API asks for, never leaves this process.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvicorn
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig, load_control_authn_plugin
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app

from ..errors import StateError, printable
from .door import EACH, Bodies, Door, Full, Patient, Quiet, Seldom, Slow, room, timed
from .link import Session

FLEET, RUNTIME = ("/v1/fleet/",), ("/v1/runtime/",)
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class TLS:
    """Files of the server's certificate (with its chain) and key, PEM."""

    cert: Path
    key: Path


class SuperLink:
    """A context: while it is open, nodes can connect to host:port and `grid` reaches them.

    keys: name -> public key (compressed point as Flower sends it) of the nodes that may connect; None lets everybody in.
    limit: largest request, bytes. each: connections of one address. say: hears of refusals.
    """

    def __init__(
        self, host: str, port: int, tls: TLS | None, keys: Mapping[str, bytes] | None, limit: int,
        say: Callable[[str], None] = lambda text: None, each: int = EACH,
    ):  # fmt: skip
        self.host, self.port, self.tls, self.limit, self.each = host, port, tls, limit, each
        self.say = Seldom(say)
        self.names = {key: name for name, key in (keys or {}).items()}
        self.open_to_all = keys is None
        self._stop = threading.Event()

    def __enter__(self) -> SuperLink:
        self._level = logging.getLogger("flwr").level
        logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what is refused is said by the guard
        app = create_app(self._config(), SuperLinkLifespan)
        self.state: Any = app.state.linkstate_factory.state()
        for key, name in self.names.items():
            self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, heartbeat_interval=0, name=name)
        run = self.state.create_run("", "", "", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        (info,) = self.state.get_run_info(run_ids=[run])
        self.task = info.primary_task_id
        token = self.state.claim_task(self.task)
        self.state.activate_task(self.task)
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run, self.task, SUPERLINK_NODE_ID
        tls = {} if self.tls is None else {"ssl_certfile": self.tls.cert, "ssl_keyfile": self.tls.key}
        self._servers: list[tuple[uvicorn.Server, threading.Thread]] = []
        private = _bound(LOOPBACK, 0)
        public = _bound(self.host, self.port).limit(room(), min(self.each, max(room() // 2, 1)), self.say)
        self.port, inside = public.getsockname()[1], private.getsockname()[1]
        try:
            inner = guarded(app, RUNTIME, None, Seldom(lambda text: None))
            outer = guarded(app, FLEET, self.limit, self.say)
            self._servers.append(_serve(inner, private, self.say, lifespan="on"))
            self._servers.append(_serve(outer, public, self.say, lifespan="off", http=Patient, **tls))
        except BaseException:
            self._close()
            private.close()
            public.close()
            raise
        self._beat = threading.Thread(target=self._heartbeat, daemon=True)
        self._beat.start()
        self.grid = HttpGrid(f"{LOOPBACK}:{inside}", insecure=True, token=token)
        self.grid.set_run(info)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        logging.getLogger("flwr").setLevel(self._level)
        self.grid.close()
        self._close()
        self._beat.join(5)

    def _close(self) -> None:
        for server, thread in reversed(self._servers):
            server.should_exit = True
            thread.join(5)
            server.force_exit = True

    def online(self) -> dict[int, tuple[str | None, Session]]:
        """Nodes that are connected: the name that its key proves, and its session."""
        found = self.state.get_node_info(statuses=["online"])
        return {n.node_id: (self.names.get(n.public_key), str(n.last_activated_at)) for n in found}

    def _config(self) -> SuperLinkLifespanConfig:
        return SuperLinkLifespanConfig(
            control_address="", health_server_address=None, host=self.host, port=self.port, insecure=self.tls is None,
            certificates=None, superexec_auth_secret=secrets.token_bytes(32), authn_plugin=load_control_authn_plugin(),
            event_log_plugin=None, fleet_event_log_plugin=None, enable_event_log=False, artifact_provider=None,
            enable_supernode_auth=not self.open_to_all, fleet_api_type="grpc-rere", fleet_api_address=None, simulation=False,
            ssl_ca_certfile=None, ssl_certfile=None, ssl_keyfile=None, database=FLWR_IN_MEMORY_DB_NAME, isolation="process",
            runtime_dependency_install=False,
        )  # fmt: skip

    def _heartbeat(self) -> None:
        """The run's task counts as dead, and its token as void, without this."""
        while not self._stop.wait(5):
            self.state.acknowledge_task_heartbeat(self.task)


def most_of_bodies(limit: int) -> int:
    """Bytes of requests that may be on their way together: a quarter of the memory, and at least two of the largest."""
    return max(2 * limit, psutil.virtual_memory().total // 4)


def guarded(app: Any, prefixes: tuple[str, ...], limit: int | None, say: Seldom, most: int | None = None) -> Any:
    """The ASGI app, for paths below `prefixes` and bodies up to `limit` bytes that arrive in time; refusals are said, and
    what a request does to the app stays with it. most: bytes of all bodies that are on their way, by default as above."""
    bodies = Bodies(0 if limit is None else most or most_of_bodies(limit))

    async def refuse(send: Any, status: int, text: bytes) -> None:
        headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    async def guard(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        who = scope["client"][0] if scope.get("client") else "?"
        if not scope["path"].startswith(prefixes):
            say(who, "path", f"refused: {who} asked for {printable(scope['path'], 80)}, which is not served here")
            await refuse(send, 404, b"not served here")
            return
        length = dict(scope["headers"]).get(b"content-length", b"")
        if limit is not None and (not length.isdigit() or len(length) > 20 or int(length) > limit):
            stated = printable(length.decode(errors="replace"), 30) or "no stated number of"
            say(who, "large", f"refused: {who} sends {stated} bytes, expected at most {limit}")
            await refuse(send, 413, b"too large")
            return
        place, started = printable(scope["path"].rsplit("/", 1)[-1], 80), False

        async def told(event: Any) -> None:
            nonlocal started
            started = True
            if event["type"] == "http.response.start" and event["status"] in (400, 401, 403):
                say(who, "key", f"refused: {who} at {place}: unknown key, wrong signature or clock")
            await send(event)

        try:
            with bodies.one() as take:
                await app(scope, receive if limit is None else timed(receive, int(length), take), told)
        except Full:
            say(
                "",
                "full",
                f"refused: requests of more than {bodies.most} bytes together are on their way; {who} is asked to come again",
            )
            if not started:
                await refuse(send, 503, b"come again")
        except Exception as e:  # also Starlette's own, which comes after its answer
            slow = isinstance(e, Slow)
            why = "its request does not arrive" if slow else f"its request cannot be read ({type(e).__name__})"
            say(who, "request", f"refused: {who} at {place}: {why}")
            if not started:
                await refuse(send, 408 if slow else 400, b"too slow" if slow else b"cannot be read")

    return guard


def _bound(host: str, port: int) -> Door:
    """A listening socket. Raises StateError where the address cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        s = Door(found[0], found[1])
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(found[4])
        s.listen(128)
        return s
    except OSError as e:
        raise StateError(
            f"--listen {host}:{port}: {e.strerror or e}; choose an address of this machine and a free port"
        ) from e


def _serve(app: Any, sock: socket.socket, say: Seldom, **options: Any) -> tuple[uvicorn.Server, threading.Thread]:
    """A uvicorn server in a thread, once it listens. Raises StateError."""
    try:
        server = Quiet(
            uvicorn.Config(
                app,
                log_level="error",
                access_log=False,
                ws="none",
                loop="asyncio",
                timeout_graceful_shutdown=1,
                **options,
            )
        )
        server.config.load()
        server.say = say
    except (OSError, ValueError) as e:
        raise StateError(f"--tls-cert, --tls-key: {e}; give a certificate and its key as PEM files") from e
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started:
        if not thread.is_alive() or time.monotonic() > end:
            raise StateError("the server's network part did not start; look at the lines above")
        time.sleep(0.01)
    return server, thread
