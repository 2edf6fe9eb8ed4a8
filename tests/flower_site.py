"""A client process for tests: `python flower_site.py id port data keys state [trouble]`.

trouble: "nan" uploads NaN in round 2; "die" exits while it trains round 2; "half" cuts its second reply off; "clock" is an
hour late; "slow" takes ten seconds for round 2.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from pathlib import Path
from typing import Any

import fedlora.flower  # noqa: F401
from fedlora.deploy.packets import Packet
from fedlora.deploy.site import Holding, Site
from fedlora.federation import wire
from fedlora.flower import client, keys, trial


class Troubled(Site):
    """A site with a fault of its own."""

    trouble = ""

    def answer(self, packet: Packet) -> Packet:
        second = packet.kind == "train" and packet.header["round"] == 1
        if second and self.trouble == "die":
            os._exit(9)
        if second and self.trouble == "slow":
            time.sleep(10)
        reply = super().answer(packet)
        if second and self.trouble == "nan":
            for c, part in reply.parts.items():
                leaves, header = wire.decode(part)
                bad = {k: v * float("nan") for k, v in leaves.items()}
                return Packet(reply.kind, reply.header, {c: wire.encode(bad, header)})
        return reply


def main(id: str, port: str, data: str, folder: str, state: str, trouble: str = "") -> None:
    client.LONGEST_WAIT, client.PATIENCE = 1.0, 5.0 if Path(folder).name == "half" else 60.0
    holding = Holding(id, data, {} if id != "c" else {"text": "note", "label": "outcome"}, threads=1)
    site = Troubled(holding.federation, Path(state) / id, say=lambda text: print(text, flush=True))
    site.trouble = trouble
    if trouble == "clock":
        import flwr.supernode.node_auth_http_interceptor as auth

        late = datetime.timedelta(hours=1)
        auth.now = lambda: datetime.datetime.now(datetime.UTC) - late
    if trouble == "half":
        push, pushed = client.push_objects, [0]

        def half(objects: Any, push_object_fn: Any, **more: Any) -> None:
            pushed[0] += 1
            if pushed[0] == 4:  # after joining, the first evaluation and the first round
                return
            push(objects, push_object_fn, **more)

        client.push_objects = half
    pair = keys.private_key(Path(folder) / "clients" / f"{id}.key")
    uplink = client.Uplink(f"127.0.0.1:{port}", Path(folder) / "ca.pem", pair)
    client.serve(uplink, site, lambda text: print(text, flush=True), trial.input_closed())


if __name__ == "__main__":
    main(*sys.argv[1:])
