"""A small model folder and a CSV on disk, and the command line in a process of its own."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import tiny
import yaml

WORDS = {
    "sport": ["ball", "goal", "match", "team"],
    "food": ["bread", "soup", "apple", "cook"],
    "sea": ["wave", "ship", "salt", "harbour"],
}


def model_folder(folder: Path, causal: bool = False, bare: bool = False) -> Path:
    """A BERT (or a Llama) of two layers with a word tokenizer, as `save_pretrained` writes it.

    The BERT is a classifier of the WORDS' kinds, so nothing is said of its head; bare: it has no head.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "a", "is", *(w for ws in WORDS.values() for w in ws)]
    vocabulary = {w: i for i, w in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    base = tiny.seeded(tiny.causal_families()["llama"] if causal else tiny.bert)
    if bare:
        base = base.bert
    elif not causal:
        base.config.id2label, base.config.label2id = (
            dict(enumerate(sorted(WORDS))),
            {w: i for i, w in enumerate(sorted(WORDS))},
        )
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(n: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """(text, label, who) of n sentences that can be told apart."""
    r = random.Random(seed)
    out = []
    for i in range(n):
        label = sorted(WORDS)[i % 3]
        out.append(
            (
                " ".join(r.choice(["the", "a", "is", *WORDS[label] * 2]) for _ in range(r.randint(3, 9))),
                label,
                f"site-{i % 4}",
            )
        )
    return out


def write_csv(path: Path, data: list[tuple[str, ...]], header: tuple[str, ...] = ("text", "label", "who")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *data])
    return path


def write_recipe(folder: Path, **sections: Any) -> Path:
    """recipe.yaml beside a model folder and rows.csv; sections are merged into a working recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        model_folder(folder / "model")
        write_csv(folder / "rows.csv", rows(120))
    raw: dict[str, Any] = {
        "name": "small",
        "model": {"name": str(folder / "model"), "device": "cpu", "dtype": "fp32"},
        "data": {"source": str(folder / "rows.csv"), "text": "text", "label": "label", "max_length": 16},
        "partition": {"kind": "dirichlet", "clients": 4, "min_size": 8},
        "method": {"name": "fedsa", "rank": 2, "alpha": 4},
        "train": {"steps": 2, "batch_size": 4, "lr": 0.02},
        "federation": {"rounds": 3},
        "run": {"output": str(folder / "run"), "threads": 1},
    }
    for name, fields in sections.items():
        raw[name] = {**raw.get(name, {}), **fields} if isinstance(fields, dict) else fields
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


def fedlora(*arguments: object, code: int | None = 0, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`fedlora ...` in a process of its own; `code` is the exit code it must have. Never a traceback."""
    done = forked.run([str(a) for a in arguments], cwd or Path.cwd(), environment(), timeout=1200)
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    assert code is None or done.returncode == code, f"exit code {done.returncode}\n{said}"
    return done


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from fedlora.cli import entry; entry()", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "160", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
