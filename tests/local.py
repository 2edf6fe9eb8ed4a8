"""Copies of the hub's data sets and models, in the folder of the fixture `shared`, in place of what shipped recipes name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROWS = 60  # of a file that is only evaluated on
COPIES: dict[tuple[str, str | None], dict[str, str]] = {  # (data.source, data.subset) -> what is set instead
    ("nyu-mll/glue", "sst2"): {"source": "sst2/train.parquet"},
    ("nyu-mll/glue", "mnli"): {"source": "mnli/train_10k.parquet", "test": "mnli/dev_matched.parquet"},
    ("nyu-mll/glue", "rte"): {"source": "rte/train.parquet", "test": "rte/dev.parquet"},
    ("SetFit/20_newsgroups", None): {"source": "20newsgroups/train.parquet", "test": "20newsgroups/test.parquet"},
    ("heegyu/news-category-dataset", None): {"source": "huffpost/train.parquet", "text": "text"},
    ("tuetschek/e2e_nlg", None): {
        "source": "e2e/train.parquet",
        "test": "e2e/dev.parquet",
        "prompt": "mr",
        "completion": "ref",
    },
    ("vicgalle/alpaca-gpt4", None): {"source": "gsm8k/train.parquet", "prompt": "question", "completion": "answer"},
}
MODELS = {"Maykeye/TinyLLama-v0": "babyllama-tok361"}


def overrides(raw: Mapping[str, Any], shared: Path, folder: Path) -> list[str]:
    """The --set of someone who has copies: `raw` is a recipe as its file says it. Short files are written to `folder`."""
    data = raw["data"]
    sets = []
    for field, value in COPIES.get((data["source"], data.get("subset")), {}).items():
        if field == "source":
            value = str(shared / "data" / value)
        elif field == "test":
            if "test" not in data:  # the recipe takes a share of the clients' own rows
                continue
            head = folder / "test.parquet"
            pq.write_table(pq.read_table(shared / "data" / value).slice(0, ROWS), head)
            value = str(head)
        sets.append(f"data.{field}={value}")
    model = raw["model"]["name"]
    return [*sets, f"model.name={shared / 'weights' / MODELS[model]}"] if model in MODELS else sets
