"""What attackers do to each method, and what each defence leaves of it: `make attacks TEXTS=FILE`, which writes docs/reliability.md.

FILE holds texts and labels (Parquet). The base is a small network on MiniLM's sentence vectors of
these texts, so that a run takes seconds; LoRA of rank 8 on its hidden layer, and its output layer, are trained by 20 clients.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

import fedlora as fl
from fedlora.checkpoints import pretrained
from fedlora.data.batches import LocalWork
from fedlora.data.examples import Arrays
from fedlora.data.federated import FederatedData
from fedlora.federation.guards import GUARDS
from fedlora.federation.guards.geometry import received
from fedlora.federation.guards.guard import Guard
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.federation.summary import processor
from fedlora.methods import METHODS
from fedlora.methods.contract import ServerState, Upload
from fedlora.training.optimizers import AdamW
from fedlora.tree import Params, cut_rank, rank, rank_axis, stack

ROOT = Path(__file__).parents[1]
ROWS, CLIENTS, ROUNDS, SEEDS = 3000, 20, 12, (0, 1)
SHARES = (0.1, 0.2, 0.3)
DEFENCES: dict[str, tuple[Guard, ...]] = {
    "none": (), "bound": (GUARDS["bound"](),), "trimmed": (GUARDS["trimmed"](share=0.3),), "median": (GUARDS["median"](),),
    "multi-Krum": (GUARDS["krum"](share=0.3),), "geometric median": (GUARDS["geomedian"](),),
}  # fmt: skip
CHOSEN = ("homlora", "fedsa", "hetlora", "pf2lora")


# attacks ------------------------------------------------------------------------------------------------------------
Attack = Callable[
    [Params, Params, Sequence[Params], np.random.Generator], Params
]  # (up, received, honest uploads, draw) -> sent


def along(up: Params, old: Params, factor: float) -> Params:
    """The client's change times `factor`."""
    return up | {k: old[k] + factor * (up[k] - old[k]) for k in old if up[k].is_floating_point()}


def noise(up: Params, old: Params, honest: Sequence[Params], draw: np.random.Generator) -> Params:
    """A random change, ten times as large as its own."""

    def one(k):  # type: ignore[no-untyped-def]
        v = torch.from_numpy(draw.standard_normal(tuple(up[k].shape))).to(up[k])
        return old[k] + v * 10 * (up[k] - old[k]).norm() / v.norm().clamp(min=1e-12)

    return up | {k: one(k) for k in old if up[k].is_floating_point()}


def little(up: Params, old: Params, honest: Sequence[Params], draw: np.random.Generator) -> Params:
    """A Little Is Enough (Baruch et al., NeurIPS 2019, algorithm 3): mean - z standard deviations of the honest, z = 1.5."""
    every = stack([{k: p[k] for k in old} for p in honest])
    out = {}
    for k in old:
        v = every[k].mean(0) - 1.5 * every[k].std(0)
        out[k] = v if rank_axis(k) is None else cut_rank(k, v, rank(k, up[k]))
    return up | out


def assembled(up: Params, old: Params, honest: Sequence[Params], draw: np.random.Generator) -> Params:
    """Factors that look honest, of a product that does not (the idea of arXiv:2601.00566, without its optimisation): A's change is
    the client's own, B's is turned round, so that each is as large as an honest one."""
    return up | {k: old[k] + (-1 if k.part == "B" else 1) * (up[k] - old[k]) for k in old if k.part in "AB"}


ATTACKS: dict[str, Attack | None] = {
    "sign flip": lambda up, old, honest, draw: along(up, old, -1.0),
    "flip x10": lambda up, old, honest, draw: along(up, old, -10.0),
    "scale x10": lambda up, old, honest, draw: along(up, old, 10.0),
    "noise": noise,
    "label flip": None,  # of the data: the attacker's own training is honest
    "little is enough": little,
    "assembly": assembled,
}


