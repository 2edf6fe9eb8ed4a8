"""A `Link` over Flower's Grid: messages to nodes, replies as they arrive, sent again to a node that came back."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from ..deploy import schema
from ..deploy.packets import Packet
from ..errors import printable
from . import records

PULLERS = 16  # threads that wait for replies
Session = str  # of a node: when it was last activated


class GridLink:
    """online: node id -> (name proved by its key or None, session). poll: seconds between questions for replies. known: names
    whose keys may connect.

    Flower's own `send_and_receive` asks every three seconds and gives nothing before the last reply is there.
    """

    def __init__(
        self, grid: Grid, online: Callable[[], Mapping[int, tuple[str | None, Session]]], poll: float = 0.1,
        known: Sequence[str] = (),
    ):  # fmt: skip
        self.grid, self.online, self.poll, self.known = grid, online, poll, known

    def nodes(self) -> Mapping[int, str | None]:
        return {n: name for n, (name, _) in self.online().items()}

    def exchange(self, packets: Mapping[int, Packet], deadline: float) -> Iterator[tuple[int, Packet | str]]:
        end = time.monotonic() + deadline
        session = {n: s for n, (_, s) in self.online().items()}
        asked: dict[str, int] = {}
        for node, packet in packets.items():
            id = self._send(node, packet, deadline)
            if id is None:
                yield node, "the order could not be sent: it went away"
            else:
                asked[id] = node
        arrived: queue.Queue[tuple[str, Message | str]] = queue.Queue()
        over = threading.Event()
        pullers = [
            threading.Thread(target=self._pull, args=(asked, i, arrived, over), daemon=True)
            for i in range(min(PULLERS, len(asked)))
        ]
        for thread in pullers:
            thread.start()
        try:
            while asked and time.monotonic() < end:
                try:
                    id, message = arrived.get(timeout=min(1.0, max(end - time.monotonic(), 0.0)))
                except queue.Empty:
                    self._again(asked, packets, session, end)
                    continue
                to = asked.pop(id, None)
                if to is not None:
                    yield to, message if isinstance(message, str) else self._reply(message)
        finally:
            over.set()

    def _pull(
        self, asked: dict[str, int], i: int, arrived: queue.Queue[tuple[str, Message | str]], over: threading.Event
    ) -> None:
        """Ask for the replies of every PULLERS-th node. Flower waits minutes inside a pull for the rest of a reply that was
        cut off: that must not hold up the others."""
        place = {node: k for k, node in enumerate(sorted(asked.values()))}
        done: set[str] = set()
        while not over.is_set():
            for id, node in list(asked.items()):
                if place[node] % PULLERS == i and id not in done:
                    try:
                        for message in self.grid.pull_messages([id]):
                            arrived.put((message.metadata.reply_to_message_id, message))
                    except (
                        httpx.HTTPError,
                        RuntimeError,
                    ):  # the link was closed meanwhile, or is overloaded: it is tried again next time
                        if over.is_set():
                            return
                    except Exception as e:  # a reply that Flower cannot read ends neither this thread nor the run
                        done.add(id)
                        arrived.put((id, f"its reply cannot be read ({type(e).__name__})"))
            over.wait(self.poll)

    def _again(
        self, asked: dict[str, int], packets: Mapping[int, Packet], session: dict[int, Session], end: float
    ) -> None:
        """Send again to nodes that were restarted: what they had taken is lost."""
        for node, (_, now) in self.online().items():
            waiting = [m for m, n in asked.items() if n == node]
            if waiting and now != session.get(node):
                id = self._send(node, packets[node], end - time.monotonic())
                if id is not None:
                    session[node] = now
                    del asked[waiting[0]]
                    asked[id] = node

    def _send(self, node: int, packet: Packet, seconds: float) -> str | None:
        """The message's id; None for a node that went away just now."""
        message = Message(records.pack(packet), dst_node_id=node, message_type=records.TYPE, ttl=max(seconds, 1.0))
        try:
            return next(iter(self.grid.push_messages([message])), None) or None
        except httpx.HTTPError:
            return None

    @staticmethod
    def _reply(message: Message) -> Packet | str:
        try:
            if message.has_error():
                return f"no reply: {printable(message.error.reason, 500)}"
            return records.unpack(message.content)
        except Exception as e:
            return schema.reason(e)
