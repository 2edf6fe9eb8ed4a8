"""Packets as Flower's records and back. A part is one Array of its encoded bytes: Flower cuts large ones into chunks."""

from __future__ import annotations

import json

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE

from ..deploy.packets import KINDS, Packet
from ..errors import UploadError

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
    """Raises UploadError for content that `pack` did not make."""
    try:
        said = json.loads(str(content.config_records["fedlora"]["json"]))
        arrays = content.array_records["parts"] if said["parts"] else {}
        parts = {str(name): arrays[str(i)].data for i, name in enumerate(said["parts"])}
        if said["kind"] not in KINDS or not isinstance(said["header"], dict):
            raise ValueError("no such kind of message")
        return Packet(said["kind"], said["header"], parts)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UploadError(f"message is none of ours or cut off ({type(e).__name__}: {e})") from e
