"""Causal language modelling: plain text, or completions of prompts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ...data import chats, encode
from ...data.columns import class_names, lists, strings, under
from ...data.columns import full as full_column
from ...data.labels import classes
from ...data.lines import place
from ...data.load import Targets, Texts, field_of, filled
from ...errors import DataError, Problem
from ...model.decoding import Asked, Decoding, decode
from ..metrics import Predictions, Scores, mean_loss
from ..task import ROWS, Prediction, Serving, Task, full

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class CausalLM(Task):
    """Cross-entropy of the next token, mean over scored tokens; labels [N L], -100 where there is no loss."""

    kind: ClassVar[str] = "causal-lm"
    auto: ClassVar[str] = "AutoModelForCausalLM"
    peft_type: ClassVar[str] = "CAUSAL_LM"
    lower: ClassVar[frozenset[str]] = frozenset({"loss", "perplexity", "bits_per_character"})
    has_head: ClassVar[bool] = False
    over_vocabulary: ClassVar[bool] = True
    tokenwise: ClassVar[bool] = True

    def row_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        n, length, vocabulary = output.shape
        target = labels[:, 1:].reshape(-1)
        scores = full(output[:, :-1]).reshape(-1, vocabulary)
        return F.cross_entropy(scores, target, reduction="none", ignore_index=-100).view(n, length - 1).sum(1)

    def words(self, labels: Tensor) -> Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=-100)

    def row_counts(self, labels: Tensor) -> Tensor:
        return (labels[:, 1:] != -100).sum(1).float()

    def measures(self, clients: Sequence[Predictions]) -> list[Scores]:
        return [_measures(p) for p in clients]

    @classmethod
    def config(cls, outputs: int) -> dict[str, Any]:
        return {}

    @classmethod
    def problems(cls, data: Any) -> Iterator[Problem]:
        if data.messages is not None:
            for field in ("text", "prompt", "completion", "template", "references"):
                if (value := getattr(data, field)) is not None:
                    yield Problem(f"data.{field}", value, "null beside data.messages", "drop one of the two")
            if data.chat:
                yield Problem("data.chat", True, "false beside data.messages, which are chats already", "leave it out")
            return
        if isinstance(data.text, tuple):
            what = "use data.prompt and data.completion"
            yield Problem("data.text", list(data.text), "one column for causal-lm", what)
        if data.text is not None and data.completion is not None:
            yield Problem("data.text", data.text, "null beside data.completion", "drop one of the two")
        if data.prompt is not None and data.completion is None:
            yield Problem("data.completion", None, "a column beside data.prompt", "name the column of the answers")
        if data.completion is not None and data.prompt is None and data.template is None:
            yield Problem("data.prompt", None, "a column beside data.completion", "name the column of the questions")
        if data.chat and data.completion is None:
            what = "name the columns of questions and answers, or data.messages"
            yield Problem("data.chat", True, "data.prompt and data.completion beside it", what)
        if isinstance(data.prompt, tuple) and data.template is not None:
            what = "name them in the template, or drop it"
            yield Problem("data.prompt", list(data.prompt), "one column or null beside data.template", what)
        if data.references is not None and data.completion is None:
            what = "name the column of the answers that are trained"
            yield Problem("data.completion", None, "a column beside data.references", what)
        if data.text is None and data.prompt is None and data.completion is None and data.template is None:
            what = "name a text column, data.prompt and data.completion, or data.messages"
            yield Problem("data.text", None, "a column for causal-lm", what)

    @classmethod
    def grouped(cls, data: Any) -> bool:
        return data.label is not None or data.source == "demo"

    @classmethod
    def texts(cls, table: pa.Table, data: Mapping[str, Any]) -> Texts:
        if messages := data.get("messages"):
            rows = full_column(table, messages, "data.messages").to_pylist()
            return Texts("conversations", rows, places=[place(table, i) for i in range(table.num_rows)])
        completion, template = data.get("completion"), data.get("template")
        first = filled(table, data) if template else None
        if completion:
            answers = strings(table, completion, "data.completion")
            if names := class_names(table, completion):  # numbers of classes: what a model says is their names
                answers = [names[int(a)] for a in answers]
            prompts = first or under(table, data["prompt"], "data.prompt")
            more = data.get("references")
            references = lists(table, more, "data.references") if more else None
            if data.get("chat"):
                turns = [chats.turn(p, a) for p, a in zip(prompts, answers, strict=True)]
                places = [place(table, i) for i in range(table.num_rows)]
                return Texts("conversations", turns, references=references, places=places, field="data.chat")
            return Texts("continuations", prompts, answers, references)
        return Texts("running", first or strings(table, data["text"], "data.text"))

    @classmethod
    def targets(cls, tables: Mapping[int, pa.Table], data: Mapping[str, Any]) -> Targets:
        """A column of classes is for the partition alone."""
        label = data.get("label")
        if label is None:
            return Targets()
        first, names = classes(tables[0], label, data.get("classes"))
        ids = [first] + [classes(t, label, names, field_of(o))[0] for o, t in tables.items() if o]
        return Targets(None, ids, names)

    def drawn(self, ids: np.ndarray, mask: np.ndarray, g: np.random.Generator) -> np.ndarray:
        return np.where(mask > 0, ids, -100)

    def answer(self, serving: Serving, requests: Sequence[Any]) -> list[Prediction]:
        """Greedy continuations. A prompt that leaves no room for new tokens loses its beginning, as in training; that is said."""
        texts = [t if isinstance(t, str) else " ".join(t) for t in requests]
        prompts = [_prompt(serving, t, i + 1) for i, t in enumerate(texts)]
        room = int(min(serving.model.positions - serving.new_tokens, max(map(len, prompts))))
        if room < 1:
            raise DataError(
                f"predict: got {serving.new_tokens} new tokens, expected fewer than {serving.model.positions}, all that the model "
                "can read and write; set --new-tokens"
            )
        before = len(encode.specials(serving.tokenizer)[0])
        if cut := sum(len(p) > room for p in prompts):
            warnings.warn(
                f"predict: {cut} of {len(prompts)} prompts are longer than {room} tokens, which the model can read before "
                f"{serving.new_tokens} new ones; they lost their beginning",
                stacklevel=2,
            )
        fitted = [p if len(p) <= room else [*p[:before], *p[len(p) - room + before :]] for p in prompts]
        params = {k: v[0] for k, v in serving.deltas.items()}
        how, pad = Decoding(serving.new_tokens), serving.tokenizer.pad_token_id or 0
        [said] = decode(
            serving.model, [Asked(params, fitted, [0] * len(fitted))], how, pad, ends(serving.tokenizer), ROWS, 1
        )
        decoded = (serving.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said)
        return [Prediction(t, d) for t, d in zip(texts, decoded, strict=True)]


def ends(tokenizer: Any) -> list[int]:
    """The token with which completions end in training; [] for a tokenizer that has none."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _measures(p: Predictions) -> Scores:
    loss = mean_loss(p)
    if not p.counts.sum():
        return {}
    out = {"perplexity": math.exp(min(loss, 700.0))}
    if p.chars is not None and p.chars.sum() > 0:
        out["bits_per_character"] = float(p.losses.sum()) / math.log(2) / float(p.chars.sum())
    return out


def _prompt(s: Serving, text: str, number: int) -> list[int]:
    """The tokens that a continuation follows, those that stood before a completion in training. number: of the request."""
    before, _ = encode.specials(s.tokenizer)
    ids = [*before, *s.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    if not ids:
        begin = getattr(s.model.base.config, "bos_token_id", None)
        if begin is None:
            raise DataError(
                f"predict: request {number} is empty, and the model has no token to start from; give at least one word"
            )
        ids = [begin]
    return ids
