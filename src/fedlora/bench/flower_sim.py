"""Flower's simulation on Ray: clients as messages to actors, one actor per thread, each with a model of its own.

`cached` keeps the model in its actor; without, it is rebuilt for each message, as Flower's template for language models does.
"""

from __future__ import annotations

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import functools
import importlib
import json
import queue
import threading
import time
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from ..model.adapted import Batch
from .peft_loop import PeftLoop
from .systems import Leaves, System, averaged
from .work import Work


@functools.lru_cache(maxsize=1)
def _work(raw: str) -> Work:
    torch.set_num_threads(1)
    return Work.from_json(json.loads(raw))


@functools.lru_cache(maxsize=1)
def _model(raw: str) -> PeftLoop:
    return PeftLoop(_work(raw), "fp32")


@functools.lru_cache(maxsize=1)
def _batches(raw: str, round: int) -> list[list[Batch]]:
    return _work(raw).batches(round)


def _client_app(cached: bool) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        said: Any = message.content.config_records["work"]
        raw, round, client = str(said["work"]), int(said["round"]), int(said["client"])
        model = _model(raw) if cached else PeftLoop(_work(raw), "fp32")
        leaves = model.train(_batches(raw, round)[client])
        return Message(RecordDict({"leaves": ArrayRecord(dict(leaves))}), reply_to=message)

    return app


class FlowerSimulation(System):
    """The ServerApp waits for rounds to do; its replies are averaged as they are in the other systems."""

    def __init__(self, work: Work, cached: bool):
        super().__init__(work)
        import warnings

        from flwr.simulation import run_simulation

        importlib.import_module("ray")  # Flower asks for it in another thread, and its absence is then not told
        self.raw = json.dumps(work.to_json())
        self.todo: queue.Queue[int | None] = queue.Queue()
        self.done: queue.Queue[Any] = queue.Queue()
        self.count = 0
        server_app = ServerApp()

        @server_app.main()
        def main(grid: Grid, context: Context) -> None:
            while len(nodes := sorted(grid.get_node_ids())) < work.regime.clients:
                time.sleep(0.05)  # they register one by one
            self.done.put("ready")
            while (round := self.todo.get()) is not None:
                self.done.put(self._serve(grid, nodes, round))

        def simulate() -> None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    run_simulation(
                        server_app, _client_app(cached), work.regime.clients,
                        backend_config={
                            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                            "init_args": {"num_cpus": work.threads, "include_dashboard": False, "log_to_driver": False},
                        },
                    )  # fmt: skip
            except BaseException as e:  # whatever ends it is what the waiting round must hear
                self.done.put(e)

        threading.Thread(target=simulate, daemon=True).start()
        self._result()

    def _result(self) -> Any:
        found = self.done.get()
        if isinstance(found, BaseException):
            raise RuntimeError(f"Flower's simulation ended: {found}") from found
        return found

    def _serve(self, grid: Grid, nodes: list[int], round: int) -> Leaves | BaseException:
        work = [ConfigRecord({"work": self.raw, "round": round, "client": k}) for k in range(self.work.regime.clients)]
        sent = [
            Message(RecordDict({"work": w}), dst_node_id=n, message_type="train")
            for n, w in zip(nodes, work, strict=True)
        ]
        replies = list(grid.send_and_receive(sent))
        if failed := [r for r in replies if r.has_error()]:
            return RuntimeError(failed[0].error.reason)
        return averaged(r.content.array_records["leaves"].to_torch_state_dict() for r in replies)

    def round(self, batches: list[list[Batch]]) -> Leaves:
        """Actors make the minibatches of the round themselves, from its number."""
        self.todo.put(self.count)
        self.count += 1
        found: Leaves = self._result()
        return found
