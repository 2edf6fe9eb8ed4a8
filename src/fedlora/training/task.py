"""The contract of a task: what a model is trained for. training/tasks/ has one short file for each; this is what such a file says.

A task turns (output, labels) into the loss of every row and the number of terms it sums; it says what the model answers,
how answers are scored, which columns of a recipe it reads, and what transformers and PEFT call it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..arguments import Checked
from ..data import encode
from ..data.columns import strings
from ..data.examples import Tokens
from ..data.load import Targets, Texts, filled, joined
from ..errors import Problem
from ..model.adapted import Adapted
from ..tree import Params
from .batching import TOKENWISE, stack_batches
from .metrics import Predictions, Scores, beats, mean_loss

if TYPE_CHECKING:
    import pyarrow as pa

    from ..data.federated import FederatedData

ROWS = 32  # requests answered in one forward pass


@dataclass(frozen=True)
class Prediction:
    """One prediction. text: the input; answer: label name, value or continuation; confidence: of a label, else None.

    probabilities: of every label by its name, where the task has such: they sum to 1 over classes, and stand each for itself
    where a text may have several labels.
    """

    text: str
    answer: str
    confidence: float | None = None
    probabilities: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Serving:
    """A model that answers requests. deltas: model-ready, with a client axis of 1; names: of the model's outputs."""

    model: Adapted
    deltas: Params
    tokenizer: Any
    names: Sequence[str]
    max_length: int
    new_tokens: int = 64  # most new tokens that a language model writes

    def outputs(self, rows: Tokens) -> Iterator[tuple[Tensor, Tensor]]:
        """The model's output of each row in fp32 [...], and its labels, on the CPU."""
        for a in range(0, len(rows), ROWS):
            batch = stack_batches([rows.collate(np.arange(a, min(a + ROWS, len(rows))))])
            batch = {n: v.to(self.model.device) for n, v in batch.items()}
            with torch.inference_mode():
                y = self.model.forward(self.deltas, batch)[0].float().cpu()
            yield from zip(y, batch["labels"][0].cpu(), strict=True)


def shown(text: Any) -> str:
    """A request as one line."""
    return text if isinstance(text, str) else " | ".join(text)


