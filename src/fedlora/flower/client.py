"""`fedlora client`: a resident SuperNode. It speaks Flower's Fleet API itself and answers with a `Site`.

Flower's own SuperNode starts a process for each message, which imports torch and loads the model each time, and runs the
code that the server sends. Here the model is loaded once, and no code ever comes over the wire.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from ..deploy.packets import Packet
from ..deploy.refusal import told
from ..deploy.site import Site, particulars
from ..errors import FedloraError
from . import records

Keys = tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]
POLL, SOON = 0.5, 0.05  # seconds between questions for work, at most and right after some
LONGEST_WAIT = 30.0  # seconds between attempts to reach a server that is away
PATIENCE = 60.0  # seconds with a server that says no; a session that ended without a word blocks its key for twenty
AWAY = (502, 503, 504)  # answers of a proxy before a server that is away
T = TypeVar("T")


class Refused(FedloraError):
    """The server does not let this node in; trying again does not help."""


@dataclass
class Uplink:
    """Where the server is. ca: PEM file of the authority that signed its certificate, None for the system's; insecure: no
    TLS and no key, for trials on one machine."""

    address: str
    ca: Path | None = None
    keys: Keys | None = None
    insecure: bool = False


def serve(uplink: Uplink, site: Site, say: Callable[[str], None], stop: threading.Event | None = None) -> None:
    """Answer the server's messages until `stop`; a server that is away is waited for. Raises Refused."""
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what goes wrong is said here, once
    stop = stop or threading.Event()
    pause, turned_away = 1.0, 0.0
    while not stop.is_set():
        try:
            with _connected(uplink, say, stop) as node:
                say(f"connected to {uplink.address}; waiting for its orders")
                pause, turned_away = 1.0, 0.0
                idle = SOON
                while not stop.is_set():
                    if node.work(site):
                        idle = SOON
                    else:
                        stop.wait(idle)
                        idle = min(2 * idle, POLL)
        except _Lost as e:
            say(f"{uplink.address}: {e}; connecting again")
        except (httpx.TransportError, httpx.HTTPStatusError) as e:
            turned_away = turned_away + pause if isinstance(e, httpx.HTTPStatusError) else 0.0
            _explain(e, uplink, turned_away)
            say(f"{uplink.address}: {_short(e)}; trying again in {pause:.0f} s")
            # So that sites do not come all at once.
            stop.wait(pause * random.Random(time.monotonic_ns()).uniform(0.8, 1.2))
            pause = min(2 * pause, LONGEST_WAIT)


class _Lost(Exception):
    """The session is over: the server was started again, or does not know this node any more."""


def _short(e: Exception) -> str:
    if isinstance(e, httpx.HTTPStatusError):
        return f"the server answered {e.response.status_code}"
    return str(e) or type(e).__name__


def _explain(e: Exception, uplink: Uplink, turned_away: float) -> None:
    """Raise Refused for what waiting does not mend. turned_away: seconds for which the server has answered and said no."""
    if "CERTIFICATE_VERIFY_FAILED" in str(e) or "certificate verify failed" in str(e):
        raise Refused(
            f"{uplink.address}: its certificate is not trusted ({e}); give the authority that signed it with --ca, and connect "
            "by a name that stands in the certificate"
        ) from e
    if isinstance(e, httpx.HTTPStatusError) and e.response.status_code == 401:
        raise Refused(
            f"{uplink.address}: the server refused our signature: is this machine's clock right? It may be off by five "
            "minutes at most"
        ) from e
    if turned_away > PATIENCE:
        raise Refused(
            f"{uplink.address}: the server does not let us in: our public key is not in its --clients-keys, or another client "
            "is connected with it; send the .pub file to whoever runs the server"
        ) from e


@contextlib.contextmanager
def _connected(uplink: Uplink, say: Callable[[str], None], stop: threading.Event) -> Iterator[_Node]:
    keys = uplink.keys or generate_key_pairs()
    try:
        ca = None if uplink.ca is None else uplink.ca.read_bytes()
        client = FleetHttpClient.from_server_address(
            uplink.address, uplink.insecure, ca,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(*keys)],
        )  # fmt: skip
    except (OSError, ValueError) as e:  # ssl.SSLError is an OSError
        raise Refused(f"--ca {uplink.ca}: {e}; give the PEM file of the server's authority") from e
    with client:
        public = public_key_to_bytes(keys[1])
        if uplink.keys is None:
            client.RegisterNode(RegisterNodeFleetRequest(public_key=public))
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        node = _Node(client, client.ActivateNode(request).node_id, say, stop)
        try:
            yield node
        finally:
            node.close()


