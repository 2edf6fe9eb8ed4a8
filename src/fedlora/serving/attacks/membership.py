"""Membership inference: was this row trained on? Asked of a run's own models, whose answer is known.

    loss     a row with a small loss is a member (Yeom et al., CSF 2018, arXiv:1709.01604)
    ratio    a row whose loss training has lowered much is one: log p(row | model) - log p(row | start), the reference being the
             run's start (Watson et al., ICLR 2022, arXiv:2111.08440; the reference of Mireshghallah et al., arXiv:2203.03929)

Members are a client's training rows, the others its test rows: they come from one distribution, or the attack would tell the two
apart without the model. The threshold is chosen on one half of the rows and used on the other, both ways, so an attack that
learned nothing has an advantage of zero in the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...data.federated import FederatedData
from ...errors import DataError
from ...evaluation.predictions import predict
from ...federation.callbacks import Callback
from ...federation.run import Federation
from ...federation.store import Which
from ...seeds import np_rng
from ...tree import Params, stack, unstack
from ..export import models_of

DRAWS = 1000  # of the bootstrap
Attack = Literal["loss", "ratio"]


@dataclass(frozen=True)
class Found:
    """What an attack knows. advantage: true minus false positive rate; low, high: its 95 % interval over clients and rows;
    auc: chance that a member looks more like one than another row; at_1: true positive rate where 1 % of the others are
    taken for members; accuracy: of the model on the test rows, None where the task has none."""

    attack: Attack
    model: Literal["shared", "personal"]
    advantage: float
    low: float
    high: float
    auc: float
    at_1: float
    accuracy: float | None
    members: int
    others: int


def membership(fed: Federation, which: Which = "last", clients: int = 16, rows: int = 200) -> list[Found]:
    """Both attacks on the shared model, and on the personal ones where clients have some. At most so many clients, and rows of each
    kind from each. Raises DataError for a run without test rows."""
    test = fed.data.splits.get("test")
    chosen = [k for k in range(fed.training) if test is not None and len(test[k]) and len(fed.data.splits["train"][k])]
    if test is None or not chosen:
        raise DataError(
            "attack: no client has test rows, with which its training rows could be compared; set partition.test"
        )
    chosen = [chosen[i] for i in sorted(np_rng(fed.seed, "attack").permutation(len(chosen))[:clients])]
    pairs = [(_some(fed.data, "train", k, rows, fed.seed), _some(fed.data, "test", k, rows, fed.seed)) for k in chosen]
    start = losses(fed, [_start(fed)] * len(chosen), chosen, pairs)
    ids = [fed.data.ids[k] for k in chosen]
    models: dict[Literal["shared", "personal"], list[Params]] = {
        "shared": models_of(fed, [None], which)[1] * len(chosen)
    }
    if fed.method.keep(fed.context, fed.client(0)) or fed.method.tune:
        models["personal"] = models_of(fed, ids, which)[1]
    out = []
    for name, each in models.items():
        seen = losses(fed, each, chosen, pairs)
        right = _accuracy(fed, each, chosen, pairs)
        for attack in ("loss", "ratio"):
            scores = [
                tuple(s - x if attack == "ratio" else -x for x, s in zip(mine, ref, strict=True))
                for mine, ref in zip(seen, start, strict=True)
            ]
            out.append(judged(attack, name, [(m, o) for m, o in scores], right, fed.seed))
    return out


Pair = tuple[np.ndarray, np.ndarray]  # of members and of others


def _some(data: FederatedData, split: str, k: int, most: int, seed: int) -> np.ndarray:
    held = data.splits[split][k]
    return np.sort(np_rng(seed, "attack", split, k).permutation(held)[:most])


def _start(fed: Federation) -> Params:
    """Model-ready deltas with which the run began."""
    method, server = fed.method, fed.beginning()
    down = method.whole(fed.context, server)
    return unstack(method.personal(fed.context, stack([down]), stack([method.fresh(fed.context, fed.client(0))])), 1)[0]


def losses(fed: Federation, models: Sequence[Params], clients: Sequence[int], pairs: Sequence[Pair]) -> list[Pair]:
    """The mean loss of each row under its client's model."""
    block = fed.engine(Callback()).block
    each = [np.concatenate(p) for p in pairs]
    found = predict(fed.model, fed.task, fed.data, models, clients, each, fed.evaluation.batch_size, block)
    flat = [p.losses / np.maximum(p.counts, 1) for p in found]
    return [(x[: len(p[0])], x[len(p[0]) :]) for x, p in zip(flat, pairs, strict=True)]


def _accuracy(fed: Federation, models: Sequence[Params], clients: Sequence[int], pairs: Sequence[Pair]) -> float | None:
    """The task's metric on the test rows, mean over clients."""
    block = fed.engine(Callback()).block
    rows = [p[1] for p in pairs]
    found = fed.task.scores(
        predict(fed.model, fed.task, fed.data, models, clients, rows, fed.evaluation.batch_size, block)
    )
    values = [s[fed.task.metric] for s in found if fed.task.metric in s]
    return float(np.mean(values)) if values else None


def judged(
    attack: Attack, model: Literal["shared", "personal"], scores: Sequence[Pair], accuracy: float | None, seed: int
) -> Found:
    """What an attack's scores are worth. scores: by client, of members and of others; higher says member."""
    draw = np_rng(seed, "attack", "halves")
    halves = [tuple(draw.random(len(x)) < 0.5 for x in pair) for pair in scores]
    hits = np.zeros((len(scores), 2))  # by client: members and others that were taken for members
    for side in (True, False):
        pick = [np.concatenate([s[i][h[i] == side] for s, h in zip(scores, halves, strict=True)]) for i in (0, 1)]
        cut = threshold(*pick)
        for c, (s, h) in enumerate(zip(scores, halves, strict=True)):
            hits[c] += [np.sum(s[i][h[i] != side] >= cut) for i in (0, 1)]
    sizes = np.array([[len(m), len(o)] for m, o in scores])
    gap = lambda h, n: float(np.subtract(*(h.sum(0) / n.sum(0))))  # noqa: E731
    drawn = []
    for _ in range(DRAWS):  # clients with replacement, then the rows of each
        at = draw.integers(0, len(scores), len(scores))
        drawn.append(gap(draw.binomial(sizes[at], hits[at] / sizes[at]), sizes[at]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    members, others = (np.concatenate([s[i] for s in scores]) for i in (0, 1))
    return Found(
        attack, model, gap(hits, sizes), float(low), float(high), area(members, others),
        float(np.mean(members > np.quantile(others, 0.99))), accuracy, len(members), len(others),
    )  # fmt: skip


def threshold(members: np.ndarray, others: np.ndarray) -> float:
    """The score from which on a row is taken for a member: where the true positive rate is farthest above the false one."""
    if not len(members) or not len(others):
        return float("inf")
    cuts = np.unique(np.concatenate([members, others]))
    above = [1 - np.searchsorted(np.sort(x), cuts, "left") / len(x) for x in (members, others)]
    return float(cuts[np.argmax(above[0] - above[1])])


def area(members: np.ndarray, others: np.ndarray) -> float:
    """The area under the ROC curve: Mann and Whitney's U over all pairs; ties count one half."""
    order = np.sort(others)
    below, upto = (np.searchsorted(order, members, side) for side in ("left", "right"))
    return float(np.mean((below + upto) / 2) / len(others))
