"""The client side that most methods share: descend the loss over the leaves that are trained, share some, keep the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..adapters import FORMS, AdapterName, Form, Pattern, init_head, make, named, pattern_problems
from ..adapters.base import matches
from ..errors import ConfigError, ModelError, Problem, near
from ..layers import Layer
from ..model.adapted import Batch
from ..training.loss import Loss
from ..training.optimizers import AdamW, Optimizer, clip
from ..tree import Key, Params, mean, rank_axis, select, stack, unstack
from .contract import Client, Context, Method, Metrics, RoundInfo, ServerState, Upload, Work

Head = Literal["shared", "personal", "frozen"]
Weights = Literal["examples", "uniform"]
MOST_RANK = 100_000  # no layer of any base is wider than this


def rank_problems(field: str, patterns: Pattern) -> list[Problem]:
    """What is wrong with ranks of some layers."""
    return pattern_problems(field, patterns, lambda r: 1 <= r <= MOST_RANK, f"ranks from 1 to {MOST_RANK:,}")


def block_size(p: Params) -> int:
    """K of a stacked tree."""
    return len(next(iter(p.values()))) if p else 1


def expand(p: Params, k: int) -> Params:
    """Give leaves that all clients share the client axis, without copying."""
    return {key: v[None].expand(k, *v.shape) for key, v in p.items()}


@dataclass(frozen=True)
class SGDMethod(Method):
    """Client side written once: descend the loss over the trainable leaves; upload the shared ones, keep the rest.

    rank, alpha, adapter: the delta form (adapters/). rank_pattern: ranks of some layers, as PEFT has it; their alpha stays.
    head: who owns the classification head; one switch, the same for all methods of a comparison.
    weights: p_k by number of examples or uniform.
    moments: optimizer state reset at the start of each round, or kept by the client.
    personal_layers: layers, named as in rank_pattern, whose leaves stay at their client, as FedBN keeps normalisation (Li et al.,
    ICLR 2021, arXiv:2102.07623); any layers, which is ours. Of methods whose server averages leaves.
    clip: largest gradient norm per client, None for none.
    """

    rank: int = 8
    alpha: float = 16.0
    adapter: AdapterName = "lora"
    head: Head = "shared"
    weights: Weights = "examples"
    moments: Literal["reset", "keep"] = "reset"
    optimizer: Optimizer = AdamW()
    clip: float | None = None
    rank_pattern: Pattern = ()
    personal_layers: tuple[str, ...] = ()
    label: ClassVar[str] = "lora"  # the adapter's name in keys
    needs_halves: ClassVar[bool] = False  # shares or trains one half of the adapter only
    shares_head: ClassVar[bool] = True  # Local-only shares nothing, whatever the switch says

    def __post_init__(self) -> None:
        if bad := self.problems():
            raise ConfigError(bad)

    def problems(self) -> list[Problem]:
        """What is wrong with the fields; a method with fields of its own adds to it, so that all is shown at once."""
        bad = []
        if self.adapter not in FORMS:
            raise ConfigError([Problem("method.adapter", self.adapter, "a delta form", near(self.adapter, FORMS))])
        if not isinstance(self.rank, int) or not 1 <= self.rank <= MOST_RANK:
            bad.append(Problem("method.rank", self.rank, f"an integer from 1 to {MOST_RANK:,}", "choose 4, 8 or 16"))
            if not isinstance(self.rank, int):
                raise ConfigError(bad)  # the checks below compare the rank with numbers
        if not self.alpha > 0:
            bad.append(Problem("method.alpha", self.alpha, "a number > 0", "alpha = 2 * rank is usual"))
        if self.needs_halves and not self.form.first:
            bad.append(
                Problem(
                    "method.adapter",
                    self.adapter,
                    f"{named(lambda f: bool(f.first))}: {self.title} tells two halves apart",
                    "or use homlora",
                )
            )
        bad += rank_problems("method.rank_pattern", self.rank_pattern)
        if self.rank_pattern and not FORMS[self.adapter].ranks_by_layer:
            have = named(lambda f: f.ranks_by_layer, "and")
            bad.append(Problem("method.rank_pattern", dict(self.rank_pattern), f"none: it is of {have}"))
        bad += pattern_problems("method.personal_layers", ((p, 1) for p in self.personal_layers), lambda one: True, "")
        if self.personal_layers and not self.averages:
            why = f"none: the server of {self.title} is no mean of leaves, layer by layer"
            bad.append(
                Problem("method.personal_layers", list(self.personal_layers), why, "leave it out, or use homlora")
            )
        if self.clip is not None and not self.clip > 0:
            bad.append(Problem("train.clip", self.clip, "a number > 0 or null"))
        return bad

    @property
    def form(self) -> Form:
        """The delta form of the trained adapter."""
        return make(self.adapter, self.rank, self.alpha, self.rank_pattern)

    @property
    def groups(self) -> Sequence[str]:
        return self.form.groups

    def layers_of(self, context: Context) -> list[Layer]:
        """The layers that the form lives on."""
        return [s for group in self.form.groups for s in context.layers(group)]

    @property
    def averages(self) -> bool:
        return self.sends and not self.pooled

    # what a subclass states -------------------------------------------------------------------------------------
    @abstractmethod
    def trains(self, k: Key) -> bool:
        """Whether an adapter leaf is trained. The head follows the switch."""

    @abstractmethod
    def shares(self, k: Key) -> bool:
        """Whether a trained adapter leaf is shared; personal otherwise."""

    # ------------------------------------------------------------------------------------------------------------
    def shared(self, k: Key) -> bool:
        """Whether the server owns a trained leaf; its client does otherwise. Decides for the head too."""
        if k.adapter == "head":
            return self.shares_head and (self.head == "shared" or self.pooled)  # pooled data have one owner
        return "~" not in k.adapter and self.shares(k) and not self._stays(k.layer)

    def _stays(self, layer: str) -> bool:
        """Whether a layer's leaves are personal by its name."""
        return any(matches(p, layer) for p in self.personal_layers)

    def fixed(self, context: Context) -> Params:
        """Leaves that every party derives from the seed: frozen halves, random projections. Nobody owns or sends them."""
        form, layers = self.form, self.layers_of(context)
        start = self.begun(context, form.init(self.label, layers, context.seed))
        return form.fixed(self.label, layers, context.seed) | select(start, lambda k: not self.trains(k))

    def start(self, context: Context) -> Params:
        """Every trained leaf at its start: the deltas are zero, so training starts at the base model."""
        layers = self.layers_of(context)
        self.form.check(self.title, layers)
        p = select(self.begun(context, self.form.init(self.label, layers, context.seed)), self.trains)
        self._known_layers(p)
        return p if self.head == "frozen" else p | self.begun(context, init_head(context.head))

    def _known_layers(self, p: Params) -> None:
        """Raise ModelError for personal layers that are none of those trained, and where nothing would be shared."""
        names = sorted({k.layer for k in p})
        for pattern in self.personal_layers:
            if not any(matches(pattern, n) for n in names):
                raise ModelError(
                    f"method.personal_layers: {pattern!r} matches none of the {len(names)} trained layers, e.g. {names[0]!r}; "
                    "write the end of a layer's name, e.g. query, or a regular expression"
                )
        if self.personal_layers and all(self._stays(n) for n in names):
            raise ModelError(
                "method.personal_layers: every trained layer is personal, so nothing is shared; use the method local"
            )

    def begun(self, context: Context, p: Params) -> Params:
        """Leaves at the start that the run was given, where it has one. Raises ModelError for factors of another rank."""
        if not context.start:
            return p
        return {
            k: _given(context.start[k.layer, k.part], k, v, self.form)
            for k, v in p.items()
            if (k.layer, k.part) in context.start
        } | {k: v for k, v in p.items() if (k.layer, k.part) not in context.start}

    def init(self, context: Context) -> ServerState:
        return ServerState(0, select(self.start(context), self.shared))

    def keep(self, context: Context, client: Client) -> Params:
        p = select(self.start(context), lambda k: not self.shared(k))
        if self.moments == "keep":
            p |= unstack(_flat(self.optimizer.init(stack([self.start(context)]))), 1)[0]
        return p

    def broadcast(self, context: Context, server: ServerState, client: Client) -> Params:
        return server.params

    def begin(self, context: Context, info: RoundInfo, down: Params, kept: Params) -> Work:
        p = select(down, lambda k: not self.frozen(k)) | select(kept, lambda k: "~" not in k.adapter)
        train = select(p, lambda k: k.part != "rank")
        state = _flat(self.optimizer.init(train)) | select(kept, lambda k: "~" in k.adapter)
        work = {"train": train, "ranks": select(p, lambda k: k.part == "rank"), "moments": state}
        work["bound"] = self.bound(context, select(down, self.frozen))
        return work | {"fixed": to(expand(self.fixed(context), block_size(p)), p)}

    def fresh_moments(self, p: Params) -> Params:
        """The optimizer's state before its first step, for leaves p [K ...]."""
        return _flat(self.optimizer.init(p))

    def bound(self, context: Context, p: Params) -> Params:
        """Frozen leaves model-ready, [K ...]; the engine binds them beside the leaves of every step."""
        return self.form.view(p)

    def ready(self, p: Params, fixed: Params) -> Params:
        """Model-ready deltas from trained and fixed leaves."""
        return self.form.view(p | fixed)

    def penalty(self, work: Work, p: Params) -> Tensor | None:
        """What is added to the loss, [K], as a function of the trained leaves p."""
        return None

    def step(self, work: Work, loss: Loss, lr: Tensor, *draws: Batch) -> tuple[Work, Metrics]:
        p = work["train"]
        value, g = loss.gradient(lambda q: self.ready(q, work["fixed"]), p, draws[0])
        return self.descend(work, self.penalised(work, g), lr), {"loss": value}

    def penalised(self, work: Work, g: Params) -> Params:
        """g plus the gradient of the penalty."""
        leaves = {k: work["train"][k].detach().requires_grad_() for k in g}
        extra = self.penalty(work, work["train"] | leaves)
        if extra is None:
            return g
        more = torch.autograd.grad(extra.sum(), list(leaves.values()), materialize_grads=True)
        return {k: v + m for (k, v), m in zip(g.items(), more, strict=True)}

    def descend(self, work: Work, g: Params, lr: Tensor) -> Work:
        """One optimizer step along g, clipped, on the leaves that g has."""
        return self.moved(work, clip(g, self.clip), lr)

    def moved(self, work: Work, g: Params, lr: Tensor) -> Work:
        """One optimizer step along g as it is."""
        p = work["train"]
        new, state = self.optimizer.update(g, _deep(work["moments"]), {k: p[k] for k in g}, lr)
        return work | {"train": p | new, "moments": _flat(state)}

    def finish(self, work: Work) -> tuple[Params, Params]:
        p = work["train"] | work["ranks"]
        moments = work["moments"] if self.moments == "keep" else {}
        return select(p, self.shared), select(p, lambda k: not self.shared(k)) | moments

    def served(self, work: Work) -> Params:
        return self.ready(work["train"], work["fixed"])

    def personal(self, context: Context, down: Params, kept: Params) -> Params:
        p = select(down | kept, lambda k: "~" not in k.adapter and k.part != "rank" and not self.frozen(k))
        own = self.ready(p, to(expand(self.fixed(context), block_size(p)), p))
        return own | self.bound(context, select(down, self.frozen))

    def aggregate(self, context: Context, server: ServerState, uploads: Iterable[Upload]) -> ServerState:
        new = mean((u.params, self.weight(u)) for u in uploads)
        return ServerState(server.round + 1, server.params | new, server.notes)

    def weight(self, u: Upload) -> float:
        """p_k before normalisation."""
        return float(u.client.examples) if self.weights == "examples" else 1.0


