"""A method as a Flower `Strategy`, for those who have a Flower app and a training loop of their own.

The strategy does the server's half (broadcast, aggregate); the client's half is `train`, or the user's own code on the same
leaves. It keeps the method's state in memory: for resume and personal leaves on disk use the server of this package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from logging import WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from ..deploy import claims
from ..deploy.schema import LARGEST, shown
from ..errors import ConfigError, TrainingError, UploadError, printable
from ..federation import wire
from ..federation.channel import Channel, Declared, unserved
from ..federation.engine import in_order
from ..methods.contract import Client, Context, Method, RoundInfo, ServerState, Upload
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
    is one). Messages carry the config entries round and rounds. A reply whose leaves are not those that the method declares
    is refused, and the round goes on without it.

    channel: precision, norm bound and guards. A client sends and receives by the same channel: it reads what comes with
    `received_by` and answers with `reply_by`. Raises ConfigError for guards that cannot serve the method.
    """

    def __init__(
        self, method: Method, context: Context, rounds: int, fraction: float = 1.0, min_nodes: int = 1, seed: int = 0,
        channel: Channel = Channel(),
    ):  # fmt: skip
        if bad := unserved(channel.guards, method):
            raise ConfigError(bad)
        self.method, self.context, self.rounds = method, context, rounds
        self.fraction, self.min_nodes, self.seed = fraction, min_nodes, seed
        self.channel = channel
        self.server: ServerState = method.init(context)
        self.examples: dict[int, int] = {}  # by node, from its last reply
        self.sent: dict[int, Params] = {}  # by node, what it received in the round at hand

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
        info = RoundInfo(round, self.rounds)
        sent = self.channel.down(self.method.broadcast(self.context, self.server, self._client(node)), info)
        if kind == "train":
            self.sent[node] = sent.params
        said: dict[str, Any] = {**config, "round": round, "rounds": self.rounds}
        content = RecordDict({"arrays": arrays_of(sent.message), "config": ConfigRecord(said)})
        return Message(content, dst_node_id=node, message_type=kind)

    def _client(self, node: int) -> Client:
        return Client(str(node), self.examples.get(node, 1))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        found: dict[str, Upload] = {}
        declared = Declared(self.method, self.context, RoundInfo(server_round - 1, self.rounds))
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                log(WARNING, "fedlora: node %s gave no reply: %s", node, reply.error.reason)
                continue
            try:
                (arrays,) = reply.content.array_records.values()
                (metrics,) = reply.content.metric_records.values()
                if node not in self.sent:
                    raise UploadError("this node was not asked in this round, or has replied already")
                down = self.sent[node]
                params = self.channel.read(params_of(arrays), down, declared(down, self._client(node)))
                examples, loss = _count(metrics[CLIENT]), _loss(metrics.get("loss", math.nan))
                del self.sent[node]
            except Exception as e:  # an error in one node's reply must not end the round
                log(WARNING, "fedlora: reply of node %s refused: %s", node, printable(f"{type(e).__name__}: {e}"))
                continue
            self.examples[node] = examples
            client = self._client(node)
            found[client.id] = Upload(client, params, {"loss": loss})
        for id, why in claims.distant(list(found.values()), self.server.params).items() if found else ():
            log(WARNING, "fedlora: reply of node %s refused: %s", id, why)
            del found[id]
        if len(found) < self.min_nodes:
            log(
                WARNING, "fedlora: %d acceptable replies, expected %d: the round is dropped", len(found), self.min_nodes
            )
            return None, None
        ordered = [found[c.id] for c in in_order(sorted((u.client for u in found.values()), key=lambda c: c.id))]
        try:
            new, ordered, left = claims.aggregated(
                lambda uploads: self.channel.aggregate(self.method, self.context, self.server, iter(uploads)),
                ordered, self.min_nodes,
            )  # fmt: skip
        except TrainingError as e:
            log(WARNING, "fedlora: %s", e)
            return None, None
        for id, why in left.items():
            log(WARNING, "fedlora: reply of node %s refused: %s", id, why)
        self.server = self.channel.advance(self.method, self.context, new)
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
            try:
                (metrics,) = reply.content.metric_records.values()
                n = float(_count(metrics.get(CLIENT, 1)))
                scores = {k: _loss(v) for k, v in metrics.items() if k != CLIENT and isinstance(v, int | float)}
            except Exception as e:  # an error in one node's reply must not end the evaluation
                node = reply.metadata.src_node_id
                log(WARNING, "fedlora: scores of node %s refused: %s", node, printable(f"{type(e).__name__}: {e}"))
                continue
            weight += n
            for k, v in scores.items():
                total[k] = total.get(k, 0.0) + n * v
        return MetricRecord({k: v / weight for k, v in total.items()}) if weight else None

    def summary(self) -> None:
        log(WARNING, "fedlora: %r over %d rounds", self.method, self.rounds)


def _count(x: Any) -> int:
    """A number of examples that a node states. Raises ValueError for what is none."""
    if isinstance(x, bool) or not isinstance(x, int | float) or not 1 <= x < 2**53 or x != int(x):
        raise ValueError(f"{CLIENT} is {x!r}, expected a whole number from 1")
    return int(x)


def _loss(x: Any) -> float:
    """A number that a node states, NaN where it has none. Raises ValueError for what is none."""
    if isinstance(x, bool) or not isinstance(x, int | float) or abs(x) > LARGEST:
        raise ValueError(f"{shown(x)} is no number of at most {LARGEST:.0e}")
    return float(x)


def received_by(channel: Channel, message: Message) -> Params:
    """At a client: the leaves that a message of this strategy brings. Raises UploadError for another precision."""
    (found,) = message.content.array_records.values()
    return wire.unpack(params_of(found), channel.precision)


def reply_by(
    channel: Channel, upload: Params, down: Params, kept: Params, info: RoundInfo, client: Client
) -> tuple[ArrayRecord, Params]:
    """At a client: the arrays that carry `upload`, and what the guards keep until the next reply.

    down: what `received_by` gave; kept: what the last call gave, {} before the first.
    """
    sent = channel.up(upload, down, kept, info, client)
    return arrays_of(sent.message), sent.kept


def order_of(message: Message) -> RoundInfo:
    """At a client: the round that a message of this strategy asks for."""
    (config,) = message.content.config_records.values()
    return RoundInfo(int(config["round"]), int(config["rounds"]))
