"""Whose folder a run folder is: one recipe's, over the same data and base."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import StateError
from ..files import durable, sealed
from .states import Folder, opened

KEPT_SERVERS = 2  # the newest, and the one before in case the newest is damaged on disk
PLACES = "places.json"
WHAT = {  # of `inputs`, for people
    "texts": "the texts (data.source, or the tokenizer of model.name)",
    "labels": "the labels (data.source)",
    "clients": "who holds which rows (data.source)",
    "adapter": "the adapter to start from (model.adapter)",
    "references": "the texts that answers are compared with",
    "base": "the weights of the base (model.name)",
}


class Claimed(Folder):
    """The part of a run folder that says what is run in it.

    facts: JSON that belongs to the run and goes into every server state (recipe hash, fingerprints, block size). places: what
    places.json is to hold (`places.of`).
    """

    def __init__(self, root: str | Path):
        super().__init__(root)
        self.facts: dict[str, Any] = {}
        self.places: dict[str, Any] = {}

    def claim(self, hash: str, recipe: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> None:
        """Make the folder this recipe's, or check that it is. inputs: fingerprints of data and base (`inputs.of`).

        Writing recipe.json makes the claim; the rest follows from it. Raises StateError for a folder that is anybody else's, and
        where the inputs are others than the run was started with.
        """
        inputs = dict(inputs or {})
        known = self._claimed()
        if known is None:
            others = [p.name for p in self.root.iterdir() if not _left_by_a_crash(p, recipe)]
            if others:
                raise StateError(
                    f"{self.root}: holds other files ({', '.join(sorted(others)[:3])}) and no run; give a new or empty folder"
                )
            known = {"hash": hash, "recipe": dict(recipe), "inputs": inputs}
            self.write_json("recipe.json", known)
            with contextlib.suppress(OSError):  # a folder above that may not be read
                durable.sync_one(self.root.parent)
        if known["hash"] != hash:
            raise StateError(
                f"{self.root}: belongs to recipe {known['hash']}, not to {hash}{_difference(known['recipe'], recipe)}; "
                "give another output folder (run.output or --output), or the recipe it was made with"
                + (f". To go on with more rounds: fedlora run RECIPE --from {self.root}" if known["recipe"] else "")
            )
        self.same(inputs, known["inputs"])
        if not (self.root / "recipe.json").exists() or self.damaged("recipe.json"):
            self.mended("recipe.json", "it was written anew from what the server's state knows")
            self.write_json("recipe.json", {"hash": hash, "recipe": dict(recipe), "inputs": known["inputs"]})
        if self.places and not (self.root / PLACES).exists():
            self.write_json(PLACES, self.places)
        if recipe and not (self.root / "recipe.yaml").exists():
            self.write(self.root / "recipe.yaml", _yaml(recipe))
        self.facts |= {"hash": hash, "inputs": known["inputs"]}

    def same(self, inputs: Mapping[str, str], known: Mapping[str, str] | None = None) -> None:
        """Raise StateError where these fingerprints are not those the run was started with (by default: as recipe.json says)."""
        if known is None:
            known = (self._claimed() or {}).get("inputs", {})
        other = [WHAT.get(k, k) for k in inputs if k in known and known[k] != inputs[k]]
        if other:
            raise StateError(
                f"{self.root}: this run was started with other files: changed {'has' if len(other) == 1 else 'have'} "
                f"{' and '.join(other)}; put them back as they were, or run the recipe in another folder"
            )

    def _claimed(self) -> dict[str, Any] | None:
        """What recipe.json says, or else the server's state of it. Raises StateError where it is damaged and no state helps."""
        damage: StateError | None = None
        try:
            found = sealed.read(self.root / "recipe.json")
            if found is not None:
                return found
        except StateError as e:
            damage = e
        for path in states_in(self.root)[:KEPT_SERVERS]:
            with contextlib.suppress(StateError):
                facts = opened(path)[1].get("facts", {})
                if "hash" in facts:
                    return {"recipe": {}, **facts}
        if damage is not None:
            raise damage
        return None


def states_in(root: Path) -> list[Path]:
    """Files of the server's states, the newest first."""
    return sorted((root / "server").glob("*.safetensors"), reverse=True)


def _yaml(recipe: Mapping[str, Any]) -> bytes:
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True).encode()


def _left_by_a_crash(path: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether a file is what a claim of ours leaves behind when it is killed; then the folder is still nobody's."""
    if path.name == ".lock" or (path.name.startswith(".") and path.name.endswith(".tmp")):
        return True
    return path.name == "recipe.yaml" and path.is_file() and path.read_bytes() == _yaml(recipe)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The fields in which two recipes differ."""

    def flat(x: Any, path: str = "") -> dict[str, Any]:
        if isinstance(x, Mapping):
            return {k2: v2 for k, v in x.items() for k2, v2 in flat(v, f"{path}.{k}" if path else str(k)).items()}
        return {path: x}

    a, b = flat(old), flat(new)
    odd = [
        k
        for k in {**a, **b}
        if (a.get(k) != b.get(k) and k != "name" and not k.startswith("run."))
        or (k == "run.seed" and a.get(k) != b.get(k))
    ]
    shown = ", ".join(f"{k} {a.get(k)!r} there, {b.get(k)!r} here" for k in odd[:3])
    return f" (differs in {shown}{', ...' if len(odd) > 3 else ''})" if odd else ""
