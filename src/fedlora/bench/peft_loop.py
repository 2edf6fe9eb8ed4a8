"""The fair opponent: plain PyTorch and PEFT, one model for all clients, one client after another."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model

from ..checkpoints import pretrained
from ..model.adapted import Batch
from ..training.tasks import TASKS
from .systems import Leaves, System, averaged, start
from .work import ALPHA, CLASSES, LR, RANK, Work


class PeftLoop(System):
    """torch.optim.AdamW on PEFT's layers; batches padded to their longest row."""

    def __init__(self, work: Work, dtype: str, keeps: bool = False):
        super().__init__(work)
        self.keeps = keeps
        loaded = pretrained.load(work.model, work.task, CLASSES, seed=work.seed, attention="eager", device=work.device)
        self.start, targets = start(work)
        config = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=targets,
            modules_to_save=sorted({h.split(".")[0] for h in loaded.head}) or None,
            task_type=TaskType[TASKS[work.task].peft_type],
        )  # fmt: skip
        if dtype == "bf16":
            loaded.base.to(torch.bfloat16)
        self.model: Any = get_peft_model(loaded.base, config).eval()  # eval: no dropout, as everywhere here
        self.leaves = {self._name(n): p for n, p in self.model.named_parameters() if p.requires_grad}
        for p in self.leaves.values():
            p.data = p.data.float()
        self.base_head = {
            n: self.leaves[n].detach().clone() for n in self.leaves if n.rsplit("/", 1)[1] not in ("A", "B")
        }
        self.half = dtype == "bf16"

    @staticmethod
    def _name(name: str) -> str:
        """base_model.model.X.lora_A.default.weight -> X/A; ...modules_to_save.default.weight -> head/weight."""
        name = name.removeprefix("base_model.model.")
        for half in ("A", "B"):
            if f".lora_{half}." in name:
                return name.split(f".lora_{half}.")[0] + f"/{half}"
        layer, _, part = name.replace(".modules_to_save.default", "").rpartition(".")
        return f"{layer}/{part}"

    def reset(self) -> None:
        with torch.no_grad():
            for name, p in self.leaves.items():
                p.copy_(self.base_head[name] if name in self.base_head else self.start[name])

    def train(self, batches: list[Batch]) -> Leaves:
        """One client's local steps from the start; its leaves, the head as a change."""
        self.reset()
        optimizer = torch.optim.AdamW(self.leaves.values(), lr=LR, weight_decay=0.0)
        for b in batches:
            there = {n: v.to(self.work.device) for n, v in b.items()}
            with torch.autocast(self.work.device.split(":")[0], torch.bfloat16, enabled=self.half):
                loss = self.model(**there).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        base = self.base_head
        return {n: p.detach() - base[n] if n in base else p.detach().clone() for n, p in self.leaves.items()}

    def round(self, batches: list[list[Batch]]) -> Leaves:
        return averaged(self.train(mine) for mine in batches)
