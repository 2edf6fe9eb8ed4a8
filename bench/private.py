"""Which parametrisation suffers least at equal epsilon: `python bench/private.py [SEEDS]`, which prints a table in Markdown.

400 clients with some 20 sentences each of the built-in text, in 9 classes; a client is in a round with probability 1/4. The base is
a small network on MiniLM's sentence vectors, so that a run takes seconds: an adapter on its hidden layer and its output layer are
trained. Accuracy is that of the shared model on all clients' test rows after the last round. The text is public, so scores may be seen.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from attacks import Net
from torch import nn

import fedlora as fl
from fedlora.checkpoints import pretrained
from fedlora.data.batches import LocalWork
from fedlora.data.demo import corpus
from fedlora.federation.guards import GUARDS
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods import METHODS
from fedlora.training.optimizers import SGD

ROWS, CLIENTS, ROUNDS, SHARE, NORM, DELTA = 9000, 400, 30, 0.25, 1.0, 1e-3
EPSILONS = (None, 8.0, 3.0, 1.0)  # None clips and adds no noise
CHOSEN: dict[str, dict[str, float]] = {
    "homlora": {}, "ffa": {}, "fedsa": {}, "rolora": {}, "fedsvd": {}, "fedsb": {"rank": 16, "alpha": 16.0},
}  # fmt: skip


def sentences() -> tuple[np.ndarray, np.ndarray]:
    """MiniLM's sentence vectors float32 [n 384], times 8, and their classes [n]."""
    from transformers import AutoModel

    table = corpus().select(["text", "area"])
    take = np.sort(np.random.default_rng(0).permutation(table.num_rows)[:ROWS])
    texts, areas = table["text"].take(take).to_pylist(), table["area"].take(take).to_pylist()
    names = sorted(set(areas))
    source = pretrained.locate("minilm")
    model, tokenizer = (
        AutoModel.from_pretrained(source, trust_remote_code=False).eval(),
        pretrained.load_tokenizer("minilm"),
    )
    out = []
    with torch.inference_mode():
        for a in range(0, len(texts), 128):
            batch = tokenizer(texts[a : a + 128], truncation=True, max_length=32, padding=True, return_tensors="pt")
            h, m = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            out.append(nn.functional.normalize((h * m).sum(1) / m.sum(1)).numpy())
    return np.concatenate(out) * 8, np.array([names.index(a) for a in areas])


def accuracy(method: str, epsilon: float | None, seed: int, x: np.ndarray, y: np.ndarray) -> float:
    """Of the shared model on the test rows of all clients, after the last round."""
    classes = int(y.max()) + 1
    m = METHODS[method](
        **{"rank": 4, "alpha": 8.0, "head": "shared", "weights": "uniform", "optimizer": SGD(0.3)} | CHOSEN[method]
    )
    spent = {"noise": 0.0} if epsilon is None else {"epsilon": epsilon}
    guard = GUARDS["dp"](norm=NORM, delta=DELTA, scores="public", **spent)
    data = fl.from_arrays(
        {"x": x, "labels": y}, kind="iid", clients=CLIENTS, min_size=5, seed=seed, validation=0.0, test=0.2
    )
    model = fl.adapt(Net(classes), targets=["hidden"], head=["out"], call=lambda net, b: net(b["x"]))
    with tempfile.TemporaryDirectory() as folder:
        fed = fl.Federation(
            model, fl.Classification(classes), data, m, folder, plan=LocalWork(5, None, 16), seed=seed, block=50,
            sampling=Sampling(ROUNDS, clients_per_round=SHARE, cohort="poisson", guards=(guard,)),
            evaluation=Evaluation(every=ROUNDS, views=("global",)),
        )  # fmt: skip
        fed.run()
        lines = [json.loads(t) for t in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    [last] = [t for t in lines if t["kind"] == "eval" and t["split"] == "test" and t["round"] == ROUNDS]
    return float(last["weighted"]["accuracy"])


def main() -> None:
    """Print a row for each method: mean over seeds, and the largest distance of a seed from it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    x, y = sentences()
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    print(f"| method | {' | '.join('no noise' if e is None else f'epsilon {e:g}' for e in EPSILONS)} |")
    print("|---" * (len(EPSILONS) + 1) + "|", flush=True)
    for method in CHOSEN:
        cells = []
        for e in EPSILONS:
            found = [accuracy(method, e, s, x, y) for s in seeds]
            cells.append(f"{np.mean(found):.3f} ± {max(abs(v - np.mean(found)) for v in found):.3f}")
        print(f"| {METHODS[method].title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