class Task(Checked, ABC):
    """Frozen description of a task. `kind` is its name in recipes: its file's name, with "-" for "_"."""

    kind: ClassVar[str]
    auto: ClassVar[str] = "AutoModelForSequenceClassification"  # transformers' class that loads such a model
    peft_type: ClassVar[str] = "SEQ_CLS"  # a member of PEFT's TaskType
    metric: ClassVar[str] = "loss"  # the metric that chooses the best round
    lower: ClassVar[frozenset[str]] = frozenset({"loss"})  # metrics of which less is better
    named: ClassVar[bool] = False  # whether the model's outputs have names, in which all parties must agree
    has_head: ClassVar[bool] = True  # whether layers are put on top of the base for it
    over_vocabulary: ClassVar[bool] = False  # whether every token has an output for each word of the vocabulary
    tokenwise: ClassVar[bool] = False  # whether labels [N L] have one entry a token
    weighted: ClassVar[bool] = False  # whether a row has one class, which train.class_weights can weigh
    permutes: ClassVar[bool] = False  # whether a client can have its own permutation of the labels
    options: ClassVar[tuple[str, ...]] = ()  # fields of the recipe's section model that only this task reads

    # training -----------------------------------------------------------------------------------------------------
    @abstractmethod
    def row_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        """Summed loss of each row, [N]; output [N ...] in any float dtype, labels [N ...]."""

    def words(self, labels: Tensor) -> Tensor | None:
        """Where a row's loss is the cross-entropy of words: the word that each token's output is scored on, [N L], -100 for none."""
        return None

    def row_counts(self, labels: Tensor) -> Tensor:
        """How many terms the loss of each row sums, [N]."""
        return torch.ones(len(labels), device=labels.device)

    @property
    def leaves(self) -> frozenset[str]:
        """The leaves of a batch that have an entry for each token."""
        return TOKENWISE if self.tokenwise else TOKENWISE - {"labels"}

    @property
    def outputs(self) -> int | None:
        """How many values the model must give for each row; None where that is not known before."""
        return None

    def unfit(self, labels: np.ndarray | None) -> str | None:
        """Why these labels [n ...] of a user's own arrays are none of this task's, and what to do; None where they are."""
        return None if labels is not None else 'there are none, expected a column "labels"; give one'

    # evaluation ---------------------------------------------------------------------------------------------------
    def answers(self, output: Tensor, labels: Tensor) -> Tensor | None:
        """What the model says of each row, [N ...] to be compared with labels; None where only the loss is measured."""
        return None

    def scores(self, clients: Sequence[Predictions]) -> list[Scores]:
        """Rows `n`, loss per term and the task's own metrics of each client; only `n` and the loss of one without rows."""
        out: list[Scores] = [{"n": len(p.losses), "loss": mean_loss(p)} for p in clients]
        held = [i for i, p in enumerate(clients) if len(p.losses)]
        for i, own in zip(held, self.measures([clients[i] for i in held]) if held else [], strict=True):
            out[i] |= own
        return out

    def measures(self, clients: Sequence[Predictions]) -> list[Scores]:
        """The task's own metrics of each client; every client has rows."""
        return [{} for _ in clients]

    @classmethod
    def better(cls, metric: str, a: float, b: float) -> bool:
        """Whether score a beats score b; nothing beats by being NaN."""
        return beats(a, b, metric in cls.lower)

    # recipes ------------------------------------------------------------------------------------------------------
    @classmethod
    def of(cls, names: Sequence[str], options: Mapping[str, Any]) -> Task:
        """The task for outputs of these names. options: the recipe's section model."""
        return cls()

    @classmethod
    def names(cls, data: FederatedData) -> tuple[str, ...]:
        """Names of the model's outputs; () where they have none."""
        return (data.outputs or tuple(data.label_names)) if cls.named else ()

    @classmethod
    def config(cls, outputs: int) -> dict[str, Any]:
        """What transformers' configuration is told to load a model of so many named outputs."""
        return {"num_labels": outputs if cls.named else 1}

    @classmethod
    def problems(cls, data: Any) -> Iterator[Problem]:
        """What is wrong with the columns of a recipe's section data."""
        yield from labelled(cls.kind, data)

    @classmethod
    def grouped(cls, data: Any) -> bool:
        """Whether rows have classes by which they can be given to clients. data: the recipe's section."""
        return False

    # data ---------------------------------------------------------------------------------------------------------
    @classmethod
    def texts(cls, table: pa.Table, data: Mapping[str, Any]) -> Texts:
        """The inputs of a table's rows, for the recipe's section data. Raises DataError."""
        if data.get("template"):
            return Texts("texts", filled(table, data))
        text = data.get("text")
        columns = [strings(table, c, "data.text") for c in ([text] if isinstance(text, str) else text or ())]
        return Texts("texts", columns[0], columns[1] if len(columns) > 1 else None)

    @classmethod
    def targets(cls, tables: Mapping[int, pa.Table], data: Mapping[str, Any]) -> Targets:
        """The labels of every table's rows; the first table is the training data. Raises DataError."""
        return Targets()

    def drawn(self, ids: np.ndarray, mask: np.ndarray, g: np.random.Generator) -> np.ndarray:
        """Labels [b ...] for tokens [b L], where only the cost of a step is measured."""
        raise NotImplementedError(f"{self.kind} has no labels to draw")

    # serving ------------------------------------------------------------------------------------------------------
    def say(self, output: Tensor, names: Sequence[str]) -> tuple[str, float | None]:
        """What the output [...] of one row means: the answer, and the confidence in it."""
        raise NotImplementedError(f"{self.kind} answers no single requests")

    def probabilities(self, output: Tensor) -> Tensor | None:
        """Of each of the model's named outputs [...], from the output of one row; None where the task has none."""
        return None

    def answer(self, serving: Serving, requests: Sequence[Any]) -> list[Prediction]:
        """What the model says of each text, or pair of texts."""
        pairs = [] if isinstance(requests[0], str) else [t[1] for t in requests]
        first = [t if isinstance(t, str) else t[0] for t in requests]
        encoded = encode.texts(serving.tokenizer, first, pairs or None, serving.max_length)
        rows = joined([encoded], labels=np.zeros(len(first)))
        out = []
        for t, (y, _) in zip(requests, serving.outputs(rows), strict=True):
            p = self.probabilities(y)
            named = None if p is None else dict(zip(serving.names, p.tolist(), strict=True))
            out.append(Prediction(shown(t), *self.say(y, serving.names), named))
        return out


def full(output: Tensor) -> Tensor:
    """Half precision to fp32 before a softmax or a square; fp32 and fp64 stay."""
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


def labelled(kind: str, data: Any, pairs: bool = True, template: bool = True) -> Iterator[Problem]:
    """What is wrong with the columns of a task that has texts and labels. pairs, template: whether it can read these."""
    if data.messages is not None:
        yield Problem("data.messages", data.messages, f"null for {kind}", "set model.task to causal-lm")
    if data.text is not None and data.template is not None and "{text}" not in data.template and template:
        what = "the template names its columns: drop one"
        yield Problem("data.template", data.template, "{text} in it, or data.text null", what)
    if isinstance(data.text, tuple) and not pairs:
        yield Problem("data.text", list(data.text), f"one column for {kind}", "name the column of the words")
    elif isinstance(data.text, tuple) and data.template is not None:
        what = "name both columns in the template"
        yield Problem("data.text", list(data.text), "one column or null beside data.template", what)
    if data.template is not None and not template:
        yield Problem("data.template", data.template, f"null for {kind}", "name the column of the words as data.text")
    if data.text is None and data.template is None:
        many = "a column, or two for pairs," if pairs else "a column"
        yield Problem("data.text", None, f"{many} for {kind}", "name the column of the texts")
    if data.label is None:
        yield Problem("data.label", None, f"a column for {kind}", "name the column of the labels")
    if data.chat:
        yield Problem("data.chat", True, f"false for {kind}", "set model.task to causal-lm")
    for field in ("prompt", "completion", "references"):
        value = getattr(data, field)
        if value is not None:
            what = "set model.task to causal-lm, or use data.text"
            yield Problem(f"data.{field}", value, f"null for {kind}", what)
