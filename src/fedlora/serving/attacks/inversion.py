"""Gradient inversion: which words stood in the rows behind one upload? Asked of uploads that a run's own clients would send.

    a table     full fine-tuning moves the rows of the embedding table that belong to words of the batch, and no others
    factors     the gradient of A at the first adapted layers is a sum of (what comes back) x (the layer's input), so its rows lie in the
                span of those inputs (DAGER: Petrov et al., NeurIPS 2024, arXiv:2405.15586). Before any attention an input depends on
                the word and its place alone, so every word can be tried: how much of it lies in the span?

The attacker knows the model, the method, how many different words there are, and the vocabulary of such texts. As many words as
there are are named, so the share of them that is right is precision and recall at once. Beside it stands what naming the most
frequent words of other rows would get: what the upload tells is the difference. AdamW divides each entry by its own size, which takes
rows out of the span; noise and many rows (a span as wide as the rank) do, too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.batches import LocalWork
from ...data.examples import Tokens
from ...errors import DataError
from ...federation.callbacks import Callback
from ...federation.guards.guard import change
from ...federation.run import Federation
from ...federation.store import Which
from ...methods.contract import RoundInfo, ServerState, Upload
from ...seeds import np_rng
from ...tree import Params, select
from ..export import served_of

CHUNK = 256  # words tried in a pass
PLACES = 32  # tried for each word; a later place of a long row is not
ROUNDING = (
    2.0**-22
)  # of a leaf in float32, as a share of it, with a margin; smaller singular values of its change say nothing


@dataclass(frozen=True)
class Inverted:
    """Words of a batch that were named rightly, as a share; means over `trials`. guessed: what frequent words alone get. low, high:
    95 % interval of the share, over trials. seen: the upload, or what dp releases of a round in which this client is alone."""

    batch: int
    steps: int
    seen: str
    share: float
    low: float
    high: float
    guessed: float
    trials: int


def inversion(
    fed: Federation, which: Which = "last", batches: Sequence[int] = (1, 4, 16, 32), steps: Sequence[int] = (1, 10), trials: int = 8
) -> list[Inverted]:  # fmt: skip
    """Invert uploads of `trials` clients for each number of rows a step and of steps. Raises DataError where rows are no tokens."""
    if not isinstance(fed.data.examples, Tokens):
        raise DataError("attack: the rows of this run are no tokens, so there are no words to be found")
    server = served_of(fed, which).server
    if server is None:
        raise DataError("attack: a site holds no state of the server; give the run folder of a server or a simulation")
    words, counts = np.unique(fed.data.examples.flat, return_counts=True)
    often = _everywhere(fed)
    cases: list[tuple[int, int, str, set[int], set[int], Params]] = []
    for b in batches:
        for n in steps:
            for t in range(trials):
                k = int(np_rng(fed.seed, "inversion", t).integers(fed.training))
                truth, prior, seen = _upload(
                    fed, server, k, b, n, t, often, dict(zip(words.tolist(), counts.tolist(), strict=True))
                )
                cases += [(b, n, name, truth, prior, d) for name, d in seen.items()]
    named = _named(fed, server, [(len(c[3]), c[5]) for c in cases], np.setdiff1d(words, sorted(often)))
    out = []
    for at in dict.fromkeys(c[:3] for c in cases):
        mine = [(c, found) for c, found in zip(cases, named, strict=True) if c[:3] == at]
        shares = np.array([len(found & c[3]) / len(c[3]) for c, found in mine])
        guess = float(np.mean([len(c[4] & c[3]) / len(c[3]) for c, _ in mine]))
        draw = np_rng(fed.seed, "inversion", "interval", *at)
        means = shares[draw.integers(0, len(shares), (1000, len(shares)))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        out.append(Inverted(*at, float(shares.mean()), float(low), float(high), guess, len(shares)))
    return out


def _everywhere(fed: Federation) -> set[int]:
    """Tokens that every row has, such as its beginning and end: nobody has to find them."""
    rows = fed.data.splits["train"].rows[:64]
    each = [set(fed.data.examples.collate(np.array([r]))["input_ids"][0].tolist()) for r in rows]
    return set.intersection(*each) if each else set()


def _upload(
    fed: Federation, server: ServerState, k: int, batch: int, steps: int, trial: int, often: set[int], counts: dict[int, int]
) -> tuple[set[int], set[int], dict[str, Params]]:  # fmt: skip
    """(words of the client's rows, as many frequent words of others' rows, what is seen -> the changes of its leaves)."""
    small = copy.copy(fed)
    small.plan = LocalWork(steps, None, batch)
    small.seed = fed.seed + 1 + trial  # other rows than those of other trials
    client, info = fed.client(k), RoundInfo(server.round, max(fed.sampling.rounds, server.round + 1))
    engine = small.engine(Callback())
    down = fed.channel.down(fed.method.broadcast(fed.context, server, client), info).params
    work = small.batches(client, info, fed.method.draws_for(down))
    mine: dict[int, int] = {}
    for b in work:
        real = (
            b["attention_mask"].bool() if "attention_mask" in b else torch.ones_like(b["input_ids"], dtype=torch.bool)
        )
        for w in b["input_ids"][real].tolist():
            mine[w] = mine.get(w, 0) + 1
    truth = mine.keys() - often
    rest = sorted((w for w in counts if w not in often), key=lambda w: (mine.get(w, 0) - counts[w], w))
    [(_, trained, _)] = engine.train(info, [client], lambda c: down)
    assert trained.sent is not None
    sent = trained.sent.params
    seen = {"upload": change(sent, down)}
    if fed.private is not None:
        alone = [Upload(client, sent)]
        new = fed.channel.aggregate(fed.method, fed.context, server, alone)
        seen["released"] = change(select(new.params, lambda key: key in sent), server.params)
    return truth, set(rest[: len(truth)]), seen


def _named(
    fed: Federation, server: ServerState, cases: Sequence[tuple[int, Params]], words: np.ndarray
) -> list[set[int]]:
    """The words that each case's changes name, as many as it is told."""
    layers, inputs = _inputs(fed, words)
    norms = {key: float(v.norm()) for key, v in server.params.items()}
    bases = [
        _span([(v, norms.get(key, 0.0)) for key, v in d.items() if key.part == "A" and key.layer in layers])
        for _, d in cases
    ]
    base: Any = fed.model.base  # of transformers, which knows its own table of words
    table = next((n for n, m in base.named_modules() if m is base.get_input_embeddings()), "")
    score = np.zeros((len(cases), len(words)))
    for at, e in inputs:  # e [n places d]
        size = e.square().sum(-1).clamp(min=1e-12)
        for i, q in enumerate(bases):
            if q is not None:
                score[i, at] = ((e @ q.mT).square().sum(-1) / size).amax(1).numpy()
    out = []
    for i, (n, d) in enumerate(cases):
        moved = [v.abs().sum(-1) for key, v in d.items() if key.part == "table" and key.layer == table]
        s = moved[0][torch.from_numpy(words)].numpy() if moved else score[i]
        best = np.argsort(-s, kind="stable")[:n]
        out.append({int(w) for w in words[best] if s.any()})
    return out


