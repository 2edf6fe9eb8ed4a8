"""A `Link` over Flower's Grid: messages to nodes, replies as they arrive, sent again to a node that came back."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import httpx
from flwr.app import Message
from flwr.serverapp import Grid

from ..deploy.packets import Packet
from ..errors import UploadError
from . import records

PULLERS = 16  # threads that wait for replies
Session = str  # of a node: when it was last activated


class GridLink:
    """online: node id -> (name proved by its key or None, session). poll: seconds between questions for replies.

    Flower's own `send_and_receive` asks every three seconds and gives nothing before the last reply is there.
    """

    def __init__(self, grid: Grid, online: Callable[[], Mapping[int, tuple[str | None, Session]]], poll: float = 0.1):
        self.grid, self.online, self.poll = grid, online, poll

    def nodes(self) -> Mapping[int, str | None]:
        return {n: name for n, (name, _) in self.online().items()}

    def exchange(self, packets: Mapping[int, Packet], deadline: float) -> Iterator[tuple[int, Packet | str]]:
        end = time.monotonic() + deadline
        session = {n: s for n, (_, s) in self.online().items()}
        asked = {self._send(node, packet, deadline): node for node, packet in packets.items()}
        arrived: queue.Queue[Message] = queue.Queue()
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
                    message = arrived.get(timeout=min(1.0, max(end - time.monotonic(), 0.0)))
                except queue.Empty:
                    self._again(asked, packets, session, end)
                    continue
                node = asked.pop(message.metadata.reply_to_message_id, None)
                if node is not None:
                    yield node, self._reply(message, node)
        finally:
            over.set()

    def _pull(self, asked: dict[str, int], i: int, arrived: queue.Queue[Message], over: threading.Event) -> None:
        """Ask for the replies of every PULLERS-th node. Flower waits minutes inside a pull for the rest of a reply that was
        cut off: that must not hold up the others."""
        place = {node: k for k, node in enumerate(sorted(asked.values()))}
        while not over.is_set():
            for id, node in list(asked.items()):
                if place[node] % PULLERS == i:
                    try:
                        for message in self.grid.pull_messages([id]):
                            arrived.put(message)
                    except (httpx.HTTPError, RuntimeError):  # closed under our hands, or asked too much: the next time
                        if over.is_set():
                            return
            over.wait(self.poll)

    def _again(
        self, asked: dict[str, int], packets: Mapping[int, Packet], session: dict[int, Session], end: float
    ) -> None:
        """Send again to nodes that were restarted: what they had taken is lost."""
        for node, (_, now) in self.online().items():
            waiting = [m for m, n in asked.items() if n == node]
            if waiting and now != session.get(node):
                session[node] = now
                del asked[waiting[0]]
                asked[self._send(node, packets[node], end - time.monotonic())] = node

    def _send(self, node: int, packet: Packet, seconds: float) -> str:
        message = Message(records.pack(packet), dst_node_id=node, message_type=records.TYPE, ttl=max(seconds, 1.0))
        (id,) = self.grid.push_messages([message])
        return id

    @staticmethod
    def _reply(message: Message, node: int) -> Packet | str:
        if message.has_error():
            return f"no reply from node {node}: {message.error.reason}"
        try:
            return records.unpack(message.content)
        except UploadError as e:
            return str(e)
