"""Token classification: a tag for every word of a text, such as the names in it (B-PER, I-PER, O).

The first token of a word carries its tag, as in transformers' examples; the word's other tokens and the special ones carry none. A word
without a token, because the text was cut, is no part of the loss and counts as missed in the scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from ...data import encode
from ...data.labels import listed, lists
from ...data.lines import place
from ...data.load import Targets, Texts, field_of, joined, tagged
from ...errors import DataError, Problem
from ..metrics import Predictions, Scores, owners, ratio
from ..task import Prediction, Serving, Task, full, labelled

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class TokenClassification(Task):
    """Cross-entropy over tags, mean over the words that a token stands for; labels [N L] int64, -100 where there is none."""

    kind: ClassVar[str] = "token-classification"
    auto: ClassVar[str] = "AutoModelForTokenClassification"
    peft_type: ClassVar[str] = "TOKEN_CLS"
    metric: ClassVar[str] = "f1"
    named: ClassVar[bool] = True
    tokenwise: ClassVar[bool] = True
    tags: tuple[str, ...] = ("O", "B", "I")

    def row_losses(self, output: Tensor, labels: Tensor) -> Tensor:
        n, length, tags = output.shape
        each = F.cross_entropy(full(output).reshape(-1, tags), labels.reshape(-1), reduction="none", ignore_index=-100)
        return each.view(n, length).sum(1)

    def row_counts(self, labels: Tensor) -> Tensor:
        return (labels != -100).sum(1).float()

    def answers(self, output: Tensor, labels: Tensor) -> Tensor:
        return output.argmax(-1).masked_fill(labels == -100, -100)

    def measures(self, clients: Sequence[Predictions]) -> list[Scores]:
        """Precision, recall and F1 of entities, as seqeval's in its default mode (average "micro"); all clients at once.

        An entity is right if its first word, last word and type are. Without entities, said or true, a score is 0.
        """
        outside = list(self.tags).index("O") if "O" in self.tags else len(self.tags)
        tags = np.array([*self.tags, "O"], dtype=object)
        words = [_words(p, outside) for p in clients]
        true, said = (np.concatenate([np.insert(w[i], w[2], outside) for w in words]) for i in (0, 1))
        who = owners([len(t) + len(ends) for t, _, ends in words])
        a, b = entities(true, tags, who), entities(said, tags, who)
        count = lambda which: np.bincount(who[which], minlength=len(clients)).astype(float)  # noqa: E731
        actual, found, right = count(a >= 0), count(b >= 0), count((a >= 0) & (a == b))
        precision, recall, f1 = ratio(right, found), ratio(right, actual), ratio(2 * right, found + actual)
        return [
            {"f1": float(f), "precision": float(p), "recall": float(r)}
            for f, p, r in zip(f1, precision, recall, strict=True)
        ]

    @classmethod
    def of(cls, names: Sequence[str], options: Mapping[str, Any]) -> TokenClassification:
        return cls(tuple(names))

    @classmethod
    def problems(cls, data: Any) -> Iterator[Problem]:
        yield from labelled(cls.kind, data, pairs=False, template=False)

    @classmethod
    def texts(cls, table: pa.Table, data: Mapping[str, Any]) -> Texts:
        items, offsets = lists(table, data["text"], "data.text")
        words = [str(w) for w in items.to_pylist()]
        short = np.flatnonzero(np.diff(offsets) == 0)
        if len(short):
            raise DataError(f"data.text: {place(table, int(short[0]))} of column {data['text']!r} has no words ({len(short)} rows in all); "
                            "remove those rows")  # fmt: skip
        return Texts("words", [words[a:b] for a, b in pairwise(offsets)])

    @classmethod
    def targets(cls, tables: Mapping[int, pa.Table], data: Mapping[str, Any]) -> Targets:
        found, names = listed(tables, data["label"], data.get("classes"), field_of, "tag")
        for (origin, table), (_, offsets) in zip(tables.items(), found, strict=True):
            sizes = np.diff(lists(table, data["text"], "data.text")[1])
            odd = np.flatnonzero(sizes != np.diff(offsets))
            if len(odd):
                i = int(odd[0])
                raise DataError(
                    f"{field_of(origin)}: {place(table, i)} has {sizes[i]} words and {np.diff(offsets)[i]} tags ({len(odd)} rows in "
                    "all), expected a tag for every word; correct those rows"
                )
        if len(names) < 2:
            raise DataError(f"data.label: column {data['label']!r} holds the tags {list(names)}, expected two or more")
        return Targets(outputs=names, words=found)

    def drawn(self, ids: np.ndarray, mask: np.ndarray, g: np.random.Generator) -> np.ndarray:
        return np.where(mask > 0, g.integers(0, len(self.tags), ids.shape), -100)

    def answer(self, serving: Serving, requests: Sequence[Any]) -> list[Prediction]:
        """The tags of the words of each text, in their order; a text is split at spaces. O where a word was cut."""
        rows = [t.split() if isinstance(t, str) else list(t) for t in requests]
        if empty := [i for i, row in enumerate(rows) if not row]:
            raise DataError(f"predict: text {empty[0] + 1} has no words, expected words with spaces between them")
        encoded = encode.words(serving.tokenizer, rows, serving.max_length)
        offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64)
        tokens = joined([encoded], **tagged([encoded], [(np.zeros(offsets[-1], np.int64), offsets)]))
        assert tokens.words is not None
        out = []
        for i, (y, labels) in enumerate(serving.outputs(tokens)):
            said = np.full(len(rows[i]), "O", dtype=object)
            there = tokens.words.seen[offsets[i] : offsets[i + 1]]
            said[there] = [serving.names[j] for j in y.argmax(-1)[labels != -100].tolist()]
            out.append(Prediction(" ".join(rows[i]), " ".join(said)))
        return out


def _words(p: Predictions, outside: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tag numbers of all words of a client's rows, true and said, and where each row ends (a tag "O" is put there)."""
    assert p.labels is not None and p.values is not None
    there = p.labels != -100  # [n L]
    if p.words is None:  # a user's own arrays: the words are those with a label
        return p.labels[there].astype(np.int64), p.values[there].astype(np.int64), np.cumsum(there.sum(1))
    said = np.full(len(p.words.labels), outside, np.int64)
    said[p.words.seen] = p.values[there]
    return p.words.labels, said, p.words.offsets[1:]