def _span(changes: Sequence[tuple[Tensor, float]]) -> Tensor | None:
    """Orthonormal rows that span those of changes of A, each with the norm of A itself; None where nothing has moved."""
    each = []
    for v, size in changes:
        _, s, vh = torch.linalg.svd(v.double(), full_matrices=False)
        each.append(vh[s > max(ROUNDING * size, 1e-30)])
    if not each or not sum(map(len, each)):
        return None
    _, s, vh = torch.linalg.svd(torch.cat(each), full_matrices=False)
    return vh[s > 1e-3].float()


class _Reached(Exception):
    """The first adapted layer was called; the rest of the base need not run."""


def _inputs(fed: Federation, words: np.ndarray) -> tuple[set[str], Iterator[tuple[slice, Tensor]]]:
    """(names of the adapted layers that see the embeddings, chunks of (words, their inputs to these layers [n places d]))."""
    base, targets = fed.model.base, [s.name for s in fed.model.groups["target"]]
    seen: dict[str, int] = {}

    def run(ids: Tensor, hook: Any) -> None:
        handles = [base.get_submodule(n).register_forward_pre_hook(hook(n)) for n in targets]
        try:
            with torch.inference_mode():
                base(input_ids=ids.to(fed.model.device), attention_mask=torch.ones_like(ids).to(fed.model.device))
        except _Reached:
            pass
        finally:
            for h in handles:
                h.remove()

    def remember(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, args[0].data_ptr())

        return hook

    run(torch.from_numpy(words[None, : min(8, len(words))].astype(np.int64)), remember)
    first = next(iter(seen.values()), None)
    layers = {n for n, at in seen.items() if at == first}

    def chunks() -> Iterator[tuple[slice, Tensor]]:
        places = min(PLACES, int(fed.data.examples.lengths(fed.data.splits["train"].rows).max()))
        got: list[Tensor] = []

        def take(name: str) -> Any:
            def hook(module: Any, args: tuple[Tensor, ...]) -> None:
                got.append(args[0].float().cpu())
                raise _Reached

            return hook

        for a in range(0, len(words), CHUNK):
            ids = torch.from_numpy(words[a : a + CHUNK].astype(np.int64))[:, None].expand(-1, places)
            got.clear()
            run(ids.contiguous(), take)
            yield slice(a, a + CHUNK), got[0].view(len(ids), places, -1)

    return layers, chunks()
