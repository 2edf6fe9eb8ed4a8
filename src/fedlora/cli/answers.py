"""What `fedlora predict` does."""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import sealed
from .actions import _of_round, opened, out, recipe_of

if TYPE_CHECKING:
    from ..federation.store import Which


def predict(
    folder: Path, texts: Sequence[str], client: str | None, file: Path | None, new_tokens: int, json: bool, which: Which
) -> None:
    """Answer requests. What is wrong with them, or with the client's name, is said before a model is loaded."""
    from ..recipe.build import tokenizer_of
    from ..serving import requests
    from ..serving.export import models_of, need_client
    from ..serving.predict import predict_texts

    recipe = recipe_of(folder)
    data = recipe.data.model_dump()
    asked = requests.of_lines(texts, data)
    if str(file) == "-" or not (texts or file):
        asked += requests.of_bytes(_standard_input(), "standard input", data)
    elif file is not None:
        asked += requests.of_file(file.expanduser(), data)
    requests.check(asked, data)
    known = (sealed.read(folder / "partition.json") or {}).get("ids")
    if client is not None and known:
        need_client(client, known)
    recipe, fed = opened(folder, recipe)
    of, [deltas] = models_of(fed, [client], which)
    said = predict_texts(fed, tokenizer_of(recipe), deltas, asked, data, new_tokens)
    _of_round(of)
    for s in said:
        if json:
            line: dict[str, Any] = {"text": s.text, "answer": s.answer, "confidence": s.confidence}
            if s.probabilities is not None:
                line["probabilities"] = dict(s.probabilities)
            sys.stdout.write(json_.dumps(line, ensure_ascii=False) + "\n")
        else:
            sure = f"  ({s.confidence:.0%})" if s.confidence is not None else ""
            out.print(f"{s.answer}{sure}", soft_wrap=True, highlight=False, markup=False)


def _standard_input() -> bytes:
    """All of standard input; nothing where somebody sits at it, who has asked for no text and would wait."""
    return b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read()
