"""The client side that most methods share: descend the loss over the leaves that are trained, share some, keep the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .adapters import LOW_RANK, Adapter, AdapterName, LoRA, Pattern, init_head, make, pattern_problems
from .errors import ConfigError, ModelError, Problem
from .method import Client, Method, Metrics, Order, Scene, Server, Upload, Work
from .model import Batch, Site
from .optim import AdamW, Optimizer, clip
from .tasks import Loss
from .tree import Key, Params, mean, select, stack, unstack

Head = Literal["shared", "personal", "frozen"]
Weights = Literal["examples", "uniform"]
MOST_RANK = 100_000  # no layer is wider


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

    rank, alpha, adapter: the delta form (adapters.py). rank_pattern: ranks of some layers, as PEFT has it; their alpha stays.
    head: who owns the classification head; one switch, the same for all methods of a comparison.
    weights: p_k by number of examples or uniform.
    moments: optimizer state reset at the start of each round, or kept by the client.
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
    label: ClassVar[str] = "lora"  # the adapter's name in keys
    needs_halves: ClassVar[bool] = False  # shares or trains one half of the adapter only
    shares_head: ClassVar[bool] = True  # Local-only shares nothing, whatever the switch says

    def __post_init__(self) -> None:
        if bad := self.problems():
            raise ConfigError(bad)

    def problems(self) -> list[Problem]:
        """What is wrong with the fields; a method with fields of its own adds to it, so that all is shown at once."""
        bad = []
        if not isinstance(self.rank, int) or not 1 <= self.rank <= MOST_RANK:
            bad.append(Problem("method.rank", self.rank, f"an integer from 1 to {MOST_RANK:,}", "choose 4, 8 or 16"))
            if not isinstance(self.rank, int):
                raise ConfigError(bad)  # what is asked below cannot be asked
        if not self.alpha > 0:
            bad.append(Problem("method.alpha", self.alpha, "a number > 0", "alpha = 2 * rank is usual"))
        if self.needs_halves and not self.form.first:
            bad.append(
                Problem(
                    "method.adapter",
                    self.adapter,
                    f"lora, rslora, dora or vera: {self.title} tells two halves apart",
                    "or use homlora",
                )
            )
        bad += rank_problems("method.rank_pattern", self.rank_pattern)
        if self.rank_pattern and self.adapter not in (*LOW_RANK, "dora"):
            bad.append(Problem("method.rank_pattern", dict(self.rank_pattern), "none: it is of lora, rslora and dora"))
        if self.clip is not None and not self.clip > 0:
            bad.append(Problem("train.clip", self.clip, "a number > 0 or null"))
        return bad

    @property
    def form(self) -> Adapter:
        return make(self.adapter, self.rank, self.alpha, self.rank_pattern)

    @property
    def groups(self) -> Sequence[str]:
        return (self.form.group,)

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
        if k.adapter == "head":
            return self.shares_head and self.head == "shared"
        return "~" not in k.adapter and self.shares(k)

    def fixed(self, scene: Scene) -> Params:
        """Leaves that every party derives from the seed: frozen halves, random projections. Nobody owns or sends them."""
        form, sites = self.form, scene.sites(self.form.group)
        start = form.init(self.label, sites, scene.seed)
        return form.fixed(self.label, sites, scene.seed) | select(start, lambda k: not self.trains(k))

    def start(self, scene: Scene) -> Params:
        """Every trained leaf at its start: the deltas are zero, so training starts at the base model."""
        sites = scene.sites(self.form.group)
        check_ranks(self, sites)
        p = select(self.form.init(self.label, sites, scene.seed), self.trains)
        return p if self.head == "frozen" else p | init_head(scene.head)

    def init(self, scene: Scene) -> Server:
        return Server(0, select(self.start(scene), self.shared))

    def keep(self, scene: Scene, client: Client) -> Params:
        p = select(self.start(scene), lambda k: not self.shared(k))
        if self.moments == "keep":
            p |= unstack(_flat(self.optimizer.init(stack([self.start(scene)]))), 1)[0]
        return p

    def broadcast(self, scene: Scene, server: Server, client: Client) -> Params:
        return server.params

    def begin(self, scene: Scene, order: Order, down: Params, kept: Params) -> Work:
        p = select(down, lambda k: not self.frozen(k)) | select(kept, lambda k: "~" not in k.adapter)
        train = select(p, lambda k: k.part != "rank")
        state = _flat(self.optimizer.init(train)) | select(kept, lambda k: "~" in k.adapter)
        work = {"train": train, "ranks": select(p, lambda k: k.part == "rank"), "moments": state}
        work["bound"] = self.bound(scene, select(down, self.frozen))
        return work | {"fixed": to(expand(self.fixed(scene), block_size(p)), p)}

    def bound(self, scene: Scene, p: Params) -> Params:
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
        """One optimizer step along g on the leaves that g has."""
        p = work["train"]
        new, state = self.optimizer.update(clip(g, self.clip), _deep(work["moments"]), {k: p[k] for k in g}, lr)
        return work | {"train": p | new, "moments": _flat(state)}

    def finish(self, work: Work) -> tuple[Params, Params]:
        p = work["train"] | work["ranks"]
        moments = work["moments"] if self.moments == "keep" else {}
        return select(p, self.shared), select(p, lambda k: not self.shared(k)) | moments

    def served(self, work: Work) -> Params:
        return self.ready(work["train"], work["fixed"])

    def personal(self, scene: Scene, down: Params, kept: Params) -> Params:
        p = select(down | kept, lambda k: "~" not in k.adapter and k.part != "rank" and not self.frozen(k))
        own = self.ready(p, to(expand(self.fixed(scene), block_size(p)), p))
        return own | self.bound(scene, select(down, self.frozen))

    def aggregate(self, scene: Scene, server: Server, uploads: Iterable[Upload]) -> Server:
        new = mean((u.params, self.weight(u)) for u in uploads)
        return Server(server.round + 1, server.params | new, server.notes)

    def weight(self, u: Upload) -> float:
        """p_k before normalisation."""
        return float(u.client.examples) if self.weights == "examples" else 1.0


def check_ranks(method: SGDMethod, sites: Sequence[Site]) -> None:
    """A LoRA rank above a layer's size buys nothing and hides a mistake: refused. VeRA's rank may exceed it."""
    form = method.form
    if not isinstance(form, LoRA):
        return
    for s in sites:
        r = form.rank_at(s.name)
        if r > min(s.out, s.in_):
            raise ModelError(
                f"{method.title}: rank {r} exceeds the layer {s.name!r} of {s.out} x {s.in_}; "
                f"lower method.rank to at most {min(s.out, s.in_)} or choose other targets"
            )


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
