"""Text in, answer out: what the model of a client, or the global one, says of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..data import chats, encode, template
from ..data.columns import below
from ..data.examples import Arrays
from ..errors import DataError, near
from ..federation import choices
from ..federation.generation import Generation
from ..federation.run import Federation
from ..training.task import ROWS, Prediction, Serving, shown
from ..tree import Params, stack

__all__ = ["Prediction", "Request", "asked_columns", "predict_texts"]

Request = str | Sequence[str] | Mapping[str, str]  # a text; a pair of texts or a list of words; a row by its columns


def predict_texts(
    f: Federation,
    tokenizer: Any,
    deltas: Params,
    requests: Sequence[Request],
    data: Mapping[str, Any],
    new_tokens: int = 64,
) -> list[Prediction]:
    """What the model with model-ready `deltas` says of each request.

    data: the recipe's section. The template of training is filled here too: a text alone stands for the one column that it
    names; where it names several, a request is a row. Raises DataError for no request, or one that does not fit.
    """
    if not requests:
        raise DataError("predict: got no text, expected at least one; give it as an argument or with --file")
    inputs = [worded(r, data, i + 1) for i, r in enumerate(requests)]
    if data.get("messages") or data.get("chat"):
        inputs = [chats.prompt(tokenizer, x if isinstance(x, str) else " ".join(x)) for x in inputs]
    there = {k: v.to(f.model.device) for k, v in stack([deltas]).items()}
    if (g := f.evaluation.generation) is not None and g.choices:
        return _chosen(f, g, tokenizer, deltas, requests, inputs)
    serving = Serving(f.model, there, tokenizer, f.task.names(f.data), data["max_length"], new_tokens)
    said = f.task.answer(serving, inputs)
    return [replace(p, text=_request(r)) for p, r in zip(said, requests, strict=True)]


def _chosen(
    f: Federation, g: Generation, tokenizer: Any, deltas: Params, requests: Sequence[Request], inputs: Sequence[Any]
) -> list[Prediction]:
    """The likeliest choice after each input, with the probability of each among the choices."""
    before, _ = encode.specials(tokenizer)
    texts = [x if isinstance(x, str) else " ".join(x) for x in inputs]
    prompts = [[*before, *tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"]] for t in texts]
    [scores] = choices.likelihoods(f, replace(g, tokenizer=tokenizer), [deltas], [prompts], 1)
    shares = torch.from_numpy(scores).softmax(1).tolist()
    return [
        Prediction(_request(r), said, max(p), dict(zip(g.choices, p, strict=True)))
        for r, said, p in zip(requests, choices.chosen(scores, g), shares, strict=True)
    ]


def predict_columns(f: Federation, deltas: Params, columns: Any) -> list[Prediction]:
    """What the model with model-ready `deltas` says of each row of a user's own columns [n ...]. Raises DataError for columns that
    the run's data do not have."""
    own = f.data.examples
    if not isinstance(own, Arrays):
        raise DataError("predict: the run was trained on tokens that it was given; make Arrays of its inputs")
    wanted = [n for n in own.columns if n != "labels"]
    if not isinstance(columns, Mapping):
        raise DataError(f"predict: got a {type(columns).__name__}, expected a dict of the columns {', '.join(wanted)}")
    if lost := [n for n in wanted if n not in columns]:
        raise DataError(
            f"predict: there is no column {lost[0]!r}, expected {', '.join(wanted)}; {near(lost[0], columns)}"
        )
    rows = Arrays({n: np.asarray(columns[n], own.columns[n].dtype) for n in wanted})
    for n, v in rows.columns.items():
        if v.shape[1:] != own.columns[n].shape[1:]:
            was = list(own.columns[n].shape[1:])
            raise DataError(
                f"predict: column {n!r} has rows of shape {list(v.shape[1:])}, expected {was}, as in training"
            )
    bound = {k: v.to(f.model.device) for k, v in stack([deltas]).items()}
    out = []
    for a in range(0, len(rows), ROWS):
        batch = rows.collate(np.arange(a, min(a + ROWS, len(rows))))
        with torch.inference_mode():
            y = f.model.forward(bound, {n: v[None].to(f.model.device) for n, v in batch.items()})[0].float().cpu()
        for i, each in enumerate(y):
            p, names = f.task.probabilities(each), f.task.names(f.data)
            named = None if p is None else dict(zip(names, p.tolist(), strict=True))
            out.append(Prediction(f"row {a + i}", *f.task.say(each, names), named))
    return out


def asked_columns(data: Mapping[str, Any]) -> list[str]:
    """The columns from which a request is made, in their order."""
    if data.get("template"):
        return [_column(n, data) for n in template.names(data["template"])]
    text = data.get("prompt") if data.get("completion") else data.get("text")
    return [text] if isinstance(text, str) else list(text or ["text"])


def _optional(data: Mapping[str, Any]) -> list[str]:
    """Those of them that a request may leave out or empty: the prompt's columns after the first."""
    prompt = data.get("prompt")
    return [] if isinstance(prompt, str | None) or data.get("template") else list(prompt[1:])


def worded(request: Request, data: Mapping[str, Any], number: int = 1) -> str | Sequence[str]:
    """A request as the model read its rows in training. number: of the request, for errors. Raises DataError."""
    columns = asked_columns(data)
    if not isinstance(request, str | Mapping) and not (
        isinstance(request, Sequence) and request and all(isinstance(x, str) for x in request)
    ):
        raise DataError(f"predict: request {number} is {request!r}, expected a text, two texts, or a dict by column")
    if isinstance(request, Mapping):
        request = {c: "" for c in _optional(data)} | {k: v for k, v in request.items() if v is not None}
        lost = [c for c in columns if not isinstance(request.get(c), str)]
        if lost:
            raise DataError(
                f"predict: request {number} has no text {lost[0]!r}, expected the columns {', '.join(columns)}; "
                f"{near(lost[0], request)}"
            )
        row = {c: request[c] for c in columns}
    elif data.get("template"):
        if len(columns) != 1 or not isinstance(request, str):
            raise DataError(
                f"predict: request {number} is one text, expected a row with the columns {', '.join(columns)}, which "
                "data.template names; give each request as a JSON object with these keys"
            )
        row = {columns[0]: request}
    elif data.get("completion") and not isinstance(request, str):
        return below(request)
    else:
        return request
    if data.get("completion") and not data.get("template"):
        return below([*row.values()])
    if not data.get("template"):
        return row[columns[0]] if len(columns) == 1 else [row[c] for c in columns]
    cut = template.parts(data["template"])
    return template.fill(cut, {n: row[_column(n, data)] for _, n in cut if n is not None})


def _column(name: str, data: Mapping[str, Any]) -> str:
    """The column that a name in the template stands for: {prompt} and {text} are those of the recipe."""
    own = data.get(name) if name in ("prompt", "text") else None
    return own if isinstance(own, str) else name


def _request(r: Request) -> str:
    return shown(list(r.values())) if isinstance(r, Mapping) else shown(r)
