"""`fedlora client`: a resident SuperNode. It speaks Flower's Fleet API itself and answers with a `Site`.

Flower's own SuperNode starts a process for each message, which imports torch and loads the model each time, and runs the
code that the server sends. Here the model is loaded once, and no code ever comes over the wire.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

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
from ..deploy.site import Site
from ..errors import FedloraError, UploadError
from . import records

Keys = tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]
POLL = 0.5  # seconds between questions for work
LONGEST_WAIT = 30.0  # between attempts to reach a server that is away


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
    stop = stop or threading.Event()
    pause = 1.0
    while not stop.is_set():
        try:
            with _connected(uplink) as node:
                say(f"connected to {uplink.address}")
                pause = 1.0
                while not stop.is_set():
                    if not node.work(site):
                        stop.wait(POLL)
        except (httpx.TransportError, httpx.HTTPStatusError, _Lost) as e:
            _explain(e, uplink)
            say(f"{uplink.address}: {_short(e)}; trying again in {pause:.0f} s")
            stop.wait(
                pause * random.Random(time.monotonic_ns()).uniform(0.8, 1.2)
            )  # so that sites do not come all at once
            pause = min(2 * pause, LONGEST_WAIT)


class _Lost(Exception):
    """The server no longer knows this node."""


def _short(e: Exception) -> str:
    if isinstance(e, httpx.HTTPStatusError):
        return f"the server answered {e.response.status_code}"
    return str(e) or type(e).__name__


def _explain(e: Exception, uplink: Uplink) -> None:
    """Raise Refused for what waiting does not mend."""
    if "CERTIFICATE_VERIFY_FAILED" in str(e) or "certificate verify failed" in str(e):
        raise Refused(
            f"{uplink.address}: its certificate is not trusted ({e}); give the authority that signed it with --ca, and connect "
            "by a name that stands in the certificate"
        ) from e
    if isinstance(e, httpx.HTTPStatusError) and e.response.status_code == 401:
        raise Refused(
            f"{uplink.address}: the server refused our signature; is the public key in its --clients-keys, and is this "
            "machine's clock right (it may be off by five minutes at most)?"
        ) from e
    if isinstance(e, httpx.HTTPStatusError) and e.response.status_code == 413:
        raise Refused(
            f"{uplink.address}: the server refused a message as too large; are both sides of one version?"
        ) from e


@contextlib.contextmanager
def _connected(uplink: Uplink) -> Iterator[_Node]:
    keys = uplink.keys or generate_key_pairs()
    ca = None if uplink.ca is None else str(uplink.ca)
    try:
        client = FleetHttpClient.from_server_address(
            uplink.address, uplink.insecure, ca,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(*keys)],
        )  # fmt: skip
    except OSError as e:
        raise Refused(f"--ca {uplink.ca}: {e.strerror or e}; give the PEM file of the server's authority") from e
    with client:
        public = public_key_to_bytes(keys[1])
        if uplink.keys is None:
            client.RegisterNode(RegisterNodeFleetRequest(public_key=public))
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_MIN_INTERVAL)
        node = _Node(client, client.ActivateNode(request).node_id)
        try:
            yield node
        finally:
            node.close()


class _Node:
    """One session with the server: heartbeats in the background, messages in the foreground."""

    def __init__(self, client: FleetHttpClient, id: int):
        self.client, self.node = client, Node(node_id=id)
        self._stop, self._lost = threading.Event(), threading.Event()
        self._beat = threading.Thread(target=self._heartbeat, daemon=True)
        self._beat.start()

    def work(self, site: Site) -> bool:
        """Take one message and answer it; False if there is none."""
        if self._lost.is_set():
            raise _Lost("the server does not know us any more (was it started again?)")
        response = self.client.PullMessages(PullMessagesRequest(node=self.node))
        if not response.messages_list:
            return False
        message = self._pull(response.messages_list[0], response.message_object_trees[0])
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
            make_pull_object_fn_protobuf(self.client.PullObject, self.node, run),
            make_confirm_message_received_fn_protobuf(self.client.ConfirmMessageReceived, self.node, run),
            return_type=Message,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        return message

    def _push(self, reply: Message, seconds: float) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        run = reply.metadata.run_id
        with no_object_id_recompute():
            response = self.client.PushMessages(
                PushMessagesRequest(
                    node=self.node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                    clientapp_runtime_list=[seconds],
                )
            )
            push_objects(
                get_all_nested_objects(reply),
                make_push_object_fn_protobuf(self.client.PushObject, self.node, run, response.session_id),
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
    except UploadError as e:
        return Packet("join", {"error": str(e)})
