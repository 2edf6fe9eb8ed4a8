"""HetLoRA: clients of different ranks (Cho et al., EMNLP 2024, arXiv:2401.06432).

    distribute   B_k = B[:, :r_k], A_k = A[:r_k]
    train        loss + lambda * tail,  tail = ||B_k[:, g:]||_F ||A_k[g:]||_F,  g = floor(gamma r_k)
    self-prune   if tail after training < tail at receipt: r_k = max(r_min, g), truncate; kept for later rounds
    aggregate    zero-pad to r_max;  p_k = ||B_k A_k||_F / sum_j ||B_j A_j||_F;  A = sum p_k A_k, B = sum p_k B_k

Round 1 never prunes: B = 0, so no tail can be smaller than at receipt. gamma = 1 never prunes.
Choices: norms, of the tail and of p_k, over the whole model (root of the sum of squares over layers) or per layer (tails are
then added up; the head keeps the whole model's p_k); one prune decision a client or one a layer; one scale alpha / r_max
for all ranks, so that equal factors mean equal deltas; a component that no member of the cohort holds keeps its server
value (`padding="zero"` pads literally and lets it die). Data size is not in p_k.

With the paper's rule a client counts as zero in the components that it does not hold. So these shrink from round to round, even
if clients send back what they received. `padding="holders"` takes each component's mean over the clients that hold it (RBLA,
arXiv:2408.08699), with p_k normalised over them.
share = "first" gives FedSA-LoRA's ownership on HetLoRA's ranks: B_k stays, its norm ||B_k A_k|| travels for p_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..adapters import named
from ..errors import Problem
from ..evaluation.analyses import gram_norm
from ..tree import Key, Params, norm, pad_rank, rank, select
from .contract import Context, ServerState, Upload, Work
from .ranks import Ranked, padded_mean


@dataclass(frozen=True)
class HetLoRA(Ranked):
    """Ranks by client, self-pruning, sparsity-weighted aggregation.

    rank: r_max; rank_min, plan, exponent, ranks: how clients get theirs (ranks.py). lam, gamma: of the pruning.
    """

    name: ClassVar[str] = "hetlora"
    title: ClassVar[str] = "HetLoRA"
    paper: ClassVar[str] = "arXiv:2401.06432"
    family: ClassVar[str] = "ranks"
    gamma: float = 0.99
    lam: float = 1e-3
    norms: Literal["model", "site"] = "model"
    decide: Literal["client", "site"] = "client"
    padding: Literal["keep", "zero", "holders"] = "keep"
    share: Literal["both", "first"] = "both"

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if not 0 < self.gamma <= 1:
            bad.append(Problem("method.gamma", self.gamma, "a number in (0, 1]", "0.99, 0.85 and 0.5 are in use"))
        if self.lam < 0:
            bad.append(Problem("method.lam", self.lam, "a number >= 0"))
        if not self.form.low_rank:
            bad.append(
                Problem(
                    "method.adapter",
                    self.adapter,
                    f"{named(lambda f: f.low_rank)}: the others have no ranks to truncate",
                )
            )
        return bad

    @property
    def collapses(self) -> bool:
        return self.padding != "holders"

    @property
    def states(self) -> bool:
        return self.share == "first"

    def trains(self, k: Key) -> bool:
        return k.part != "rank"

    def shares(self, k: Key) -> bool:
        return self.share == "both" or k.part != "B"

    def deciders(self, context: Context) -> Sequence[str]:
        return super().deciders(context) if self.decide == "client" else [s.name for s in context.layers("target")]

    # server -----------------------------------------------------------------------------------------------------
    def aggregate(self, context: Context, server: ServerState, uploads: Iterable[Upload]) -> ServerState:
        known = dict(server.notes["ranks"])

        def weighted() -> Iterable[tuple[Upload, Callable[[Key], float]]]:
            for u in uploads:
                known[u.client.id] = {k.layer: int(v) for k, v in u.params.items() if k.part == "rank"}
                yield Upload(u.client, select(u.params, lambda k: k.part != "norm")), self.weights_of(u)

        new = padded_mean(
            weighted(), server.params, self.rank, guard=self.padding != "zero", holders=self.padding == "holders"
        )
        return ServerState(server.round + 1, server.params | new, server.notes | {"ranks": known})

    def weights_of(self, u: Upload) -> Callable[[Key], float]:
        """Leaf -> its p_k before normalisation: of its layer, where norms are per layer, or else of the whole model."""
        found = u.params if self.share == "first" else self.sizes(u.params)
        sizes = {k: float(v) for k, v in found.items() if k.part == "norm"}
        whole = Key(self.label, "", "norm")
        return lambda k: sizes.get(whole._replace(layer=k.layer), sizes[whole])

    def weight(self, u: Upload) -> float:
        """p_k of the whole model, before normalisation."""
        return self.weights_of(u)(Key(self.label, "", "norm"))

    def sizes(self, p: Params) -> Params:
        """||B_k A_k||_F, of one client or [K], from r x r Gram matrices: no [out, in] product, no SVD. "" is the whole model."""
        layers = {
            k.layer: gram_norm(p[k._replace(part="B")], a)
            for k, a in p.items()
            if k.part == "A" and k.adapter == self.label
        }
        whole = {"": torch.linalg.vector_norm(torch.stack(list(layers.values())), dim=0)}
        return {
            Key(self.label, layer, "norm"): v
            for layer, v in (whole | layers if self.norms == "site" else whole).items()
        }

    def record(self, server: ServerState) -> dict[str, Any]:
        """Rank trajectories: client -> its rank now, the mean over layers where layers decide."""
        return super().record(server) | {
            "ranks": {c: sum(r.values()) / len(r) for c, r in sorted(server.notes["ranks"].items())}
        }

    # client -----------------------------------------------------------------------------------------------------
    def begin(self, context: Context, info: object, down: Params, kept: Params) -> Work:
        work = super().begin(context, info, down, kept)  # type: ignore[arg-type]
        return work | {
            "received": {Key(self.label, layer, "tail"): t for layer, t in self.tails(work, work["train"]).items()}
        }

    def tails(self, work: Work, p: Params) -> dict[str, Tensor]:
        """layer -> ||B[:, g:]||_F ||A[g:]||_F, [K]; the whole model is layer "". Padded components are zero."""
        sides: dict[str, dict[str, list[Tensor]]] = {}
        for k, v in p.items():
            if k.part not in ("A", "B") or k.adapter != self.label:
                continue
            r = work["ranks"].get(Key(self.label, k.layer, "rank"), work["ranks"].get(Key(self.label, "", "rank")))
            assert r is not None
            components = torch.arange(v.shape[-2 if k.part == "A" else -1], device=v.device)
            tail = (components >= self.head_of(r).to(v.device)[:, None]).to(v)  # [K r]
            masked = v * (tail[:, :, None] if k.part == "A" else tail[:, None, :])
            whole = self.norms == "model" and self.decide == "client"
            sides.setdefault("" if whole else k.layer, {}).setdefault(k.part, []).append(norm(masked))
        total = lambda norms: torch.linalg.vector_norm(torch.stack(norms), dim=0)  # noqa: E731
        return {layer: total(parts["B"]) * total(parts["A"]) for layer, parts in sides.items()}

    def head_of(self, r: Tensor) -> Tensor:
        """g = floor(gamma r), exact where gamma r is whole: 0.7 * 90 in floating point is a little below 63."""
        return (self.gamma * r.double() + 1e-9).floor()

    def penalty(self, work: Work, p: Params) -> Tensor | None:
        if self.lam == 0 or self.gamma == 1:
            return None
        return self.lam * torch.stack(list(self.tails(work, p).values())).sum(0)

    def ready(self, p: Params, fixed: Params) -> Params:
        """A personal B may still have components that its A was pruned of (a fresh one always has): they meet zeros."""
        most = {
            k.layer: max(rank(k, v), rank(k._replace(part="A"), p[k._replace(part="A")]))
            for k, v in p.items()
            if k.part == "B"
        }
        return super().ready({k: pad_rank(k, v, most[k.layer]) if k.layer in most else v for k, v in p.items()}, fixed)

    def finish(self, work: Work) -> tuple[Params, Params]:
        up, kept = super().finish(work | {"ranks": self.prune(work)})
        if self.share == "first":
            up |= self.sizes(work["train"])
        return up, kept

    def prune(self, work: Work) -> Params:
        """The new rank leaves: g where the tail has shrunk since receipt, never below r_min."""
        now = self.tails(work, work["train"])
        start = {k.layer: v for k, v in work["received"].items()}
        out = {}
        for k, r in work["ranks"].items():
            layers = [k.layer] if k.layer in now else list(now)
            shrunk = torch.stack([now[s] for s in layers]).sum(0) < torch.stack([start[s] for s in layers]).sum(0)
            g = self.head_of(r).to(r).clamp_min(self.rank_min)
            out[k] = torch.where(shrunk.to(r.device), torch.minimum(g, r), r)
        return out