class _Node:
    """One session with the server: heartbeats in the background, messages in the foreground."""

    def __init__(self, client: FleetHttpClient, id: int, say: Callable[[str], None], stop: threading.Event):
        self.client, self.node, self.say, self.stop = client, Node(node_id=id), say, stop
        self._stop, self._lost = threading.Event(), threading.Event()
        self._beat = threading.Thread(target=self._heartbeat, daemon=True)
        self._beat.start()

    def _call(self, request: Callable[[Any], T]) -> Callable[[Any], T]:
        """The request, sent again while the connection is down: what was taken or done is not lost by a cut cable."""

        def call(message: Any) -> T:
            pause = 0.5
            while True:
                if self._lost.is_set() or self.stop.is_set():
                    raise _Lost("the server does not know us any more")
                try:
                    return request(message)
                except httpx.HTTPStatusError as e:
                    if e.response.status_code == 413:
                        raise Refused(
                            "a request of ours is too large for the server or for a proxy before it; let requests of "
                            f"{records.LARGEST // 2**20} MiB pass (nginx: client_max_body_size)"
                        ) from e
                    if e.response.status_code not in AWAY:
                        raise _Lost(_short(e)) from e
                    reason = _short(e)
                except httpx.TransportError as e:
                    reason = _short(e)
                if pause == 0.5:
                    self.say(f"connection lost ({reason}); trying again")
                self.stop.wait(pause)
                pause = min(2 * pause, LONGEST_WAIT)

        return call

    def work(self, site: Site) -> bool:
        """Take one message and answer it; False if there is none."""
        response = self._call(self.client.PullMessages)(PullMessagesRequest(node=self.node))
        if not response.messages_list:
            return False
        try:
            message = self._pull(response.messages_list[0], response.message_object_trees[0])
        except (_Lost, Refused, httpx.HTTPError):
            raise
        except Exception as e:  # whatever a server sends, we go on with its next order
            self.say(f"an order cannot be read ({type(e).__name__}); waiting for the next one")
            return True
        TaskIdentity.run_id, TaskIdentity.node_id = message.metadata.run_id, self.node.node_id
        start = time.monotonic()
        reply = Message(records.pack(_answer(site, message)), reply_to=message)
        self._push(reply, time.monotonic() - start)
        return True

    def _pull(self, proto: ProtoMessage, tree: ObjectTree) -> Message:
        told = message_from_proto(proto)
        run = told.metadata.run_id
        message: Message = pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(self._call(self.client.PullObject), self.node, run),
            make_confirm_message_received_fn_protobuf(self._call(self.client.ConfirmMessageReceived), self.node, run),
            return_type=Message,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def _push(self, reply: Message, seconds: float) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        run = reply.metadata.run_id
        with no_object_id_recompute():
            response = self._call(self.client.PushMessages)(
                PushMessagesRequest(
                    node=self.node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                    clientapp_runtime_list=[seconds],
                )
            )
            push_objects(
                get_all_nested_objects(reply),
                make_push_object_fn_protobuf(self._call(self.client.PushObject), self.node, run, response.session_id),
                object_ids_to_push=set(response.objects_to_push),
            )

    def _heartbeat(self) -> None:
        """Tell the server that we are here, also while we train."""
        while not self._stop.wait(HEARTBEAT_MIN_INTERVAL / 2):
            try:
                request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
                if not self.client.SendNodeHeartbeat(request).success:
                    self._lost.set()
            except httpx.HTTPStatusError as e:
                if e.response.status_code < 500:
                    self._lost.set()
            except httpx.TransportError:
                continue  # the foreground notices

    def close(self) -> None:
        self._stop.set()
        self._beat.join(HEARTBEAT_MIN_INTERVAL)
        with contextlib.suppress(httpx.HTTPError):
            self.client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))


def _answer(site: Site, message: Message) -> Packet:
    try:
        return site.answer(records.unpack(message.content))
    except Exception as e:
        site.say(f"failed: {particulars(e)}")
        return Packet("join", {"error": told(e)})
