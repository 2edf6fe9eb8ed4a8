"""What server and sites say to each other: a JSON header and one encoded message per client.

Every packet names its run and round, so that one of another run, or one that is sent again, is seen to be foreign. What
headers may say stands in schema.py; `order_of` and `reply_of` read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from . import schema
from .refusal import heard
from .schema import PacketError

Kind = Literal["join", "train", "evaluate"]
KINDS: tuple[Kind, ...] = ("join", "train", "evaluate")
EVERYBODY = ""  # the part that all clients of a packet read, where a method sends all of them the same
PROTOCOL = 2  # of packets; both sides must speak the same


@dataclass(frozen=True)
class Packet:
    """header: JSON. parts: bytes of `wire.encode` by client id.

    A server's header: run, protocol, recipe, round, rounds, clients (id -> round of its last accepted upload, or null).
    A site's: run, round, clients (id -> facts), and what the kind asks for; or error (code, field, text), why it cannot answer.
    """

    kind: Kind
    header: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, bytes] = field(default_factory=dict)


def order_of(packet: Packet) -> schema.JoinOrder | schema.WorkOrder:
    """At a site: what a server's packet asks for. Raises PacketError for all that a server of ours does not send."""
    h = packet.header
    protocol = h.get("protocol") if isinstance(h, Mapping) else None
    if packet.kind not in KINDS or type(protocol) is not int or protocol != PROTOCOL:
        raise PacketError(
            f"order {schema.shown(packet.kind)} of protocol {schema.shown(protocol)}, this site speaks {PROTOCOL}; "
            "install the same version of fedlora on both sides"
        )
    schema.parts(packet.parts, "order")
    if packet.kind == "join":
        return schema.parsed(schema.JoinOrder, h, "order")
    order = schema.parsed(schema.WorkOrder, h, "order")
    if order.round + (packet.kind == "train") > order.rounds:
        raise PacketError(f"order: round {order.round} of {order.rounds}")
    return order


R = TypeVar("R", schema.Joined, schema.Trained, schema.Evaluated)


def reply_of(reply: Packet | str, model: type[R], kind: Kind, run: str, round: int) -> R:
    """At a server: what a site replies to an order of this kind, run and round. Raises PacketError for all other replies, and
    for a site's own failure; a reply that is a text is the reason why there is none."""
    if isinstance(reply, str):
        raise PacketError(reply)
    if not isinstance(reply.header, Mapping):
        raise PacketError(f"reply: its header is {schema.shown(reply.header)}, expected fields")
    if "error" in reply.header:
        if isinstance(reply.header["error"], str):
            raise PacketError("it failed and says so in an old form; install the same version of fedlora on both sides")
        failed = schema.parsed(schema.Failure, reply.header["error"], "reply, error")
        raise PacketError(heard(failed.model_dump()))
    schema.same({**reply.header, "kind": reply.kind}, kind=kind, run=run, round=round, protocol=PROTOCOL)
    found = schema.parsed(model, reply.header, "reply")
    schema.parts(reply.parts, "reply")
    return found
