"""Numbers of a server for Prometheus, on a port of their own. The metrics' names begin with `fedlora_`."""

from __future__ import annotations

from typing import Any

from ..deploy.notes import Note
from ..errors import ConfigError, FedloraError, Problem
from ..federation.callbacks import Callback
from ..federation.records import EvalLine, Line, TrainLine


class Metrics(Callback):
    """Keeps the numbers and serves them at http://host:port/metrics until `close`.

    Raises FedloraError where prometheus-client is not installed, and ConfigError for a port that cannot be had. Counters begin at
    zero when the server is started, as Prometheus expects it.
    """

    def __init__(self, host: str, port: int):
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
        except ModuleNotFoundError as e:
            raise FedloraError(
                "--metrics needs prometheus-client, which is not installed: pip install 'fedlora[metrics]'"
            ) from e
        own = CollectorRegistry()
        self.round = Gauge("fedlora_round", "Rounds that are committed.", registry=own)
        self.rounds = Gauge("fedlora_rounds", "Rounds of the whole run.", registry=own)
        self.asked = Gauge("fedlora_clients_asked", "Clients of the round at hand.", registry=own)
        self.loss = Gauge("fedlora_loss", "Mean loss of the last round's accepted clients.", registry=own)
        self.score = Gauge("fedlora_score", "Mean score over clients.", ["view", "split", "metric"], registry=own)
        self.bytes = Counter("fedlora_bytes", "Bytes of leaves, by direction.", ["direction"], registry=own)
        self.uploads = Counter("fedlora_uploads", "Uploads, by what became of them.", ["result"], registry=own)
        self.joins = Counter("fedlora_joins", "Sites that have joined.", registry=own)
        self.seconds = Counter("fedlora_seconds", "Time of rounds, by what it went into.", ["part"], registry=own)
        self.done = Gauge("fedlora_done", "1 when all rounds are done.", registry=own)
        try:
            self.server, self._thread = start_http_server(port, host, registry=own)
        except OSError as e:
            raise ConfigError([Problem("--metrics", f"{host}:{port}", f"a free address ({e.strerror})")]) from e
        self.port = int(self.server.server_port)

    def close(self) -> None:
        """The port is free again."""
        self.server.shutdown()
        self.server.server_close()
        self._thread.join(5)

    def hear(self, text: str) -> None:
        """A line of the log."""
        if isinstance(text, Note) and text.event == "join":
            self.joins.inc()

    def start(self, name: str, done: int, rounds: int) -> None:
        self.round.set(done)
        self.rounds.set(rounds)

    def round_start(self, round: int, clients: int) -> None:
        self.asked.set(clients)

    def record(self, line: Line) -> None:
        if isinstance(line, TrainLine):
            self.loss.set(line.loss)
            for direction in ("up", "down"):
                self.bytes.labels(direction).inc(line.sent(direction))
            self.uploads.labels("refused").inc(len(line.refused))
            self.uploads.labels("accepted").inc(max(len(line.clients) - len(line.refused), 0))
        if isinstance(line, EvalLine) and line.stage is None:
            for metric, value in line.mean.items():
                self.score.labels(line.view, line.split, metric).set(value)

    def round_done(self, round: int, facts: dict[str, Any]) -> None:
        self.round.set(round)
        for part in ("train", "eval", "server"):
            self.seconds.labels(part).inc(facts[f"{part}_seconds"])

    def end(self, summary: dict[str, Any]) -> None:
        self.done.set(1)
