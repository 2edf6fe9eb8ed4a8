"""A frozen base model with weight deltas at named layers; parameters come in as an argument.

Deltas are added by forward hooks, so the base keeps its modules, its names and its code: any model whose layers are
nn.Linear, GPT-2's Conv1D or (for biases) nn.LayerNorm will do, a user's own included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..adapters import Form, Parts, at_layers, form_of
from ..errors import ModelError, near
from ..layers import Layer, layer_of
from ..tree import Key, Params
from .dropout import ClientDropout
from .modes import Modes
from .tables import Tables

# Leaves [K b ...]; "labels" [K b ...], "weight" [K b] 0 on padding rows, "seed" [K b] of dropout; "lengths" [K b] if packed;
# "tokens" [K b], lengths of rows on the host where the batch is elsewhere.
Batch = dict[str, Tensor]
SCORING = frozenset({"llama", "qwen2", "qwen3", "gpt2"})  # architectures whose scores are the output layer's own
NOT_INPUTS = frozenset({"labels", "weight", "seed", "common", "lengths", "tokens"})


class Adapted:
    """The only thing a method sees of the model: its layers and the pure function from (deltas, batch) to an output.

    groups names module paths by use: "target" carries adapters, "head" the task head; more for methods that need them.
    `call` turns (base, inputs) into the output tensor; by default `base(**inputs)` and its `.logits` where it has them.
    compiled: answer some of the base's operators by compiled forms of them, where there are such (kernels/).
    """

    def __init__(
        self,
        base: nn.Module,
        groups: Mapping[str, Sequence[str]],
        call: Callable[[nn.Module, Mapping[str, Tensor]], Tensor] | None = None,
        checkpointing: bool = False,
        dropout: bool = True,
        compiled: bool = True,
    ):
        base.requires_grad_(False)
        base.eval()
        self._modes = Modes(base)
        config: Any = getattr(base, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # keys and values of past tokens are only for generation
        self.base, self.call, self.dropout = base, call or _logits, dropout
        self.checkpointing = checkpointing
        self._now = kernels.Now() if compiled else None
        useful = compiled and kernels.useful(self.device, self.dtype)
        self.compiled = (
            kernels.Compiled(base, self._now, not checkpointing, whole=call is not None)
            if useful and self._now
            else None
        )
        self._bound: dict[str, list[tuple[type[Form], Parts]]] = {}  # the deltas of each layer
        self._fired: set[str] = set()  # layers that some forward has reached
        self._common: set[str] = set()  # layers whose input is one tensor that all examples share
        self._clients, self._all_rows = 1, 1  # K and K * b of the batch at hand
        self._mode: ClientDropout | None = None
        self.groups: dict[str, tuple[Layer, ...]] = {}
        modules = self._modules = dict(base.named_modules())
        for group, names in groups.items():
            self.groups[group] = tuple(replace(self._layer(n, modules), group=group) for n in names)
        hooked = {s.name for layers in self.groups.values() for s in layers}
        self._tables = Tables(base, sorted(hooked))
        self.hooks = [modules[n].register_forward_hook(self._hook(n)) for n in sorted(hooked)]
        if self.compiled:
            self.hooks += self.compiled.hooks
            self.hooks += [modules[n].register_forward_pre_hook(self._hand(n)) for n in sorted(hooked)]
        self._words: Tensor | None = None  # [K*b L] that the output layer is to score, -100 for none
        self._word_losses: Tensor | None = None  # [K*b], once it has
        output: Any = getattr(base, "get_output_embeddings", lambda: None)()
        if compiled and call is None and isinstance(output, nn.Linear) and getattr(config, "model_type", "") in SCORING:
            self.hooks.append(output.register_forward_pre_hook(self._score))
        if checkpointing:
            self._enable_checkpointing()

    @property
    def device(self) -> torch.device:
        """Where the base's weights are."""
        return next(self.base.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base."""
        return next(self.base.parameters()).dtype

    @property
    def pad(self) -> int | None:
        """The token that means "none" to this model; a classifier of decoders reads at the last token that is another.

        Every masked token is this one when it reaches the model, whatever a tokenizer, a collator or a block filled in.
        """
        config: Any = getattr(self.base, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return getattr(text, "pad_token_id", None)

    @property
    def half(self) -> bool:
        """Whether the base computes in half precision."""
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def longest(self) -> float:
        """Tokens that a row may surely have (RoBERTa's table of positions has two that are not for tokens)."""
        return self.positions - 2

    @property
    def positions(self) -> float:
        """Tokens that a row may have by the model's configuration; infinite where it names no limit."""
        config = getattr(self.base, "config", None)
        return getattr(config, "max_position_embeddings", None) or float("inf")

    def _layer(self, name: str, modules: Mapping[str, nn.Module]) -> Layer:
        if name not in modules:
            raise ModelError(f"model: no module {name!r} in {type(self.base).__name__}; {near(name, modules)}")
        layer = layer_of(name, modules[name])
        if layer is None or "/" in name:
            kind = type(modules[name]).__name__
            raise ModelError(
                f"model: module {name!r} is a {kind}, expected Linear, Conv1D, LayerNorm or Embedding; choose another"
            )
        return layer

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def add(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
            clients, rows = self._clients, self._rows
            self._fired.add(name)
            if len(y) != rows and not isinstance(module, nn.Embedding):
                self._common.add(name)
            bound = self._bound.get(name)
            if not bound:
                return y
            if clients > 1 and len(y) == 1 and isinstance(module, nn.Embedding):
                y = y.expand(rows, *y.shape[1:])  # positions, the same for all examples: each client has its own table
            if clients > 1 and len(y) != rows:
                raise ModelError(
                    f"model: layer {name!r} works on a tensor that all examples share ({len(y)} rows, batch {rows}), so "
                    f"{clients} clients cannot be in one block; set run.block to 1 or choose other targets"
                )
            if self.compiled and self.compiled.added():
                return y
            now = self.compiled.now if self.compiled else None
            assert not (now and now.inside and now.packing and now.packing.flat), (
                f"{name}: whose tokens are whose is not known here"
            )
            for form, parts in bound:
                y = form.apply(args[0], y, parts, module)
            return y

        return add

    def _hand(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hand(module: nn.Module, args: tuple[Any, ...]) -> None:
            bound = self._bound.get(name)
            if self.compiled and bound and len(args[0]) == self._rows and all(form.low_rank for form, _ in bound):
                self.compiled.hand(module, [parts for _, parts in bound])

        return hand

    @property
    def _rows(self) -> int:
        """Of the tensors that layers see: clients * b; without padding one for each client, or one for all."""
        now = self.compiled.now if self.compiled else None
        return now.packing.lines if now and now.inside and now.packing is not None else self._all_rows

    def packs(self, batch: Batch) -> bool:
        """Whether right-padded rows with their "lengths" are computed without the padding."""
        if self.compiled is None or "attention_mask" not in batch:
            return False
        return self.compiled.packs(batch["attention_mask"].shape[-1])

    def _enable_checkpointing(self) -> None:
        def contexts() -> Any:
            assert self._mode is not None
            first, again = self._mode.checkpoint_contexts()
            return first, _both(self._operators(), again)

        enable = getattr(self.base, "activation_checkpointing_enable", None)
        if enable is None or not getattr(self.base, "supports_gradient_checkpointing", False):
            raise ModelError(
                f"model: {type(self.base).__name__} does not support gradient checkpointing; "
                "set model.gradient_checkpointing to false or use a model that does"
            )
        enable(activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": contexts})

    def bind(self, p: Params) -> None:
        """Stays bound until the next call: gradient checkpointing re-runs the forward during backward."""
        layers = at_layers(p)
        self._bound = {
            s: [(form_of(parts), parts) for parts in each.values()]
            for s, each in layers.items()
            if s not in self._tables
        }
        read = {s: parts["table"] for s, each in layers.items() if s in self._tables for parts in each.values()}
        self._tables.replace(read)

    @contextmanager
    def training(self, batch: Batch) -> Iterator[None]:
        """Around a forward and its backward: dropout by the batch's seeds, checkpointing on."""
        seeds = batch["seed"].flatten() if "seed" in batch and self.dropout else None
        if seeds is None and not self.checkpointing:
            yield
            return
        self._mode = ClientDropout(seeds, int(batch["common"][0]) if "common" in batch else 0, self._now)
        self._modes.train(True)
        try:
            with self._operators(), self._mode:  # dropout comes first, since no kernel knows what it drops
                yield
        finally:
            self._modes.train(False)
            self._mode = None

    def _operators(self) -> AbstractContextManager[Any]:
        """Around the base's own code."""
        return kernels.Fused(self._now) if self.compiled else nullcontext()

    def _flows(self, compiled: kernels.Compiled) -> bool:
        """Whether the clients' tokens can follow each other: every delta bound in the layers without padding is low-rank."""
        mine = {n: each for n, each in self._bound.items() if n in compiled.within}
        return all(form.low_rank for each in mine.values() for form, _ in each) and all(
            compiled.flows(self._modules[n]) for n in mine
        )

    @contextmanager
    def _packed(self, batch: Batch) -> Iterator[None]:
        if self.compiled is None or "lengths" not in batch:
            yield
            return
        self.compiled.now.packing = kernels.Packing(
            batch["lengths"], batch["attention_mask"].shape[-1], self.compiled.causal, self._flows(self.compiled)
        )
        try:
            yield
        finally:
            self.compiled.now.packing, self.compiled.now.inside = None, False

    def forward(self, p: Params, batch: Batch) -> Tensor:
        """Output of every row, [K b ...]. batch leaves [K b ...]."""
        self.bind(p)
        inputs = {n: v.flatten(0, 1) for n, v in batch.items() if n not in NOT_INPUTS}
        first = next(iter(batch.values()))
        self._clients, self._all_rows = first.shape[0], first.shape[0] * first.shape[1]
        if self.pad is not None and "attention_mask" in inputs and "input_ids" in inputs:
            inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, self.pad)
        with self._packed(batch), self._operators() if self._mode is None else nullcontext():
            y: Tensor = self.call(self.base, inputs)
        if silent := [s for s in self._bound if s not in self._fired and self._tables.is_table(s)]:
            for s in silent:  # no forward pass has called them, so the base reads their weight itself
                self._tables.add(s)
            return self.forward(p, batch)
        return y.unflatten(0, first.shape[:2])

    def _score(self, layer: nn.Linear, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Before the output layer: where only losses are asked for, those are made of the tokens that are scored, and it gets none."""
        words, h, frozen = self._words, args[0], not layer.weight.requires_grad
        if words is None or not frozen or h.device.type != "cpu" or h.shape[:2] != words.shape or self._now is None:
            return None
        if any(self._modules[n] is layer for n in self._bound):
            return None
        at = (words.flatten() >= 0).nonzero().flatten()
        each = kernels.WordLosses.apply(h.flatten(0, 1)[at], layer.weight, layer.bias, words.flatten()[at])
        self._word_losses = each.new_zeros(len(words)).index_add(0, at // words.shape[1], each)
        return (h[:, :0],)

    def scored(self, p: Params, batch: Batch, words: Tensor) -> tuple[Tensor | None, Tensor]:
        """(the summed cross-entropy of each row [K b], or None where the base does not let it be had so; else its output). words
        [K*b L]: the word that each token's output is scored on, -100 for none."""
        self._words, self._word_losses = words, None
        try:
            y = self.forward(p, batch)
        finally:
            self._words, losses = None, self._word_losses
            self._word_losses = None
        return None if losses is None else losses.view(y.shape[:2]), y

    @contextmanager
    def serving(self, p: Params, clients: int = 1, rows: int = 1) -> Iterator[None]:
        """The base itself computes with deltas p [K ...] bound: for `generate`, which calls it many times.

        clients: K; rows: of each client, which follow each other.
        """
        self.bind(p)
        self._clients, self._all_rows = clients, clients * rows
        config: Any = self.base.config
        cache = getattr(config, "use_cache", None)
        config.use_cache = True
        try:
            yield
        finally:
            config.use_cache = cache

    def probe(self, batch: Batch) -> bool:
        """Run `batch` as in evaluation and as in training; True if several clients can be in one block.

        Raises ModelError for targets never reached, and for a base that changes when it is used.
        DeBERTa-v3 projects relative positions that all examples share by its target layers: its clients' deltas differ
        there, so its blocks hold one client.
        """
        seeds = torch.zeros(next(iter(batch.values())).shape[:2], dtype=torch.int64, device=self.device)

        def as_trained() -> None:
            with torch.no_grad(), self.training(batch | {"seed": seeds}):
                self.forward({}, batch)

        self._modes.settle(as_trained)
        layers = {s.name: s for layers in self.groups.values() for s in layers}
        with torch.inference_mode():
            y = self.forward({}, batch)
            for name in (n for n in layers if self._tables.is_table(n) and n not in self._fired):
                # Gradients pass through any normalisation on top.
                t = torch.arange(layers[name].in_ * layers[name].out, device=self.device) % 7 - 3.0
                one = {n: v[:1] for n, v in batch.items()}
                if not torch.equal(
                    self.forward({Key("probe", name, "table"): t.view(1, layers[name].in_, -1)}, one)[0], y[0]
                ):
                    self._fired.add(name)  # the base reads the weight itself instead of calling the layer
        self.bind({})
        if unused := [n for n in layers if n not in self._fired]:
            raise ModelError(
                f"model: the forward never reaches {unused[0]!r} ({len(unused)} such layers), so a delta there would do "
                "nothing; choose other targets"
            )
        adapted = {s.name for group, layers in self.groups.items() for s in layers if group != "head"}
        return not self._common & adapted and not any(n in self._tables for n in adapted)

    def close(self) -> None:
        """Remove the hooks: the base is as it was."""
        self.bind({})
        for h in self.hooks:
            h.remove()


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


def _logits(base: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    out = base(**inputs)
    return out if isinstance(out, Tensor) else out.logits