@dataclass(frozen=True)
class Attackers(Guard):
    """Stands last in the list, so it sees uploads before any defence does: those of `who` are exchanged."""

    name: ClassVar[str] = "attackers"
    title: ClassVar[str] = "Attackers"
    who: frozenset[str] = frozenset()
    act: Attack | None = field(default=None, repr=False)
    seed: int = 0

    def arrive(self, uploads: Iterable[Upload], server: ServerState) -> Iterable[Upload]:
        seen = list(uploads)
        honest = [u.params for u in seen if u.client.id not in self.who]
        draw = np.random.default_rng([self.seed, server.round])
        act = self.act
        if act is None:
            return seen
        return [
            replace(u, params=act(u.params, received(u.params, server.params), honest, draw))
            if u.client.id in self.who
            else u
            for u in seen
        ]


# the setting --------------------------------------------------------------------------------------------------------
class Net(nn.Module):
    """Two layers on sentence vectors [b 384]."""

    def __init__(self, classes: int):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.hidden, self.out = nn.Linear(384, 64), nn.Linear(64, classes)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g) * (2 / max(p.shape)) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(x)))


def vectors(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """MiniLM's sentence vectors float32 [n 384] of the texts of a file, and their labels [n]."""
    from transformers import AutoModel

    table = pq.read_table(file)
    take = np.sort(np.random.default_rng(0).permutation(table.num_rows)[:ROWS])
    texts, labels = table.column("text").take(take).to_pylist(), np.array(table.column("label").take(take).to_pylist())
    source = pretrained.locate("minilm")
    model, tokenizer, out = (
        AutoModel.from_pretrained(source, trust_remote_code=False).eval(),
        pretrained.load_tokenizer("minilm"),
        [],
    )
    with torch.inference_mode():
        for a in range(0, len(texts), 64):
            batch = tokenizer(texts[a : a + 64], truncation=True, max_length=64, padding=True, return_tensors="pt")
            h, m = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            out.append(nn.functional.normalize((h * m).sum(1) / m.sum(1)).numpy())
    return np.concatenate(out) * 8, labels


def accuracy(
    method: str, attack: str, share: float, defence: str, seed: int, x: np.ndarray, y: np.ndarray
) -> float | None:
    """Mean test accuracy of the honest clients after the last round, of the models that they use; None where the defence cannot
    serve the method."""
    classes = int(y.max()) + 1
    more = {"rank_min": 2} if method == "hetlora" else {}
    m = METHODS[method](rank=8, head="shared", optimizer=AdamW(1e-2), **more)
    if any(g.cannot(m) for g in DEFENCES[defence]):
        return None
    data = fl.from_arrays(
        {"x": x, "labels": y}, kind="dirichlet", clients=CLIENTS, alpha=1.0, min_size=20, seed=seed, validation=0.0
    )
    bad = range(round(share * CLIENTS))
    who = frozenset(data.ids[k] for k in bad)
    if attack == "label flip":
        data = flipped(data, bad, classes)
    guards = (*DEFENCES[defence], Attackers(who, ATTACKS.get(attack), seed))
    model = fl.adapt(Net(classes), targets=["hidden"], head=["out"], call=lambda net, b: net(b["x"]))
    with tempfile.TemporaryDirectory() as folder:
        fed = fl.Federation(
            model, fl.Classification(classes), data, m, folder, plan=LocalWork(5, None, 16), sampling=Sampling(ROUNDS, guards=guards),
            evaluation=Evaluation(every=ROUNDS, views=("personal",)), block=CLIENTS, seed=seed,
        )  # fmt: skip
        try:
            fed.run()
        except fl.errors.TrainingError:
            return float("nan")  # the run is stopped by what arrived
        lines = [json.loads(t) for t in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    [last] = [t for t in lines if t["kind"] == "eval" and t["split"] == "test" and t["round"] == ROUNDS]
    return float(np.mean([s["accuracy"] for c, s in last["clients"].items() if c not in who]))


def flipped(data: FederatedData, bad: Iterable[int], classes: int) -> FederatedData:
    """The data of attackers who train on the wrong labels."""
    assert isinstance(data.examples, Arrays)
    columns = dict(data.examples.columns)
    labels = columns["labels"].copy()
    rows = np.concatenate([data.splits["train"][k] for k in bad] or [np.zeros(0, np.int64)])
    labels[rows] = classes - 1 - labels[rows]
    return replace(data, examples=Arrays(columns | {"labels": labels}))


def cases() -> list[tuple[str, str, float, str, int]]:
    """(method, attack, share of attackers, defence, seed)."""
    clean = list(itertools.product(CHOSEN, ["none"], [0.0], DEFENCES, SEEDS))
    return clean + list(itertools.product(CHOSEN, ATTACKS, SHARES, DEFENCES, SEEDS))


def page(found: Mapping[str, float | None], facts: Mapping[str, object]) -> str:
    """docs/reliability.md's table of attacks. found: a case as JSON -> accuracy."""
    by = {tuple(json.loads(k)[:4]): [] for k in found}
    for k, v in found.items():
        by[tuple(json.loads(k)[:4])].append(v)
    lines = [
        "## Attackers", "", textwrap.fill(
        f"Mean test accuracy of the honest clients after {ROUNDS} rounds, with 0, 10, 20 and 30 % of {CLIENTS} clients attacking in "
        f"every round; mean of {len(SEEDS)} seeds, with the larger distance of a seed from it behind `±`. `-`: the defence cannot serve "
        "the method. `stopped`: what arrived was no number, and the run ended with an error. The base is a small network on MiniLM's "
        f"sentence vectors of {ROWS} texts of 20 Newsgroups (chance is 0.05); it is no language model, so the order of defences may "
        "carry over and the numbers do not. `make attacks` writes this page.", 100), "",
        f"Commit {facts['commit']}; {facts['processor']}.",
    ]  # fmt: skip
    for method in CHOSEN:
        clean = " | ".join(_cell(by, method, "none", (0.0,), d) for d in DEFENCES)
        lines += [
            "",
            f"### {METHODS[method].title}",
            "",
            "| attack | " + " | ".join(DEFENCES) + " |",
            "|---" * (len(DEFENCES) + 1) + "|",
        ]
        lines += [f"| nobody | {clean} |"]
        for attack in ATTACKS:
            lines.append(f"| {attack} | " + " | ".join(_cell(by, method, attack, SHARES, d) for d in DEFENCES) + " |")
    return "\n".join(lines) + "\n"


def _cell(by: Mapping[tuple, list], method: str, attack: str, shares: Sequence[float], defence: str) -> str:
    """Accuracy at each share of attackers, with the largest spread over seeds."""
    shown, spread = [], 0.0
    for share in shares:
        values = by.get((method, attack, share, defence), [])
        if not values or values[0] is None:
            return "-"
        if np.isnan(values).any():
            shown.append("stopped")
            continue
        spread = max(spread, max(abs(v - np.mean(values)) for v in values))
        shown.append(f"{np.mean(values):.2f}")
    return ", ".join(shown) + (f" ±{spread:.2f}" if spread >= 0.005 else "")


def main() -> None:
    """Work through the cases that the results file does not hold yet, then write the page."""
    import warnings

    warnings.simplefilter("ignore")  # the bound names whom it hits, in every round
    torch.set_num_threads(1)
    results = Path(sys.argv[2] if sys.argv[2:] else ROOT / "bench/results/attacks.json")
    found = json.loads(results.read_text(encoding="utf-8"))["accuracy"] if results.exists() else {}
    x, y = vectors(Path(sys.argv[1]))
    todo = [c for c in cases() if json.dumps(c) not in found]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {"commit": commit, "processor": processor()}
    for i, (method, attack, share, defence, seed) in enumerate(todo):
        found[json.dumps((method, attack, share, defence, seed))] = accuracy(method, attack, share, defence, seed, x, y)
        if i % 20 == 19 or i == len(todo) - 1:
            results.write_text(json.dumps({**facts, "accuracy": found}, indent=0) + "\n", encoding="utf-8")
            print(f"{i + 1} of {len(todo)}", flush=True)
    doc = ROOT / "docs/reliability.md"
    before = doc.read_text(encoding="utf-8").partition("## Attackers")[0] if doc.exists() else "# Reliability\n\n"
    doc.write_text(before + page(found, facts), encoding="utf-8")


if __name__ == "__main__":
    main()
