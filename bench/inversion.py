"""What one step of full fine-tuning on one row tells a server: the words of that row. With and without a site's policy.

python bench/inversion.py [MODEL]: a server orders `method: fft, steps: 1, batch_size: 1`; of the embedding table the rows that
moved are the words of the private text. Prints, for ten private rows, the share of words found where the server is
trusted, and under the default policy (docs/security.md). MODEL is a folder or "minilm", the default.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedlora.data.demo import corpus
from fedlora.deploy.audit import digest
from fedlora.deploy.coordinator import coordinator, told_to_sites
from fedlora.deploy.packets import EVERYBODY, PROTOCOL, Packet
from fedlora.deploy.policy import Policy
from fedlora.deploy.site import Holding, Site, guarded
from fedlora.federation import wire
from fedlora.methods.contract import Client, RoundInfo
from fedlora.recipe import Recipe
from fedlora.tree import Params

ROWS = 10


def attack(model: str, texts: list[tuple[str, str]], folder: Path, trust: bool) -> list[float]:
    """Share of each private row's tokens that the server finds, over ROWS rows; texts: (text, label) of the site."""
    folder.mkdir(parents=True)
    with open(folder / "private.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("text", "label"), *texts])
    recipe = Recipe.from_dict(
        {
            "model": {"name": model, "device": "cpu"},
            "data": {"source": "(of the site)", "text": "text", "label": "label", "max_length": 32,
                     "classes": sorted({label for _, label in texts})},
            "method": "fft",
            "train": {"steps": 1, "batch_size": 1, "lr": 1e-3, "dropout": False},
            "federation": {"rounds": ROWS},
            "run": {"threads": 1, "block": 1},
        }
    )  # fmt: skip
    told = told_to_sites(recipe)
    own = Holding("a", str(folder / "private.csv"), {}, model=model, threads=1)
    policy = None if trust else Policy().with_columns({}, model)
    site = guarded(replace(own, policy=policy), folder / "state", accept=[digest(told)])
    server = coordinator(recipe, folder / "server", lambda: None)  # type: ignore[arg-type, return-value]
    params = server.method.broadcast(server.context, server.method.init(server.context), Client("a", 1))
    truth = own.federation(told, folder / "truth")  # what there is to be found; no part of the attack
    shares = []
    for round in range(ROWS):
        (batch,) = truth.batches(truth.client(0), RoundInfo(round, ROWS), 1)
        row = set(batch["input_ids"].flatten().tolist())
        shares.append(len(moved(site, told, params, round) & row) / len(row))
    return shares


def moved(site: Site, told: dict[str, Any], params: Params, round: int) -> set[int]:
    """Tokens whose embeddings a site's upload has moved: all that the server reads off it."""
    facts = {"round": round, "rounds": ROWS}
    head = {"run": "attack-1", "protocol": PROTOCOL, "recipe": told, "clients": {"a": None}, **facts}
    reply = site.answer(Packet("train", head, {EVERYBODY: wire.encode(params, facts)}))
    out: set[int] = set()
    for message in reply.parts.values():
        for k, v in wire.unpack(wire.decode(message)[0]).items():
            if k.part == "table" and "word" in k.layer:
                out |= set(torch.nonzero(v.abs().sum(1)).flatten().tolist())
    return out


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "minilm"
    table = corpus().select(["text", "area"]).slice(0, 400).to_pylist()
    texts = [(r["text"], "a" if i % 2 else "b") for i, r in enumerate(table[:: len(table) // 60])]
    with tempfile.TemporaryDirectory() as folder:
        for name, trust in (("trusted server", True), ("default policy", False)):
            found = attack(model, texts, Path(folder) / name.replace(" ", "-"), trust)
            rows = sum(x == 1 for x in found)
            print(f"{name}: {rows} of {ROWS} rows whole, {100 * sum(found) / ROWS:.0f} % of the words")


if __name__ == "__main__":
    main()
