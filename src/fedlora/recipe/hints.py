"""Names that other tools give to our fields. They are no synonyms: a recipe has one name for each thing, and an error
says which one was meant."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import near

# Arguments of transformers' TrainingArguments, of TRL's SFTConfig, of PEFT's LoraConfig, and of Flower's strategies.
MEANT = {
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "local_epochs": "train.epochs",
    "max_steps": "train.steps",
    "per_device_train_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_checkpointing": "model.gradient_checkpointing",
    "max_grad_norm": "train.clip",
    "optim": "train.optimizer",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup",
    "eval_steps": "evaluation.every",
    "lora_alpha": "method.alpha",
    "r": "method.rank",
    "lora_r": "method.rank",
    "target_modules": "model.targets",
    "model_name_or_path": "model.name",
    "pretrained_model_name_or_path": "model.name",
    "attn_implementation": "model.attention",
    "torch_dtype": "model.dtype",
    "dataset_name": "data.source",
    "dataset_text_field": "data.text",
    "max_seq_length": "data.max_length",
    "output_dir": "run.output",
    "report_to": "run.trackers",
    "max_new_tokens": "generation.new_tokens",
    "num_rounds": "federation.rounds",
    "num_server_rounds": "federation.rounds",
    "fraction_fit": "federation.clients_per_round",
    "fraction_train": "federation.clients_per_round",
    "num_supernodes": "partition.clients",
    "num_clients": "partition.clients",
}
# Of these fedlora has no field, and says why.
NONE = {
    "metric_for_best_model": "rounds are chosen by the task's metric, which follows from model.task",
    "load_best_model_at_end": "the best round on validation is always kept; --round last takes the last one",
    "lora_dropout": "there is none; train.dropout turns the base's own dropout on or off",
}


def meant(name: str) -> str | None:
    """What to write instead of another tool's name, or None for a name that is not known here."""
    last = name.rpartition(".")[2].replace("-", "_")
    if last in MEANT:
        return f"the field is {MEANT[last]}"
    return NONE.get(last)


def remedy(name: str, known: Iterable[str]) -> str:
    """What to do about a name that is no field: the field that is meant by it, else the near misses."""
    return meant(name) or near(name, known)
