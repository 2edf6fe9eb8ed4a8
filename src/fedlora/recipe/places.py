"""The recipe of a run folder, and where the files lie that it names by relative paths.

A recipe says `data.source: rows.csv`, seen from where the run was started. places.json keeps where that is, seen from the run folder
and absolute, so that the run goes on when it is resumed from elsewhere or moved. It is no part of the recipe or its hash.
"""

from __future__ import annotations

import contextlib
import glob
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, FedloraError, StateError, near
from ..federation.claim import PLACES
from ..files import sealed

if TYPE_CHECKING:
    from . import Recipe

FIELDS = (
    ("data", "source"),
    ("data", "validation"),
    ("data", "test"),
    ("model", "name"),
    ("model", "adapter"),
    ("federation", "start"),
)


def recipe_in(folder: Path) -> Recipe:
    """The recipe stored in a run folder: recipe.yaml, or where that is damaged or gone recipe.json. Raises StateError."""
    from . import Recipe

    file = folder / "recipe.yaml"
    if not folder.is_dir():
        around = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise StateError(f"{folder}: no such run folder; {near(folder.name, around)}")
    sure: Recipe | None = None
    with contextlib.suppress(StateError, ConfigError, TypeError):  # the run itself says what is wrong with recipe.json
        stored = sealed.read(folder / "recipe.json")
        sure = Recipe.from_dict(stored["recipe"]) if stored and stored.get("recipe") else None
    try:
        found = Recipe.load(file) if file.exists() else None
    except (FedloraError, UnicodeDecodeError) as e:
        if sure is None:
            raise StateError(f"{file}: is no recipe any more ({e}); restore it") from e
        found = None
    if found is None and sure is None:
        raise StateError(
            f"{folder}: holds no recipe.yaml, so it is not a run folder made from a recipe; choose another"
        )
    if found is None:
        warnings.warn(f"{file} is {'damaged' if file.exists() else 'gone'}: recipe.json is used instead.", stacklevel=2)
        return sure  # type: ignore[return-value]
    if sure is not None and sure.hash == found.hash and sure != found:
        odd = sorted(_odd(sure.resolved(), found.resolved()))
        warnings.warn(
            f"{file} was changed since the run was started, in {', '.join(odd)}; it is used as it is now.", stacklevel=2
        )
    return found


def _odd(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """Fields in which two resolved recipes differ."""
    for section, x in a.items():
        y = b[section]
        if isinstance(x, dict) and isinstance(y, dict):
            yield from (f"{section}.{k}" for k in {**x, **y} if x.get(k) != y.get(k))
        elif x != y:
            yield section


# relative paths ---------------------------------------------------------------------------------------------------------
def of(recipe: Recipe, folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """Field -> text in the recipe -> where that is, for what the recipe names by a relative path that is there."""
    out: dict[str, dict[str, dict[str, str]]] = {}
    for section, field in FIELDS:
        for text in _texts(getattr(getattr(recipe, section), field)):
            if not Path(text).is_absolute() and not text.startswith("~") and _exists(Path(text)):
                place = {"absolute": str(Path(text).absolute())}
                with contextlib.suppress(ValueError):  # another drive
                    place["relative"] = os.path.relpath(place["absolute"], folder.absolute())
                out.setdefault(f"{section}.{field}", {})[text] = place
    return out


def located(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe of a run folder with its relative paths found again; hash and resolved text stay. Raises StateError."""
    known = sealed.read(folder / PLACES) or {}
    new: dict[str, dict[str, Any]] = {}
    for section, field in FIELDS:
        value = getattr(getattr(recipe, section), field)
        places = known.get(f"{section}.{field}", {})
        found = [_find(f"{section}.{field}", t, places[t], folder) if t in places else t for t in _texts(value)]
        if found != _texts(value):
            new.setdefault(section, {})[field] = found[0] if isinstance(value, str) else tuple(found)
    return recipe.elsewhere(new) if new else recipe


def _find(field: str, text: str, place: dict[str, str], folder: Path) -> str:
    tried = [
        *([folder.absolute() / place["relative"]] if "relative" in place else []),
        Path(place["absolute"]),
        Path(text),
    ]
    for path in tried:
        if _exists(path):
            return os.path.normpath(path.absolute())
    raise StateError(
        f"{field}: {text} is gone: it was {place['absolute']} when the run was started, and is not in this folder either; put it "
        "back, or resume from where it is"
    )


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(v) for v in value or ()]


def _exists(path: Path) -> bool:
    return path.exists() or (glob.has_magic(str(path)) and bool(glob.glob(str(path), recursive=True)))
