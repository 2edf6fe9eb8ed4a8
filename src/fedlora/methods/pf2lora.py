"""PF2LoRA: a common adapter and a small personal one, trained as a bilevel problem (Hao et al., arXiv:2503.03920).

    W_k = W0 + B A + D_k C_k        x = (A, B) of rank r, common;  y_k = (C_k, D_k) of rank r~ < r, personal, never sent
    upper   min_x (1/M) sum_k f_k(x, y_k*(x))          lower   y_k*(x) = argmin_y f_k(x, y)

Algorithm 1, every client, every step, on four independent minibatches pi, xi, xi~, zeta:

    line 5    y_new = y - a g_y(x, y; pi)                                      one plain SGD step
    line 6    h     = g_x(x, y_new; xi) - a J_xy(x, y; zeta) g_y(x, y_new; xi~)
              x     = x - eta h                                                h is handed to the optimizer (AdamW)
    every I steps: x <- (1/M) sum_k x_k, A and B apart, uniform weights

J v is one mixed Jacobian-vector product at the OLD y with the vector v at the NEW y: d/dx <g_y(x, y; zeta), v>. With one
batch for all four, h is the exact derivative of f(x, y - a g_y(x, y)) with respect to x. `a` is the lower step and the
coefficient of J v, so y is plain SGD.

Choices: I local steps a round (the paper's t % I == 0 fires after the first step); alpha and alpha_personal default to
the ranks, so both products have scale 1; `clip` bounds the lower step's gradient as it bounds h; the head, whoever owns
it, is trained with x; the learning-rate schedule scales a and eta alike. Exact second derivatives need attention that has
them (eager); finite_difference needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..adapters import Form, Pattern, make, named
from ..errors import Problem
from ..model.adapted import Batch
from ..training.loss import Loss
from ..training.optimizers import clip
from ..tree import Key, Params, norm, per_client, select
from .contract import Client, Context, Metrics, Work
from .sgd import SGDMethod, Weights, rank_problems

STEP = 1e-2  # length of the finite difference along v; halfway between fp32 rounding and curvature


@dataclass(frozen=True)
class PF2LoRA(SGDMethod):
    """A common adapter for all and a small personal one per client, trained as a bilevel problem.

    rank, alpha, rank_pattern: of the common adapter; rank_personal, alpha_personal, rank_pattern_personal: of the
    personal one; lr_personal: a.

    hypergradient: exact (double differentiation), first_order (drops J v), finite_difference (central, along v).
    batches: independent (four a step) or shared (one for all four: 4 times cheaper, a deviation from Algorithm 1).
    """

    name: ClassVar[str] = "pf2lora"
    title: ClassVar[str] = "PF2LoRA"
    paper: ClassVar[str] = "arXiv:2503.03920"
    family: ClassVar[str] = "personal"
    label: ClassVar[str] = "common"
    alpha: float = 8.0
    weights: Weights = "uniform"
    rank_personal: int = 2
    alpha_personal: float = 2.0
    rank_pattern_personal: Pattern = ()
    lr_personal: float = 0.01
    hypergradient: Literal["exact", "first_order", "finite_difference"] = "exact"
    batches: Literal["independent", "shared"] = "independent"

    def problems(self) -> list[Problem]:
        bad = super().problems()
        if not 0 <= self.rank_personal < max(self.rank, 1):
            bad.append(
                Problem(
                    "method.rank_personal",
                    self.rank_personal,
                    f"0 to rank - 1 = {self.rank - 1}",
                    "r/4 or r/2 is usual",
                )
            )
        bad += rank_problems("method.rank_pattern_personal", self.rank_pattern_personal)
        if not self.form.low_rank:
            bad.append(
                Problem(
                    "method.adapter", self.adapter, f"{named(lambda f: f.low_rank)}: PF2LoRA adds two low-rank products"
                )
            )
        if self.lr_personal < 0:
            bad.append(Problem("method.lr_personal", self.lr_personal, "a number >= 0"))
        return bad

    @property
    def draws(self) -> int:
        return 4 if self.batches == "independent" and self.rank_personal else 1

    @property
    def second_order(self) -> bool:
        return self.hypergradient == "exact" and self.rank_personal > 0

    def trains(self, k: Key) -> bool:
        return True

    def shares(self, k: Key) -> bool:
        return k.adapter == "common"

    @property
    def form_personal(self) -> Form:
        """The delta form of a client's own adapter: C [K r~ i], D [K o r~]."""
        own = (self.alpha_personal, self.rank_pattern_personal, "method.rank_pattern_personal")
        return make(self.adapter, max(self.rank_personal, 1), *own)

    def keep(self, context: Context, client: Client) -> Params:
        if not self.rank_personal:
            return super().keep(context, client)
        return super().keep(context, client) | self.form_personal.init(
            "personal", context.layers("target"), context.seed, client.id
        )

    def ready(self, p: Params, fixed: Params) -> Params:
        mine = self.form_personal
        return self.form.view(select(p, lambda k: k.adapter != "personal")) | mine.view(
            select(p, lambda k: k.adapter == "personal")
        )

    def begin(self, context: Context, info: object, down: Params, kept: Params) -> Work:
        work = super().begin(context, info, down, kept)  # type: ignore[arg-type]
        state = select(work["moments"], lambda k: not k.adapter.startswith("personal"))  # y has no moments: plain SGD
        return work | {"moments": state}

    def step(self, work: Work, loss: Loss, lr: Tensor, *draws: Batch) -> tuple[Work, Metrics]:
        x = select(work["train"], lambda k: k.adapter != "personal")
        y = select(work["train"], lambda k: k.adapter == "personal")
        if not y:
            return super().step(work, loss, lr, *draws)
        pi, xi, xi_, zeta = draws if len(draws) == 4 else draws * 4
        a = lr * self.lr_personal  # [K]
        f = lambda p: self.ready(p, {})  # noqa: E731

        _, g_y = loss.gradient(lambda q: f(x | q), y, pi)
        g_y = clip(g_y, self.clip)
        y_new = {k: v - per_client(a, v).to(v) * g_y[k] for k, v in y.items()}
        value, h = loss.gradient(lambda q: f(q | y_new), x, xi)
        if self.hypergradient != "first_order":
            _, v = loss.gradient(lambda q: f(x | q), y_new, xi_)
            jv = self.mixed(loss, x, y, v, zeta)
            h = {k: g - per_client(a, g).to(g) * jv[k] for k, g in h.items()}
        work = self.descend(work, self.penalised(work, h), lr)
        return work | {"train": work["train"] | y_new}, {"loss": value}

    def mixed(self, loss: Loss, x: Params, y: Params, v: Params, zeta: Batch) -> Params:
        """J_xy(x, y; zeta) v = d/dx <g_y(x, y; zeta), v>."""
        f = lambda p: self.ready(p, {})  # noqa: E731
        if self.hypergradient == "finite_difference":
            size = torch.stack([norm(t) for t in v.values()]).square().sum(0).sqrt()  # [K]
            e = STEP / size.clamp_min(1e-12)
            move = lambda sign: {k: t + sign * per_client(e, t) * v[k] for k, t in y.items()}  # noqa: E731
            high, low = (loss.gradient(lambda q, s=s: f(q | move(s)), x, zeta)[1] for s in (1.0, -1.0))  # type: ignore[misc]
            return {k: (high[k] - low[k]) / per_client(2 * e, high[k]) for k in x}
        return loss.hessian_vector(f, x | y, v, zeta, rows=x)
