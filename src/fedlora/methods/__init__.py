"""The table of methods: the one place where a method is registered."""

from __future__ import annotations

from ..method import Method
from .average import CentralizedLoRA, FedSALoRA, FFALoRA, FineTunedLoRA, HomLoRA, LocalLoRA, ShareB
from .hetlora import HetLoRA
from .pf2lora import PF2LoRA
from .slora import SLoRA
from .tuning import FFT, SFT, BitFit, Houlsby, Pfeiffer

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        CentralizedLoRA,
        LocalLoRA,
        FineTunedLoRA,
        HomLoRA,
        FFALoRA,
        FedSALoRA,
        ShareB,
        HetLoRA,
        PF2LoRA,
        SLoRA,
        FFT,
        SFT,
        BitFit,
        Houlsby,
        Pfeiffer,
    )
}
