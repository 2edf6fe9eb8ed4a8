"""From a recipe to the objects it describes. Every section is tried, so that all problems are shown at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .. import kernels
from ..adapters import at_layers
from ..checkpoints import peft, pretrained, start
from ..data.batches import LocalWork
from ..data.federated import FederatedData, assemble
from ..data.load import Look
from ..errors import ConfigError, FedloraError, Problem
from ..federation import generation
from ..federation.engine import Schedule
from ..federation.generation import Generation
from ..federation.run import Federation
from ..federation.setting import Evaluation, Sampling
from ..federation.store import Store
from ..federation.trackers import TRACKERS
from ..methods.contract import Method
from ..model.adapted import Adapted
from ..model.decoding import Decoding
from ..model.groups import groups
from ..model.targets import matching
from ..training import texts
from ..training.optimizers import SGD, AdamW, Optimizer
from ..training.task import Task
from ..training.tasks import TASKS
from ..tree import stack
from . import places
from .device import device_of

if TYPE_CHECKING:
    from . import Recipe

T = TypeVar("T")


def optimizer_of(r: Recipe) -> Optimizer:
    """The optimizer that the train section describes."""
    t = r.train
    if t.optimizer == "sgd":
        return SGD(t.lr, t.momentum, t.weight_decay)
    return AdamW(t.lr, t.betas, weight_decay=t.weight_decay)


def task_of(r: Recipe, data: FederatedData) -> Task:
    kind = TASKS[r.model.task]
    return kind.of(kind.names(data), r.model.model_dump() | {"class_weights": weights_of(r, data)})


def weights_of(r: Recipe, data: FederatedData) -> tuple[float, ...] | None:
    """The weight of each class in the loss; None for equal ones. Raises ConfigError for a list of another length."""
    given = r.train.class_weights
    if given is None:
        return None
    if given == "balanced":
        rows = data.histogram("train")[: len(data.ids) - data.unseen].sum(0)
        return tuple(float(rows.sum() / (len(rows) * n)) if n else 1.0 for n in rows)
    if len(given) != len(data.label_names):
        want = f"{len(data.label_names)} weights, of {', '.join(data.label_names[:8])}"
        raise ConfigError([Problem("train.class_weights", list(given), want, "in the order of the classes")])
    return tuple(float(w) for w in given)


def attention_of(r: Recipe, method: Method) -> str | None:
    """None for transformers' own choice (fused where the model has it): where our kernels answer it, dropout included, or on a GPU.

    Eager elsewhere: where there is attention dropout (its masks are ours), where attention must be differentiated twice, and on
    CPUs, where the fused form is slower in bf16 and gains little in fp32 (bench/NOTES.md).
    """
    if r.model.attention != "auto":
        if r.model.attention == "sdpa" and method.second_order:
            raise ConfigError([Problem("model.attention", "sdpa", f"auto or eager, because {method.title} differentiates "
                                       "the model twice and fused attention cannot", "set model.attention to auto")])  # fmt: skip
        return r.model.attention
    device = torch.device(device_of(r.model.device))
    ours = r.model.kernels == "auto" and kernels.useful(device, pretrained.DTYPES[r.numbers.dtype])
    if ours and r.data.max_length <= kernels.MOST:
        return None
    return "eager" if method.second_order or r.train.dropout or device.type == "cpu" else None


def int8_fits(r: Recipe, method: Method) -> None:
    """Raise ConfigError where the base cannot be in int8: its products are made on CPUs, and are differentiated once."""
    bad = []
    if (device := device_of(r.model.device)) != "cpu":
        bad.append(
            Problem(
                "model.dtype", "int8", f"fp32 or bf16 on {device}", "set model.device to cpu, or model.dtype to auto"
            )
        )
    if method.second_order:
        what = f"fp32 or bf16, because {method.title} differentiates the model twice and a rounded product has no second derivative"
        bad.append(
            Problem("model.dtype", "int8", what, "set model.dtype to auto, or take the method's first-order form")
        )
    if bad:
        raise ConfigError(bad)


def adapted_of(
    r: Recipe, loaded: pretrained.Pretrained, method: Method, adapter: start.Adapter | None = None
) -> Adapted:
    """The base with the layers that the method needs. adapter: where training starts; its layers are the usual targets."""
    targets: Any = r.model.targets
    if targets == "auto":
        targets = peft.default_targets(loaded.model_type, loaded.base) if adapter is None else [*adapter.factors]
    inside = [n for n in matching(loaded.base, targets) if n not in loaded.head]
    found = groups(method.groups, loaded.base, loaded.model_type, inside, loaded.head)
    return Adapted(loaded.base, found, checkpointing=r.model.gradient_checkpointing, dropout=r.train.dropout,
                   compiled=r.model.kernels == "auto")  # fmt: skip


def start_of(
    r: Recipe, loaded: pretrained.Pretrained, model: Adapted, adapter: start.Adapter
) -> dict[tuple[str, str], torch.Tensor]:
    """The adapter at the layers of the model. Raises ModelError where it is another base's."""
    layers = [s.name for s in model.groups["target"]]
    return start.fitted(adapter, loaded.base, layers, loaded.head, [pretrained.known_as(r.model.name), r.model.name])


