"""Default targets of architectures, "all-linear" as PEFT has it, and bases with short names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cli import model_folder

from fedlora.checkpoints import pretrained
from fedlora.checkpoints.peft import default_targets
from fedlora.errors import ModelError
from fedlora.model.targets import matching, usual

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 60}
FAMILIES = {  # architecture -> its configuration's options, the default targets
    "mpnet": ({}, ["q", "v"]),
    "modernbert": (
        {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        ["Wqkv"],
    ),
    "camembert": ({}, ["query", "value"]),
    "ernie": ({}, ["query", "value"]),
    "xlnet": (
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
        "all-linear",
    ),  # its projections are bare tensors
    "olmo2": ({"pad_token_id": 0}, ["q_proj", "v_proj"]),
    "granite": ({}, ["q_proj", "v_proj"]),
    "cohere": ({}, ["q_proj", "v_proj"]),
    "starcoder2": ({"num_key_value_heads": 2}, ["q_proj", "v_proj"]),
    "phi3": ({"pad_token_id": 0}, ["qkv_proj"]),
    "gpt_neox": ({}, ["query_key_value"]),
    "xlm": ({"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 60}, ["q_lin", "v_lin"]),
}


def small(kind: str) -> Any:
    """Its encoder or decoder without a head, with the names of a real one and no weights."""
    from transformers import AutoConfig, AutoModel

    options = SMALL if kind not in ("xlm", "xlnet") else {}
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.for_model(kind, **options | FAMILIES[kind][0]))


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_every_architecture_has_default_targets(kind: str) -> None:
    base = small(kind)
    found = default_targets(kind, base)
    assert found == FAMILIES[kind][1]
    assert len(matching(base, found)) >= 2


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2", "llama", "qwen3"])
def test_the_rule_agrees_with_pefts_table(family: str) -> None:
    base = tiny.families()[family]()
    assert usual(base) == default_targets(base.config.model_type) == default_targets(base.config.model_type, base)


@pytest.mark.parametrize(
    "family, task", [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("llama", "SEQ_CLS")]
)
def test_all_linear_is_what_peft_has(family: str, task: str) -> None:
    import peft

    make = tiny.causal_families()[family] if task == "CAUSAL_LM" else tiny.families()[family]
    base = make()
    head = pretrained.head_of(base, "causal-lm" if task == "CAUSAL_LM" else "classification")
    ours = {n for n in matching(base, "all-linear") if n not in head}
    transposed = family == "gpt2"
    model = peft.get_peft_model(
        make(), peft.LoraConfig(target_modules="all-linear", task_type=task, fan_in_fan_out=transposed)
    )
    theirs = {
        n.removesuffix(".lora_A.default")
        for n, _ in model.base_model.model.named_modules()
        if n.endswith(".lora_A.default")
    }
    assert ours == theirs - set(head)


def test_a_short_name_is_a_verified_copy_or_the_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setenv("FEDLORA_MODELS", str(tmp_path))
    hub = pretrained.SHORT["mpnet"].hub
    assert pretrained.locate("mpnet") == pretrained.known_as("mpnet") == hub
    weights = model_folder(tmp_path / "mpnet-base") / "model.safetensors"
    with pytest.raises(ModelError, match=r"model.safetensors has sha256 .*, expected 78c0197b"):
        pretrained.locate("mpnet")
    own = pretrained.Short(hub, "mpnet-base", hashlib.sha256(weights.read_bytes()).hexdigest(), True)
    monkeypatch.setitem(pretrained.SHORT, "mpnet", own)
    assert pretrained.locate("mpnet") == str(tmp_path / "mpnet-base") and pretrained.known_as("mpnet") == hub
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(ModelError, match="has sha256"):
        pretrained.locate("mpnet")


@pytest.mark.slow
@pytest.mark.parametrize("name, kind, targets", [("mpnet", "mpnet", 24), ("smollm2", "llama", 60)])
def test_the_copies_on_this_machine_are_those(name: str, kind: str, targets: int) -> None:
    if pretrained.local_copy(name) is None:
        pytest.skip(f"needs a local copy of {name} in ~/.cache/fedlora-models, or where FEDLORA_MODELS says")
    task = "causal-lm" if kind == "llama" else "classification"
    loaded = pretrained.load(name, task)
    assert loaded.model_type == kind
    assert len(matching(loaded.base, default_targets(kind, loaded.base))) == targets
