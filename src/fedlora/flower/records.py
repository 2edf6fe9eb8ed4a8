"""Packets as Flower's records and back. A part is one Array of its encoded bytes: Flower cuts large ones into chunks."""

from __future__ import annotations

import json

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

from ..deploy import schema
from ..deploy.packets import Packet
from ..deploy.schema import PacketError

TYPE = "query.fedlora"  # of all our messages: what they ask for stands in the header
STYPE = "fedlora"  # of an Array whose data are an encoded message
LARGEST = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 2**24  # bytes of a request: a chunk, or what is said of a site's clients


def pack(packet: Packet) -> RecordDict:
    """Header as JSON in a ConfigRecord, parts in an ArrayRecord."""
    names = list(packet.parts)
    said = {"kind": packet.kind, "header": dict(packet.header), "parts": names}
    content = RecordDict({"fedlora": ConfigRecord({"json": json.dumps(said)})})
    if names:
        parts = {str(i): Array("uint8", (len(packet.parts[n]),), STYPE, packet.parts[n]) for i, n in enumerate(names)}
        content["parts"] = ArrayRecord(parts)
    return content


def unpack(content: RecordDict) -> Packet:
    """Raises PacketError for content that `pack` did not make."""
    try:
        text = content.config_records["fedlora"]["json"]
    except Exception as e:
        raise PacketError(f"message is none of ours or cut off ({type(e).__name__})") from e
    said = schema.parsed(schema.Envelope, schema.json_of(text, "message"), "message")
    if len(set(said.parts)) < len(said.parts):
        raise PacketError("message: a client has its leaves in it twice")
    return Packet(said.kind, said.header, {name: _part(content, i) for i, name in enumerate(said.parts)})


def _part(content: RecordDict, i: int) -> bytes:
    """The bytes of a part. Raises PacketError."""
    try:
        array = content.array_records["parts"][str(i)]
        if array.stype != STYPE or not isinstance(array.data, bytes):
            raise TypeError(f"bytes of {schema.shown(array.stype)}")
        return array.data
    except Exception as e:
        raise PacketError(f"message, its part {i}: cannot be read ({type(e).__name__})") from e
