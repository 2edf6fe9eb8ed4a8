"""The typed description of a run."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from pydantic.fields import FieldInfo

from ..errors import ConfigError, Problem
from . import device, hints, hyperparameters, reading
from . import guards as guard_list
from .hyperparameters import MethodSection
from .overrides import apply
from .problems import UNTYPED, dumps, of_fields
from .rules import Partial, broken
from .sections import (
    SECTIONS,
    Data,
    Deployment,
    Evaluation,
    Federation,
    Generation,
    Model,
    Partition,
    Run,
    Section,
    Train,
)

if TYPE_CHECKING:
    from ..federation.guards.guard import Guard
    from ..methods.contract import Method

ORDER = (
    "name",
    "model",
    "data",
    "partition",
    "method",
    "train",
    "federation",
    "evaluation",
    "generation",
    "deployment",
    "run",
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LATER_SECTIONS = ("generation",)  # a section that is left out of the hash as a whole where it says nothing
SHOWN = ("target", "bandwidth")  # fields of the section evaluation that only reports use
# These fields came after 0.1; at their defaults they are left out of the hash, so that older hashes stay.
LATER = {
    "model": ("adapter", "kernels", "threshold"),
    "data": ("classes", "site", "references"),
    "partition": ("group",),
    "train": ("class_weights",),
    "federation": ("patience", "start", "precision", "norm_bound", "guards"),
    "evaluation": ("clients",),
}
RESULT = ("seed",)  # the fields of the section run that change the result; the others are not hashed


class Recipe(BaseModel):
    """One run, whole. Immutable; made from sections as mappings or as section objects.

    Raises ConfigError with every problem found: of each field, of fields that do not fit each other, and of the method.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    name: str = "run"
    model: Model = Model()
    data: Data
    partition: Partition = Partition()
    method: MethodSection
    train: Train = Train()
    federation: Federation = Federation()
    evaluation: Evaluation = Evaluation()
    generation: Generation = Generation()
    deployment: Deployment = Deployment()
    run: Run = Run()
    _method: Any = PrivateAttr()
    _given: Any = PrivateAttr(default=None)  # the recipe as it was written, where its files were found elsewhere
    _guards: Any = PrivateAttr()

    def __init__(self, **raw: Any) -> None:
        fields, method, guards = _checked(raw)
        super().__init__(**fields)
        self._method, self._guards = method, guards

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.resolved() == other.resolved()

    def __hash__(self) -> int:
        return hash(self.hash)

    @classmethod
    def load(cls, path: str | Path, sets: Sequence[str] = ()) -> Recipe:
        """The recipe in a YAML file, with overrides such as "train.lr=1e-3". A file with a sweep needs `expand`."""
        return cls.from_dict(reading.read(path), sets)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], sets: Sequence[str] = ()) -> Recipe:
        """The recipe in a mapping such as a YAML file holds."""
        changed, problems = apply(reading.mapping(raw, "recipe"), sets)
        if "sweep" in changed:
            problems.append(
                Problem("sweep", changed["sweep"], "one run", "remove the sweep, or use fedlora.recipe.expand")
            )
            changed = {k: v for k, v in changed.items() if k != "sweep"}
        try:
            recipe = cls(**changed)
        except ConfigError as e:
            raise ConfigError([*problems, *e.problems]) from e
        if problems:
            raise ConfigError(problems)
        return recipe

    def override(self, *sets: str) -> Recipe:
        """This recipe with overrides such as "train.lr=1e-3"."""
        return self.from_dict((self._given or self).model_dump(mode="json", exclude_unset=True), sets)

    def elsewhere(self, places: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """This recipe with other paths in some fields, {section: {field: path}}; it resolves and hashes as before."""
        sections = {s: getattr(self, s).model_copy(update=dict(fields)) for s, fields in places.items()}
        moved = self.model_copy(update=sections)
        moved._given = self._given or self
        return moved

    def method_object(self) -> Method:
        """The method, with its optimizer and clipping from the section train."""
        method: Method = self._method
        return method

    def guard_objects(self) -> tuple[Guard, ...]:
        """The guards of the section federation, in their order."""
        guards: tuple[Guard, ...] = self._guards
        return guards

    @property
    def numbers(self) -> device.Numbers:
        """What the base computes in on this machine, and why."""
        return device.numbers(self.model.dtype, self.model.device)

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults included, as JSON has it, model.dtype as this machine computes; loads back as the same recipe."""
        plain = (self._given or self).model_dump(mode="json") | {"method": hyperparameters.resolved(self._method)}
        plain["model"]["dtype"] = self.numbers.dtype
        plain["federation"]["guards"] = guard_list.resolved(self._guards)
        return {key: plain[key] for key in ORDER}

    def to_yaml(self) -> str:
        """`resolved` as YAML."""
        return reading.dump(self.resolved())

    @property
    def hash(self) -> str:
        """12 hex digits of what decides the result: all but the name and how it is run (folder, threads, block, sites)."""
        decisive = {k: v for k, v in self.resolved().items() if k not in ("name", "deployment")}
        if self.deployment.bound != Deployment().bound:  # of that section, this alone decides what a run computes
            decisive["bound"] = self.deployment.bound
        for name, fields in LATER.items():
            usual = defaults(SECTIONS[name])
            decisive[name] = {k: v for k, v in decisive[name].items() if k not in fields or v != usual[k]}
        for name in LATER_SECTIONS:
            if decisive[name] == defaults(SECTIONS[name]):
                del decisive[name]
        decisive["run"] = {k: decisive["run"][k] for k in RESULT}
        decisive["evaluation"] = {k: v for k, v in decisive["evaluation"].items() if k not in SHOWN}
        text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def output_folder(self) -> Path:
        """The run folder, with its placeholders filled in."""
        return Path(
            self.run.output.format(name=self.name, hash=self.hash, seed=self.run.seed, method=self.method.name)
        ).expanduser()


def _checked(raw: Mapping[str, Any]) -> tuple[dict[str, Any], Method | None, tuple[Guard, ...]]:
    """The fields of a Recipe, its method and its guards. Raises ConfigError with all problems."""
    problems = [Problem(k, raw[k], "a section of a recipe", hints.remedy(k, ORDER)) for k in raw if k not in ORDER]
    fields: dict[str, Any] = {}
    partial: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        value, rest, wrong = read_section(name, kind, raw.get(name))
        problems += wrong
        if value is not None:
            fields[name] = value
        if rest is not None:
            partial[name] = rest
    given = raw.get("method")
    if isinstance(given, MethodSection):
        given = {"name": given.name, **given.given}
    method, wrong = hyperparameters.build(given, fields.get("train"))
    problems += [*wrong, *broken(partial)]
    federation = fields.get("federation")
    guards, wrong = guard_list.build(federation.guards if federation is not None else ())
    problems += [*wrong, *guard_list.fit(guards, method)]
    title = raw.get("name", "run")
    if not isinstance(title, str) or not NAME.fullmatch(title):
        problems.append(
            Problem("name", title, "letters, digits, '.', '_' and '-'", "it becomes part of a folder's name")
        )
    if problems:
        raise ConfigError(problems)
    written = {"name": given} if isinstance(given, str) else dict(given or {})
    return {"name": title, **fields, "method": MethodSection(**written)}, method, guards


def read_section(name: str, kind: type[Section], raw: Any) -> tuple[Section | None, Partial | None, list[Problem]]:
    """One section by itself: whole, without its wrong fields, and what is wrong. JSON's types are taken strictly."""
    if isinstance(raw, kind):
        return raw, Partial(raw), []
    raw = {} if raw is None else raw
    if not isinstance(raw, Mapping):
        fields = ", ".join(kind.model_fields)
        return None, None, [Problem(name, raw, "a mapping of fields", f"the section {name} has {fields}")]
    try:
        text = dumps(name, dict(raw))
        section = kind.model_validate_json(text, strict=True)
        return section, Partial(section), []
    except ValidationError as e:
        wrong = {str(x["loc"][0]) for x in e.errors() if x["loc"]}
        plain = json.loads(text)
        problems = of_fields(name, e, plain, defaults(kind), {n: meaning(f) for n, f in kind.model_fields.items()})
        right = {k: v for k, v in plain.items() if k not in wrong}
        lacking = {n: "?" for n, f in kind.model_fields.items() if f.is_required() and n not in right}
        rest = kind.model_validate_json(json.dumps(right | lacking), strict=True)
        return None, Partial(rest, wrong), problems
    except ConfigError as e:
        return None, None, list(e.problems)


def meaning(field: FieldInfo) -> str:
    """A field's description as a phrase."""
    return (field.description or "").strip().removesuffix(".")


def defaults(kind: type[Section]) -> dict[str, Any]:
    """Field -> JSON form of its default, UNTYPED where there is none to show."""
    return {
        n: UNTYPED if f.is_required() or f.default_factory else json.loads(json.dumps(f.default))
        for n, f in kind.model_fields.items()
    }