def starts_there(f: Federation) -> None:
    """Raise ConfigError for a method or a form whose first global model is not the adapter."""
    server = f.method.init(f.context)
    down, kept = f.method.whole(f.context, server), f.method.fresh(f.context, f.client(0))
    first = f.method.personal(f.context, stack([down]), stack([kept]))
    for layer in {layer for layer, part in f.start if part == "A"}:
        want = f.start[layer, "B"] @ f.start[layer, "A"]
        got = sum(
            (p["B"][0] @ p["A"][0] for p in at_layers(first).get(layer, {}).values() if p.keys() == {"A", "B"}),
            torch.zeros(()),
        )
        if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-4, atol=1e-6):
            what = f"a method that starts at given factors; {f.method.title} with this delta form does not"
            raise ConfigError(
                [
                    Problem(
                        "model.adapter",
                        layer,
                        what,
                        "choose homlora, fedsa or pf2lora with adapter lora, or merge the adapter",
                    )
                ]
            )


def tokenizer_of(r: Recipe) -> Any:
    """The tokenizer alone: data can be prepared before the model is loaded."""
    return pretrained.load_tokenizer(r.model.name, r.model.revision)


def data_of(r: Recipe, tokenizer: Any, cache: Path | None = None, look: Look | None = None) -> FederatedData:
    """The clients' data, tokenised and partitioned. look: is shown what was read."""
    return assemble(
        tokenizer, r.data.model_dump(), r.partition.model_dump(), TASKS[r.model.task], r.run.seed, cache, look
    )


def generation_of(r: Recipe, tokenizer: Any) -> Generation | None:
    """What is written in evaluations; None where no score of it is asked for."""
    g = r.generation
    how = Decoding(g.new_tokens, g.temperature, g.top_p, g.top_k)
    return Generation(g.scores, how, g.rows, g.samples, tokenizer, g.choices or (), g.per) if g.scores else None


def method_of(r: Recipe) -> Method:
    """The method with its optimizer and clipping filled in from the train section."""
    return r.method_object()