def _given(found: Tensor, k: Key, usual: Tensor, form: Form) -> Tensor:
    """A leaf of the start in the shape and scale of the method's own."""
    if found.shape != usual.shape:
        axis = rank_axis(k)
        mine, theirs = (v.shape[axis or 0] for v in (usual, found))
        raise ModelError(
            f"model.adapter: its rank at {k.layer!r} is {theirs}, the method's {mine}; set method.rank to {theirs} (or method.rank_pattern)"
        )
    scale = getattr(form, "scale_at", None)
    return found / scale(k.layer) if k.part == "B" and scale is not None else found


def to(p: Params, like: Params) -> Params:
    """Move p to the device of `like`."""
    device = next(iter(like.values())).device if like else torch.device("cpu")
    return {k: v.to(device) for k, v in p.items()}


def _flat(state: Mapping[str, Params]) -> Params:
    """Optimizer state as leaves: moment "m" of adapter "lora" is adapter "lora~m"."""
    return {k._replace(adapter=f"{k.adapter}~{n}"): v for n, p in state.items() for k, v in p.items()}


def _deep(p: Params) -> dict[str, Params]:
    """Inverse of _flat."""
    out: dict[str, Params] = {}
    for k, v in p.items():
        adapter, _, n = k.adapter.partition("~")
        out.setdefault(n, {})[k._replace(adapter=adapter)] = v
    return out
