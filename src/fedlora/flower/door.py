"""The listening side of the server: how many connections there are, and how long a request may take to arrive.

Flower checks who somebody is when a request is complete. Until then nothing is known of a peer but its address, so that is
what is limited here.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from uvicorn import Server
from uvicorn.protocols.http.auto import AutoHTTPProtocol

EACH = 512  # connections of one address: a client opens up to eight while it sends, and many may come through one proxy
RESERVE = 128  # open files of the process that are not connections
GREETING = 10.0  # seconds for the TLS handshake, and for the head of a request
STALLED = 30.0  # seconds without a byte of a request's body
SLOWEST = 4096.0  # bytes a second of a body, on the whole
QUIET = 60.0  # seconds in which the same thing is said once


def room() -> int:
    """Connections that the process may hold, of the files that the system lets it open."""
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except (ImportError, OSError, ValueError):
        return 512 - RESERVE
    return 2**16 if soft < 0 else max(soft - RESERVE, soft // 2)


class Seldom:
    """Says the same of the same peer once a minute: strangers must not fill the log."""

    def __init__(self, say: Callable[[str], None], quiet: float = QUIET):
        self.say, self.quiet = say, quiet
        self._last: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()

    def __call__(self, who: str, kind: str, text: str) -> None:
        now = time.monotonic()
        with self._lock:
            if now - self._last.get((who, kind), -self.quiet) < self.quiet:
                return
            if len(self._last) > 10_000:
                self._last.clear()
            self._last[who, kind] = now
        self.say(text)


class _Guest(socket.socket):
    """A connection that tells the door when it is closed."""

    left: Callable[[], None] | None = None

    def close(self) -> None:
        super().close()
        if self.left is not None:
            left, self.left = self.left, None
            left()


class Door(socket.socket):
    """A listening socket. Once limited it holds at most `most` connections, and `each` of one address; further ones are closed
    at once."""

    limited = False

    def limit(self, most: int, each: int, say: Seldom) -> Door:
        self.most, self.each, self.say, self.limited = most, each, say, True
        self.inside: Counter[str] = Counter()
        self._count = threading.Lock()
        return self

    def accept(self) -> tuple[socket.socket, Any]:
        plain, address = super().accept()
        if not self.limited:
            return plain, address
        guest = _Guest(plain.family, plain.type, plain.proto, fileno=plain.detach())
        who = str(address[0])
        with self._count:
            full = self.inside.total() >= self.most
            crowded = self.inside[who] >= self.each
            if not (full or crowded):
                self.inside[who] += 1
                guest.left = lambda: self._leave(who)
        if full or crowded:
            guest.close()
            limit = f"{self.each} connections open" if crowded else f"come while {self.most} connections are open"
            self.say(who, "door", f"refused: {who} has {limit}, no more are taken")
            raise ConnectionAbortedError  # asyncio goes on to the next connection
        return guest, address

    def _leave(self, who: str) -> None:
        with self._count:
            self.inside[who] -= 1
            if self.inside[who] <= 0:
                del self.inside[who]


class Patient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol, which waits for the head of a request for GREETING seconds, and not for ever."""

    _wait: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._expect(False)  # the head is here
        elif self._wait is None and (self.cycle is None or self.cycle.response_complete):
            self._expect()  # bytes of the next request

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(False)
        super().connection_lost(exc)

    def _expect(self, head: bool = True) -> None:
        if self._wait is not None:
            self._wait.cancel()
        self._wait = self.loop.call_later(GREETING, self._late) if head else None

    def _late(self) -> None:
        self._wait = None
        if not self.transport.is_closing():
            self.transport.abort()


class Quiet(Server):
    """A uvicorn server whose loop says in one line what it would print as a stack, and ends handshakes that do not end."""

    say: Seldom | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._told)
        if self.config.ssl is not None:
            create = loop.create_server

            def patient(*args: Any, **more: Any) -> Any:
                return create(*args, **more, ssl_handshake_timeout=GREETING, ssl_shutdown_timeout=GREETING)

            loop.create_server = patient  # type: ignore[method-assign]
        await super().startup(sockets=sockets)

    def _told(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        e = context.get("exception")
        if self.say is not None:
            self.say("", type(e).__name__, f"network: {context.get('message', '')} ({type(e).__name__}: {e})")


class Slow(Exception):
    """The body of a request does not arrive."""


class Full(Exception):
    """The bodies that are on their way together are too large."""


class Bodies:
    """Bytes that have arrived of requests that are not answered yet: at most `most` of all peers together.

    Each request is limited, but hundreds of connections could hold as many large ones before any is checked. Bytes count
    once they are here: what a peer only announces keeps nobody out.
    """

    def __init__(self, most: int):
        self.most, self.held = most, 0

    @contextlib.contextmanager
    def one(self) -> Iterator[Callable[[int], None]]:
        """Around one request; gives what takes further bytes of it and raises Full."""
        mine = 0

        def take(size: int) -> None:
            nonlocal mine
            mine += size
            self.held += size
            if self.held > self.most:
                raise Full

        try:
            yield take
        finally:
            self.held -= mine


def timed(receive: Callable[[], Any], length: int, take: Callable[[int], None]) -> Callable[[], Any]:
    """ASGI's receive, for a body of `length` bytes that must arrive in time. take: see Bodies. Raises Slow and Full."""
    end = time.monotonic() + STALLED + length / SLOWEST
    complete = False

    async def next_part() -> Any:
        nonlocal complete
        if complete:
            return await receive()  # waits for the peer to go away
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(STALLED, max(end - time.monotonic(), 0.0))):
                event = await receive()
                take(len(event.get("body", b"")))
                complete = event["type"] != "http.request" or not event.get("more_body", False)
                return event
        raise Slow

    return next_part
