"""Tiny models, data and federations for tests: real architectures, random weights, no files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlora.checkpoints.peft import default_targets
from fedlora.checkpoints.pretrained import head_of
from fedlora.data.batches import LocalWork
from fedlora.data.examples import Rows, Tokens
from fedlora.data.federated import FederatedData
from fedlora.federation.callbacks import Callback
from fedlora.federation.run import Federation
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods.contract import Method
from fedlora.model.adapted import Adapted
from fedlora.model.groups import groups
from fedlora.model.targets import matching
from fedlora.seeds import np_rng
from fedlora.training.tasks.causal_lm import CausalLM
from fedlora.training.tasks.classification import Classification

VOCABULARY, CLASSES = 50, 3


def bert(dropout: float = 0.0, **more: Any) -> nn.Module:
    """A 2-layer BERT classifier, always the same weights."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=CLASSES,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, attn_implementation="eager", **more,
    )  # fmt: skip
    return seeded(lambda: BertForSequenceClassification(config))


def seeded(make: Any) -> nn.Module:
    """Build with a fixed seed and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def families() -> dict[str, Any]:
    """One small configuration per architecture, as functions that build a sequence classifier."""
    import transformers as t

    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
             "num_labels": CLASSES, "pad_token_id": 0, "attn_implementation": "eager"}  # fmt: skip
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**small)),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**small | {"pad_token_id": 1, "max_position_embeddings": 64})),
        "distilbert": lambda: t.DistilBertForSequenceClassification(t.DistilBertConfig(
            vocab_size=VOCABULARY, dim=16, n_layers=2, n_heads=2, hidden_dim=32, num_labels=CLASSES, attn_implementation="eager")),
        "albert": lambda: t.AlbertForSequenceClassification(t.AlbertConfig(**small | {"embedding_size": 8})),
        "deberta-v2": lambda: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(
            **small, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, position_buckets=8)),
        "deberta-v3": lambda: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(
            **small, relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, position_buckets=8,
            share_att_key=True, norm_rel_ebd="layer_norm")),
        "gpt2": lambda: t.GPT2ForSequenceClassification(t.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, num_labels=CLASSES, pad_token_id=0, attn_implementation="eager", **special)),
        "llama": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**small, **special)),
        "qwen2": lambda: t.Qwen2ForSequenceClassification(t.Qwen2Config(**small | {"num_key_value_heads": 2}, **special)),
        "qwen3": lambda: t.Qwen3ForSequenceClassification(t.Qwen3Config(**small | {"num_key_value_heads": 2, "head_dim": 8}, **special)),
    }  # fmt: skip


def padded_families() -> dict[str, Any]:
    """Sequence classifiers that read a sentence at a place which padding tokens decide, by their name and padding id.

    Decoders take the last token that is no padding (GPT-2's is the end-of-sequence token); BART and T5 the end of sequence.
    """
    import transformers as t

    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
             "num_labels": CLASSES, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}  # fmt: skip
    both = {"vocab_size": VOCABULARY, "d_model": 16, "num_labels": CLASSES, "attn_implementation": "eager"}
    halves = {
        f"{half}_{n}": v
        for half in ("encoder", "decoder")
        for n, v in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    return {
        "gpt2-eos": lambda: t.GPT2ForSequenceClassification(t.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, num_labels=CLASSES, pad_token_id=2, eos_token_id=2, bos_token_id=2,
            attn_implementation="eager")),
        "llama-5": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**small, pad_token_id=5)),
        "qwen2-49": lambda: t.Qwen2ForSequenceClassification(t.Qwen2Config(**small | {"num_key_value_heads": 2}, pad_token_id=49)),
        "roberta-1": families()["roberta"],
        "bart-1": lambda: t.BartForSequenceClassification(t.BartConfig(
            **both, **halves, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2)),
        "t5-0": lambda: t.T5ForSequenceClassification(t.T5Config(
            **both, d_kv=8, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=2, dropout_rate=0.0, pad_token_id=0,
            eos_token_id=2, decoder_start_token_id=0)),
    }  # fmt: skip


def seq2seq() -> dict[str, Any]:
    """Encoders with decoders, as functions that build a sequence classifier; rows must end with token 1, which is theirs for the end."""
    import transformers as t

    own = {"vocab_size": VOCABULARY, "d_model": 16, "num_labels": CLASSES, "pad_token_id": 0, "eos_token_id": 1,
           "decoder_start_token_id": 0, "attn_implementation": "eager"}  # fmt: skip
    bart = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32, "bos_token_id": 2, "forced_eos_token_id": 1, "max_position_embeddings": 64, "scale_embedding": True}  # fmt: skip
    return {
        "t5": lambda: t.T5ForSequenceClassification(t.T5Config(**own, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
        "bart": lambda: t.BartForSequenceClassification(t.BartConfig(**own, **bart)),
    }


def causal_families() -> dict[str, Any]:
    """Causal language models."""
    import transformers as t

    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}  # fmt: skip
    return {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, pad_token_id=0,
                                                       bos_token_id=1, eos_token_id=2, attn_implementation="eager")),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**small)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**small | {"num_key_value_heads": 2, "head_dim": 8})),
    }  # fmt: skip


def adapt(base: nn.Module, task: str = "classification", needs: Sequence[str] = (), **more: Any) -> Adapted:
    """`base` with its architecture's default targets, and the groups of layers that a method needs."""
    kind = base.config.model_type
    head = head_of(base, task)
    inside = [n for n in matching(base, default_targets(kind)) if n not in head]
    return Adapted(base, groups(needs, base, kind, inside, head), **more)


def tokens(n: int = 120, longest: int = 12, labels: bool = True, seed: int = 0) -> Tokens:
    """Random rows whose label shows in their tokens, so that training can learn them."""
    g = np_rng(seed, "tiny tokens")
    lengths = g.integers(4, longest + 1, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    classes = g.integers(0, CLASSES, n)
    flat = g.integers(4, VOCABULARY, offsets[-1]).astype(np.int32)
    for i in range(n):
        flat[offsets[i] + 1 : offsets[i] + 4] = 10 * (classes[i] + 1)
    chars = (lengths * 3).astype(np.int32)
    return Tokens(flat, offsets, labels=classes.astype(np.int64) if labels else None, chars=None if labels else chars)


def rows(parts: list[np.ndarray]) -> Rows:
    """CSR from one array per client."""
    return Rows(
        np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64),
        np.concatenate(parts).astype(np.int64),
    )


def data(clients: int = 4, labels: bool = True, unseen: int = 0) -> FederatedData:
    """Clients of unequal size; train, validation and test rows are disjoint."""
    examples = tokens(labels=labels)
    order = np_rng("tiny data").permutation(len(examples))
    cuts = np.cumsum([len(examples) * (i + 1) // (clients * (clients + 1) // 2) for i in range(clients)])[:-1]
    parts = np.split(order, cuts)
    cut = [(p[: len(p) * 6 // 10], p[len(p) * 6 // 10 : len(p) * 8 // 10], p[len(p) * 8 // 10 :]) for p in parts]
    splits = {name: rows([c[i] for c in cut]) for i, name in enumerate(("train", "validation", "test"))}
    names = tuple(f"class{i}" for i in range(CLASSES)) if labels else ()
    return FederatedData(examples, [f"c{i}" for i in range(clients)], splits, names, None, unseen)


def federation(method: Method, folder: Path, base: nn.Module | None = None, **more: Any) -> Federation:
    """A federation of 4 tiny clients, 3 rounds."""
    base = base if base is not None else bert()
    lm = more.pop("causal", False)
    model = more.pop("model", None) or adapt(base, "causal-lm" if lm else "classification", method.groups)
    settings: dict[str, Any] = {
        "plan": LocalWork(epochs=1, steps=None, batch_size=5), "sampling": Sampling(rounds=3), "block": 4, "seed": 7,
        "evaluation": Evaluation(every=1, views=("personal", "global")),
    }  # fmt: skip
    task = CausalLM() if lm else Classification(CLASSES)
    return Federation(model, task, more.pop("data", None) or data(labels=not lm), method, folder, **settings | more)


class Crash(Callback):
    """Interrupts a federation in the middle of its second round, after some client files are written."""

    def __init__(self, f: Federation):
        self.f = f

    def clients_done(self, n: int) -> None:
        loaded = self.f.store.load_server()
        if loaded is not None and loaded[0] == 1:
            raise KeyboardInterrupt


def close(a: dict[Any, torch.Tensor], b: dict[Any, torch.Tensor], tol: float = 2e-5) -> None:
    """Equal leaves, within `tol`; 0 means bit for bit."""
    assert a.keys() == b.keys()
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=tol, atol=tol, msg=lambda m, k=k: f"{k}: {m}")