def federation(
    r: Recipe, output: str | Path | None = None, source: Callable[[Recipe, Any], FederatedData] = data_of
) -> Federation:
    """Everything a recipe describes, ready to run. Raises ConfigError with all problems found.

    source: gives the data, from the recipe and a tokenizer.
    """
    problems: list[Problem] = []

    def attempt(field: str, make: Callable[[], T]) -> T | None:
        try:
            return make()
        except ConfigError as e:
            problems.extend(e.problems)
        except FedloraError as e:
            problems.append(Problem.told(field, e))
        return None

    if r.run.threads:
        torch.set_num_threads(r.run.threads)
    method = attempt("method", lambda: method_of(r))
    if r.numbers.warning:
        warnings.warn(r.numbers.warning, stacklevel=2)
    attempt("model.device", lambda: device_of(r.model.device))
    if r.run.tensorboard:
        attempt("run.tensorboard", lambda: TRACKERS["tensorboard"].check("run.tensorboard"))
    for t in r.run.trackers:
        attempt("run.trackers", partial(TRACKERS[t].check, "run.trackers"))
    if r.generation.scores:
        attempt("generation.scores", lambda: texts.check("generation.scores", r.generation.scores))
    attention = attempt("model.attention", lambda: attention_of(r, method)) if method else None
    if method and r.numbers.dtype == "int8":
        attempt("model.dtype", lambda: int8_fits(r, method))
    tokenizer = attempt("model", lambda: tokenizer_of(r))
    data = attempt("data", lambda: source(r, tokenizer)) if tokenizer is not None else None
    names = TASKS[r.model.task].names(data) if data is not None else ()
    loaded = None
    if not any(p.field.startswith("model") for p in problems):
        with warnings.catch_warnings():
            if data is None:  # the classes are not known, so nothing true can be said of a head
                warnings.simplefilter("ignore")
            loaded = attempt(
                "model",
                lambda: pretrained.load(
                    r.model.name, r.model.task, len(names) or 2, seed=r.run.seed, dtype=r.numbers.dtype,
                    attention=attention, revision=r.model.revision, device=device_of(r.model.device), names=names,
                ),
            )  # fmt: skip
    adapter = attempt("model.adapter", lambda: start.read(r.model.adapter or "")) if r.model.adapter else None
    model = None
    if loaded and method and (adapter or not r.model.adapter):
        model = attempt("model.targets", lambda: adapted_of(r, loaded, method, adapter))
    begin = (
        attempt("model.adapter", lambda: start_of(r, loaded, model, adapter)) if adapter and model and loaded else {}
    )
    if problems or method is None or data is None or model is None:
        raise ConfigError(problems)
    fed = Federation(
        model=model,
        task=task_of(r, data),
        patience=r.federation.patience,
        data=data,
        method=method,
        output=output or r.output_folder(),
        plan=LocalWork(r.train.steps, r.train.epochs, r.train.batch_size),
        schedule=Schedule(r.train.schedule, r.train.warmup),
        sampling=Sampling(
            r.federation.rounds,
            r.federation.clients_per_round,
            r.federation.cohort,
            r.federation.min_clients,
            r.federation.precision,
            r.federation.norm_bound,
            r.guard_objects(),
        ),
        evaluation=Evaluation(
            r.evaluation.every,
            r.evaluation.views,
            r.evaluation.cross_clients,
            r.evaluation.batch_size,
            analyses=r.evaluation.analyses,
            threshold=r.evaluation.threshold,
            clients=r.evaluation.clients,
            generation=generation_of(r, tokenizer),
        ),
        seed=r.run.seed,
        block=r.run.block,
        accumulation=r.train.accumulation,
        keep=r.run.keep,
        tensorboard=r.run.tensorboard,
        trackers=r.run.trackers,
        name=r.name,
        recipe=r.resolved(),
        recipe_hash=r.hash,
        numbers=f"{r.numbers.dtype}, because {r.numbers.why}",
        start=begin or {},
        earlier=None if r.federation.start is None else Store(Path(r.federation.start).expanduser()),
    )
    fed.store.places = places.of(r, fed.store.root)
    if r.generation.scores and len(data.examples):
        attempt("generation.scores", lambda: generation.check(data))
    if fed.training:
        attempt("federation.clients_per_round", lambda: fed.sampling.size(fed.training))
    attempt("method", lambda: method.init(fed.context))
    if fed.earlier is not None and not problems:
        attempt("federation.start", fed.beginning)
    if begin and not problems:
        attempt("model.adapter", lambda: starts_there(fed))
    if problems:
        raise ConfigError(problems)
    return fed
