"""The listening side of a server: strangers who say half a word, or nothing, keep nobody else out."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("flwr")

from fedlora.flower import door, superlink

# Asyncio's, of sockets that were cut.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
HEAD = b"POST /v1/fleet/echo HTTP/1.1\r\nhost: x\r\n"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body it was sent; falls over when it is asked to."""
    body, more = b"", True
    while more:
        event = await receive()
        body, more = body + event.get("body", b""), event.get("more_body", False)
    if body == b"fall":
        raise RecursionError("over")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def listening(
    most: int = 100, each: int = 100, limit: int = 1000, together: int | None = None
) -> Iterator[tuple[int, list[str]]]:
    heard: list[str] = []
    say = door.Seldom(heard.append)
    sock = superlink._bound("127.0.0.1", 0).limit(most, each, say)
    server, thread = superlink._serve(
        superlink.guarded(app, superlink.FLEET, limit, say, together), sock, say, lifespan="off", http=door.Patient
    )
    try:
        yield sock.getsockname()[1], heard
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)


def connect(port: int, say: bytes = b"") -> socket.socket:
    s = socket.create_connection(("127.0.0.1", port), timeout=60)
    s.sendall(say)
    return s


def closed(s: socket.socket) -> bytes:
    """All that comes until the other side closes; waits for that."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while data := s.recv(4096):
            got += data
    s.close()
    return got


def post(port: int, body: bytes) -> bytes:
    return closed(connect(port, HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body))


def eventually(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_half_a_head_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "GREETING", 0.2)
    with listening() as (port, _):
        silent, half = connect(port), connect(port, HEAD)
        assert post(port, b"hello").endswith(b"hello")
        assert closed(silent) == closed(half) == b""


def test_half_a_body_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "STALLED", 0.2)
    with listening() as (port, heard):
        half = connect(port, HEAD + b"content-length: 10\r\n\r\nabc")
        assert b" 408 " in closed(half)
        assert any("its request does not arrive" in text for text in heard)
        assert post(port, b"hello").endswith(b"hello")


def test_bodies_on_their_way_have_a_common_limit() -> None:
    """Many connections, each with a large body that never ends, hold no more memory than that; what is only announced is none
    of it. Whoever comes in between is asked to come again, and is served once there is room."""
    with listening(limit=1000, together=1000) as (port, heard):
        announced = [connect(port, HEAD + b"content-length: 1000\r\n\r\n") for _ in range(5)]
        assert post(port, b"x" * 900).endswith(b"x" * 900)
        held = connect(port, HEAD + b"content-length: 1000\r\n\r\n" + b"x" * 600)
        assert eventually(lambda: b" 503 " in post(port, b"x" * 900))
        assert any("more than 1000 bytes together are on their way" in text for text in heard)
        assert post(port, b"x" * 300).endswith(b"x" * 300)
        held.close()
        assert eventually(lambda: post(port, b"x" * 900).endswith(b"x" * 900))
        for s in announced:
            s.close()


def test_a_body_that_drips_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is no reason to wait for ever."""
    monkeypatch.setattr(door, "STALLED", 0.5)
    monkeypatch.setattr(door, "SLOWEST", 1e9)
    with listening() as (port, _):
        slow = connect(port, HEAD + b"content-length: 1000\r\n\r\n")
        over = threading.Event()

        def drip() -> None:
            with contextlib.suppress(OSError):
                while not over.wait(0.05):
                    slow.sendall(b"x")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            assert b" 408 " in closed(slow)
        finally:
            over.set()
            thread.join()


def test_one_address_holds_no_more_than_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(each=3) as (port, heard):
        held = [connect(port) for _ in range(3)]
        assert eventually(lambda: closed(connect(port)) == b"")
        assert eventually(lambda: any("3 connections open" in text for text in heard))
        for s in held:
            s.close()
        assert eventually(lambda: post(port, b"hello").endswith(b"hello"))
        for _ in range(20):  # whoever has gone does not count
            assert eventually(lambda: post(port, b"again").endswith(b"again"))


def test_all_addresses_together_leave_files_for_the_server() -> None:
    with listening(most=2) as (port, heard):
        held = [connect(port) for _ in range(2)]
        assert eventually(lambda: closed(connect(port)) == b"")
        assert eventually(lambda: any("while 2 connections are open" in text for text in heard))
        for s in held:
            s.close()
        assert eventually(lambda: post(port, b"hello").endswith(b"hello"))
    assert 0 < door.room() <= 2**16


def test_what_falls_over_is_said_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with listening() as (port, heard):
        assert b" 400 " in post(port, b"fall")
        assert b" 413 " in closed(connect(port, HEAD + b"content-length: 99999\r\n\r\n"))
        assert b" 413 " in closed(connect(port, HEAD + b"\r\n"))
        assert post(port, b"hello").endswith(b"hello")
    assert any("cannot be read (RecursionError)" in text for text in heard)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_same_is_said_once_a_minute() -> None:
    heard: list[str] = []
    seldom = door.Seldom(heard.append)
    for who, kind in [("a", "x"), ("a", "x"), ("b", "x"), ("a", "y"), ("b", "x")]:
        seldom(who, kind, who + kind)
    assert heard == ["ax", "bx", "ay"]


def test_a_handshake_that_does_not_end_is_ended(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlora.flower import keys

    monkeypatch.setattr(door, "GREETING", 0.2)
    keys.make(tmp_path, ["127.0.0.1"], ["a"])
    say = door.Seldom(lambda text: None)
    sock = superlink._bound("127.0.0.1", 0).limit(10, 10, say)
    server, thread = superlink._serve(
        superlink.guarded(app, superlink.FLEET, 1000, say), sock, say, lifespan="off", http=door.Patient,
        ssl_certfile=tmp_path / "server.pem", ssl_keyfile=tmp_path / "server.key",
    )  # fmt: skip
    try:
        assert closed(connect(sock.getsockname()[1])) == b""
        assert eventually(lambda: not sock.inside)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)


def test_the_servers_own_door_is_not_limited() -> None:
    """The rounds reach SuperLink by a second socket, on the loopback."""
    say = door.Seldom(lambda text: None)
    sock = superlink._bound("127.0.0.1", 0)
    server, thread = superlink._serve(superlink.guarded(app, superlink.FLEET, None, say), sock, say, lifespan="off")
    try:
        assert post(sock.getsockname()[1], b"hello").endswith(b"hello")
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)