def entities(tags: np.ndarray, names: np.ndarray, who: np.ndarray) -> np.ndarray:
    """For each place where an entity ends, a number that is the same for the same first word and type; -1 elsewhere.

    tags int64 [n] with a tag "O" between rows; names: of the tags; who int64 [n]: the client of each. The rules are those of
    seqeval.metrics.sequence_labeling.get_entities: a tag's first character is its place in the entity, what follows the
    first "-" is its type. A tag without prefix is taken apart the same way, so words in a row with one such tag are one entity.
    """
    place = np.array([n[:1] for n in names])[tags]
    kinds = [n[1:].split("-", maxsplit=1)[-1] or "_" for n in names]
    kind = np.array([sorted(set(kinds)).index(k) for k in kinds])[tags]
    first = np.concatenate([[True], who[1:] != who[:-1]])
    before = np.where(first, "O", np.roll(place, 1))
    other = np.where(first, True, kind != np.roll(kind, 1))
    inside = ~np.isin(place, ("O", "."))
    was_inside = ~np.isin(before, ("O", "."))
    starts = (
        np.isin(place, ("B", "S"))
        | (np.isin(before, ("E", "S", "O")) & np.isin(place, ("E", "I")))
        | (inside & other)
    )  # fmt: skip
    ends = (  # the entity of the word before ends
        np.isin(before, ("E", "S"))
        | (np.isin(before, ("B", "I")) & np.isin(place, ("B", "S", "O")))
        | (was_inside & other)
    )  # fmt: skip
    begin = np.maximum.accumulate(np.where(starts | first, np.arange(len(tags)), 0))
    last = np.flatnonzero(ends) - 1
    out = np.full(len(tags), -1, np.int64)
    out[last] = begin[last] * len(kinds) + kind[last]
    return out
