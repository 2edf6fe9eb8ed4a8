"""The outputs of a classifier's head, by their names: a trained head may number its classes otherwise than the data do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

NONE_GIVEN = re.compile(r"LABEL_\d+")  # what transformers calls outputs that nobody named


def name_outputs(base: nn.Module, output: str | None, names: Sequence[str], trained: bool, source: str) -> bool:
    """Put the outputs of layer `output` into the order of `names` and write the names into the configuration.

    trained: whether the layer's weights come from the checkpoint `source`. Where its names are the data's (case and spaces
    folded), its rows are moved to where the data number these classes. Returns False where they are not: such a head knows
    other classes, and its caller must draw it anew. Both are said.
    """
    config: Any = base.config
    own = [str(config.id2label[i]) for i in range(len(names))] if trained else []
    config.id2label = dict(enumerate(names))
    config.label2id = {n: i for i, n in enumerate(names)}
    if not trained or output is None:
        return True
    if all(NONE_GIVEN.fullmatch(n) for n in own):
        own = [n.removeprefix("LABEL_") for n in own]
    place = {_folded(n): i for i, n in enumerate(own)}
    order = [place.get(_folded(n), -1) for n in names]
    if len(place) < len(own) or sorted(order) != list(range(len(own))):
        warnings.warn(
            f"model.name: {source!r} has a head for the classes {_listed(own)}, the data have {_listed(names)}; the head's outputs "
            "are drawn anew from run.seed. If these are the same classes, give them the same names with data.classes or in the "
            "model's config.json (id2label)",
            stacklevel=2,
        )
        return False
    if order != list(range(len(own))):
        layer = base.get_submodule(output)
        with torch.no_grad():
            for p in layer.parameters(recurse=False):
                p.copy_(p[order].clone())
        warnings.warn(
            f"model.name: {source!r} numbers its classes {_listed(own)}, the data {_listed(names)}; the head follows the data by name",
            stacklevel=2,
        )
    return True


def output_layer(base: nn.Module, head: Collection[str], outputs: int) -> str | None:
    """The layer of the head that gives the outputs: the last one with so many; None where there is none."""
    sizes = {n: getattr(base.get_submodule(n), "out_features", None) for n in head}
    return next((n for n in reversed(list(sizes)) if sizes[n] == outputs), None)


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return f"{shown} and {len(names) - 6} more" if len(names) > 6 else shown
