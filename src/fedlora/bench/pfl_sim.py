"""pfl-research's simulation: FederatedAveraging over its SimulatedBackend, on PEFT's layers and torch's AdamW.

pfl 0.6.0 asks for older `packaging` and `wheel` than others here, so the extra cannot hold it; it runs when installed with
    pip install --no-deps pfl 'dp-accounting<0.6' prv-accountant multiprocess dill absl-py mpmath dm-tree immutabledict attrs
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from ..model.adapted import Batch
from .peft_loop import PeftLoop
from .systems import Leaves, System
from .work import LR, Work


class Ready(Dataset):
    """A client's minibatches as they are."""

    def iter(self, batch_size: int | None) -> Iterator[Batch]:
        return iter(self.raw_data)


class Trained(nn.Module):
    """What pfl asks of a model."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def loss(self, **batch: Tensor) -> Tensor:
        return self.model(**batch).loss

    def metrics(self, **batch: Tensor) -> dict[str, Tensor]:
        return {}


class PflSimulation(System):
    """One process; clients one after another over one model. No evaluation."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.loop = PeftLoop(work, "fp32")
        trained = list(self.loop.leaves.values())

        def optimizer(parameters: Any, lr: float) -> torch.optim.Optimizer:
            return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)

        self.model = PyTorchModel(Trained(self.loop.model), optimizer, torch.optim.SGD(trained, lr=1.0))
        self.clients: list[list[Batch]] = []
        self.ids: Iterator[int] = iter(())
        data = FederatedDataset(lambda k: Ready(self.clients[k], user_id=str(k)), lambda: next(self.ids))
        self.backend, self.algorithm = SimulatedBackend(data, data), FederatedAveraging()

    def round(self, batches: list[list[Batch]]) -> Leaves:
        self.loop.reset()
        self.clients, self.ids = batches, iter(range(len(batches)))
        whole = NNAlgorithmParams(
            central_num_iterations=3, evaluation_frequency=2, train_cohort_size=len(batches), val_cohort_size=None
        )
        local = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LR, local_batch_size=None)
        contexts, _, _ = self.algorithm.get_next_central_contexts(self.model, 1, whole, local)  # 1: no evaluation
        found, metrics = self.backend.gather_results(
            model=self.model, training_algorithm=self.algorithm, central_context=contexts[0]
        )
        self.algorithm.process_aggregated_statistics(contexts[0], metrics, self.model, found)
        base = self.loop.base_head
        return {n: p.detach() - base.get(n, 0.0) for n, p in self.loop.leaves.items()}
