"""A method as a Flower `Strategy`, for those who have a Flower app and a training loop of their own.

The strategy does the server's half (broadcast, aggregate); the client's half is `train`, or the user's own code on the same
leaves. It keeps the method's state in memory: for resume and personal leaves on disk use the server of this package.
"""

from __future__ import annotations

from collections.abc import Iterable
from logging import WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from .. import wire
from ..engine import in_order
from ..errors import UploadError
from ..method import Client, Method, Order, Scene, Server, Upload
from ..seeds import np_rng
from ..tree import Key, Params

CLIENT = "num-examples"  # the metric by which Flower's own strategies weigh replies


def arrays_of(p: Params) -> ArrayRecord:
    """Leaves as Flower's arrays, under their names."""
    return ArrayRecord({str(k): v.contiguous() for k, v in p.items()})


def params_of(arrays: ArrayRecord) -> Params:
    """Inverse of `arrays_of`. Raises UploadError for names that are none of ours."""
    try:
        return {Key.parse(k): v for k, v in sorted(arrays.to_torch_state_dict().items())}
    except ValueError as e:
        raise UploadError(str(e)) from e


class MethodStrategy(Strategy):
    """fraction: of the nodes, asked each round; min_nodes: replies that a round needs. rounds: of the whole run.

    Replies hold an ArrayRecord of the method's uploaded leaves and a MetricRecord with `num-examples` (and `loss`, if there
    is one). Messages carry the config entries round and rounds.
    """

    def __init__(
        self, method: Method, scene: Scene, rounds: int, fraction: float = 1.0, min_nodes: int = 1, seed: int = 0
    ):
        self.method, self.scene, self.rounds = method, scene, rounds
        self.fraction, self.min_nodes, self.seed = fraction, min_nodes, seed
        self.server: Server = method.init(scene)
        self.examples: dict[int, int] = {}  # by node, from its last reply

    def initial_arrays(self) -> ArrayRecord:
        """What `start` asks for as initial_arrays."""
        return arrays_of(self.server.params)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        nodes = sorted(grid.get_node_ids())
        n = max(self.min_nodes, round(self.fraction * len(nodes)))
        draw = np_rng(self.seed, "cohort", server_round).choice(len(nodes), min(n, len(nodes)), replace=False)
        return [self._message(nodes[i], "train", server_round - 1, config) for i in sorted(draw.tolist())]

    def _message(self, node: int, kind: str, round: int, config: ConfigRecord) -> Message:
        down = self.method.broadcast(self.scene, self.server, self._client(node))
        said: dict[str, Any] = {**config, "round": round, "rounds": self.rounds}
        content = RecordDict({"arrays": arrays_of(down), "config": ConfigRecord(said)})
        return Message(content, dst_node_id=node, message_type=kind)

    def _client(self, node: int) -> Client:
        return Client(str(node), self.examples.get(node, 1))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        found: dict[str, Upload] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                log(WARNING, "fedlora: node %s gave no reply: %s", node, reply.error.reason)
                continue
            try:
                (arrays,) = reply.content.array_records.values()
                (metrics,) = reply.content.metric_records.values()
                params = params_of(arrays)
                wire.validate(params, wire.expect(params))
                self.examples[node] = int(metrics[CLIENT])
            except (UploadError, ValueError, KeyError, TypeError) as e:
                log(WARNING, "fedlora: reply of node %s refused: %s", node, e)
                continue
            client = self._client(node)
            found[client.id] = Upload(client, params, {"loss": float(metrics.get("loss", float("nan")))})
        if len(found) < self.min_nodes:
            log(
                WARNING, "fedlora: %d acceptable replies, expected %d: the round is dropped", len(found), self.min_nodes
            )
            return None, None
        ordered = [found[c.id] for c in in_order(sorted((u.client for u in found.values()), key=lambda c: c.id))]
        self.server = self.method.advance(self.scene, self.method.aggregate(self.scene, self.server, iter(ordered)))
        losses = [u.metrics["loss"] for u in ordered]
        return arrays_of(self.server.params), MetricRecord(
            {"loss": float(torch.tensor(losses).mean()), "clients": len(ordered)}
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return [self._message(n, "evaluate", server_round, config) for n in sorted(grid.get_node_ids())]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Mean of every metric, weighted by num-examples."""
        total: dict[str, float] = {}
        weight = 0.0
        for reply in replies:
            if reply.has_error():
                continue
            (metrics,) = reply.content.metric_records.values()
            n = float(metrics.get(CLIENT, 1))
            weight += n
            for k, v in metrics.items():
                if k != CLIENT and isinstance(v, (int, float)):
                    total[k] = total.get(k, 0.0) + n * v
        return MetricRecord({k: v / weight for k, v in total.items()}) if weight else None

    def summary(self) -> None:
        log(WARNING, "fedlora: %r over %d rounds", self.method, self.rounds)


def order_of(message: Message) -> Order:
    """At a client: the round that a message of this strategy asks for."""
    (config,) = message.content.config_records.values()
    return Order(int(config["round"]), int(config["rounds"]))
