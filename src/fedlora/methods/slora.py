"""SLoRA (Primed-LoRA): sparse fine-tuning first, then LoRA from its SVD (Babakniya et al., arXiv:2308.06522).

    stage 1    rounds 1..R1: clients train only the entries of a random mask that both sides derive from one seed;
               their *values* travel and are averaged
    hand-over  per layer dW = accumulated update = U S V^T;  split "B":    B = U_r S_r / s,       A = V_r^T
                                                             split "sqrt": B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T
               base "reset": W <- W0;  base "keep": W <- W_stage1 - s B A, which changes no logit
    stage 2    ordinary federated LoRA from there

A randomly masked matrix is not low rank, so the hand-over records the energy that rank r captures per layer; the scores
before and after it stand in metrics.jsonl. The SVD's signs are fixed, or a resumed run would differ. The head trains
densely in both stages and is carried over.

Choices: one density for all layers, unless density_pattern says otherwise; R1 by rounds or by a plateau of the mean
training loss; base "keep" sends the frozen part (sparse values, s B A at the hand-over) with every message of stage 2,
"reset" sends nothing more. `second` is the method of stage 2: homlora as in the paper, or pf2lora, whose common adapter
is primed. Its rank, head, optimizer and other settings that all methods have are those of SLoRA itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..adapters import FORMS, LoRA, named
from ..errors import Problem
from ..model.adapted import Batch
from ..training.loss import Loss
from ..tree import Key, Params, factor, select
from .average import HomLoRA
from .contract import Client, Context, Method, Metrics, RoundInfo, ServerState, Upload, Work
from .pf2lora import PF2LoRA
from .sgd import SGDMethod
from .tuning import SFT

UNPRIMED = {  # why other methods cannot be stage 2
    "ffa": "its A stays at the seeded start, so an SVD's A cannot take that place",
    "fedsa": "each client keeps a B of its own, and the SVD gives one B for all",
    "share-b": "each client keeps an A of its own, and the SVD gives one A for all",
    "hetlora": "the SVD gives one rank for all, and a client's pruning would be measured against a start it never had",
}


@dataclass(frozen=True)
class SLoRA(SFT):
    """Sparse fine-tuning primes LoRA: the SVD of what stage 1 learned is where stage 2 starts.

    sparse_rounds: R1. stage: switch after R1 rounds, or when the loss has not improved by `tolerance` (relative) for
    `patience` rounds, at the latest after R1. split, base: the hand-over. second: the method of stage 2."""

    name: ClassVar[str] = "slora"
    title: ClassVar[str] = "SLoRA"
    inner: ClassVar[Mapping[str, Sequence[str]]] = {"second": ("homlora", "pf2lora")}
    sparse_rounds: int = 10
    stage: Literal["rounds", "plateau"] = "rounds"
    patience: int = 3
    tolerance: float = 0.01
    split: Literal["sqrt", "B"] = "sqrt"
    base: Literal["reset", "keep"] = "reset"
    second: Method = HomLoRA()

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if self.sparse_rounds < 1:
            bad.append(Problem("method.sparse_rounds", self.sparse_rounds, "an integer >= 1"))
        if self.patience < 1:
            bad.append(Problem("method.patience", self.patience, "an integer >= 1"))
        if not FORMS[self.adapter].low_rank:
            bad.append(
                Problem(
                    "method.adapter", self.adapter, f"{named(lambda f: f.low_rank)}: an SVD primes low-rank factors"
                )
            )
        return bad + self.second_problems()

    def second_problems(self) -> list[Problem]:
        """What is wrong with the method of stage 2: one that cannot be primed, or settings that are SLoRA's to make."""
        second = self.second
        if not isinstance(second, HomLoRA | PF2LoRA) or second.name not in self.inner["second"]:
            name = getattr(second, "name", repr(second))
            why = UNPRIMED.get(name, "its start cannot be set")
            return [Problem("method.second", name, f"homlora or pf2lora; {name} cannot be primed: {why}")]
        bad = []
        for f in fields(SGDMethod):
            usual = next(x.default for x in fields(second) if x.name == f.name)
            value = getattr(second, f.name)
            if usual is not MISSING and value not in (usual, getattr(self, f.name)):
                expected = f"nothing: stage 2 has SLoRA's {f.name}, {getattr(self, f.name)!r}"
                bad.append(Problem(f"method.second.{f.name}", value, expected, f"set method.{f.name}"))
        if isinstance(second, PF2LoRA) and second.rank_personal >= self.rank:
            bad.append(Problem("method.second.rank_personal", second.rank_personal, f"0 to rank - 1 = {self.rank - 1}"))
        return bad

    # stages -----------------------------------------------------------------------------------------------------
    @property
    def stages(self) -> tuple[SFT, SGDMethod]:
        """The methods of stage 1 and 2, with this method's common settings."""
        common = {f.name: getattr(self, f.name) for f in fields(SGDMethod)}
        sparse = SFT(**common, density=self.density, density_pattern=self.density_pattern, layers=self.layers)
        assert isinstance(self.second, SGDMethod)  # problems() has refused all others
        return sparse, replace(self.second, **common)

    def now(self, p: Params) -> SGDMethod:
        """Clients notice the stage only by the leaves that arrive."""
        return self.stages[0 if any(k.adapter == "sparse" for k in p) else 1]

    @property
    def draws(self) -> int:
        return self.stages[1].draws

    def draws_for(self, down: Params) -> int:
        return self.now(down).draws

    @property
    def second_order(self) -> bool:
        return self.stages[1].second_order

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("target", *self.stages[0].groups)))

    # server -----------------------------------------------------------------------------------------------------
    def init(self, context: Context) -> ServerState:
        return ServerState(0, self.stages[0].init(context).params, {"losses": []})

    def keep(self, context: Context, client: Client) -> Params:
        first, second = self.stages
        return second.keep(context, client) | first.keep(context, client)

    def aggregate(self, context: Context, server: ServerState, uploads: Iterable[Upload]) -> ServerState:
        losses: list[float] = []

        def seen() -> Iterable[Upload]:
            for u in uploads:
                losses.append(u.metrics.get("loss", float("nan")))
                yield u

        new = self.now(server.params).aggregate(context, server, seen())
        history = [*server.notes["losses"], sum(losses) / max(len(losses), 1)]
        return ServerState(new.round, new.params, new.notes | {"losses": history})

    def due(self, server: ServerState) -> bool:
        """Whether stage 1 ends here."""
        if server.round >= self.sparse_rounds:
            return True
        losses = server.notes["losses"]
        if self.stage == "rounds" or len(losses) <= self.patience:
            return False
        best = min(losses[: -self.patience])
        return min(losses[-self.patience :]) > best * (1 - self.tolerance)

    def advance(self, context: Context, server: ServerState) -> ServerState:
        if any(k.adapter == "sparse" for k in server.params) and self.due(server):
            return self.hand_over(context, server)
        return server

    def hand_over(self, context: Context, server: ServerState) -> ServerState:
        """Factor the accumulated update of each target layer; what the factors leave out is lost ("reset") or frozen."""
        sparse, second = self.stages
        form = second.form
        assert isinstance(form, LoRA)
        p = select(server.params, lambda k: k.adapter != "sparse")
        energy: dict[str, float] = {}
        index = sparse.fixed(context)
        for s in context.layers("target"):
            values = server.params[Key("sparse", s.name, "values")]
            dw = (
                torch.zeros(s.out * s.in_)
                .index_copy(0, index[Key("sparse", s.name, "index")], values)
                .view(s.out, s.in_)
            )
            scale = form.scale_at(s.name)
            b, a = factor(dw / scale, form.rank_at(s.name), self.split)
            p[Key(second.label, s.name, "A")], p[Key(second.label, s.name, "B")] = a, b
            total = float(dw.square().sum())
            energy[s.name] = float((scale * b @ a).square().sum()) / total if total else 1.0
            if self.base == "keep":  # only B of trained leaves is scaled later, so this product carries its scale
                p[Key("primed", s.name, "A")], p[Key("primed", s.name, "B")] = a.clone(), -scale * b
        if self.base == "keep":
            p |= {Key("stage1", k.layer, "values"): v for k, v in server.params.items() if k.adapter == "sparse"}
        notes = server.notes | {"handover": {"energy": energy}}
        return ServerState(server.round, p, notes)

    # client -----------------------------------------------------------------------------------------------------
    def frozen(self, k: Key) -> bool:
        """What the factors leave out at the hand-over: it stays with the base."""
        return k.adapter in ("primed", "stage1")

    def bound(self, context: Context, p: Params) -> Params:
        """The frozen leaves are model-ready as they are; the values of stage 1 get their positions."""
        if not any(k.adapter == "stage1" for k in p):
            return p
        like = next(iter(p.values()))
        index = {k._replace(adapter="stage1"): v for k, v in self.stages[0].fixed(context).items()}
        return p | {k: v[None].expand(len(like), -1).to(like.device) for k, v in index.items()}

    def idle(self, k: Key, down: Params) -> bool:
        """Adapters wait while the mask is trained."""
        return self.now(down).label == "sparse" and k.adapter.split("~")[0] in ("personal", "common", "lora")

    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        now = self.now(down)
        live, own, idle = self.parts(down, kept)
        work = now.begin(context, info, live, own)
        return work | {"idle": idle, "bound": self.bound(context, select(down, self.frozen))}

    def parts(self, down: Params, kept: Params) -> tuple[Params, Params, Params]:
        """(what the stage's method receives, what it keeps, personal leaves that wait for stage 2)."""
        if self.now(down).label != "sparse" and any(k.adapter.startswith("sparse~") for k in kept):
            # Moments of stage 1, and its count of steps, end with it.
            kept = select(kept, lambda k: "~" not in k.adapter)
        idle = select(kept, lambda k: self.idle(k, down))
        return select(down, lambda k: not self.frozen(k)), select(kept, lambda k: k not in idle), idle

    def step(self, work: Work, loss: Loss, lr: Tensor, *draws: Batch) -> tuple[Work, Metrics]:
        return self.now(work["train"]).step(work, loss, lr, *draws)

    def finish(self, work: Work) -> tuple[Params, Params]:
        up, kept = self.now(work["train"]).finish(work)
        return up, kept | work["idle"]

    def served(self, work: Work) -> Params:
        return self.now(work["train"]).served(work)

    def personal(self, context: Context, down: Params, kept: Params) -> Params:
        now = self.now(down)
        live, own, _ = self.parts(down, kept)
        return now.personal(context, live, own) | self.bound(context, select(down, self.frozen))
