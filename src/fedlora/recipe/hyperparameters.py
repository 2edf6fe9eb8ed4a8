"""The method section: a name, and the hyperparameters that the method's own dataclass declares.

`optimizer` and `clip` are the exception: they are fields of the method, but a recipe gives them in the section train.

A hyperparameter may be a method itself, written as a section inside the section. Where both methods have a field of one
name, the inner method takes the value of the outer one. So only its other fields are written.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from ..errors import ConfigError, Problem, near
from .problems import UNTYPED, of_value, unknown
from .sections import Train

if TYPE_CHECKING:
    from ..methods.contract import Method
    from ..training.optimizers import Optimizer

FROM_TRAIN = ("optimizer", "clip")


class MethodSection(BaseModel):
    """Name and hyperparameters as the recipe gives them; `given` holds the latter."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    name: str

    @property
    def given(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def table() -> dict[str, type[Method]]:
    """Methods by name."""
    from ..methods import METHODS

    return METHODS


def all_fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """Every field of a dataclass that its constructor takes."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def own_fields(cls: type, around: Collection[str] = ()) -> dict[str, dataclasses.Field[Any]]:
    """The hyperparameters that a section may set. around: fields of the method around it, which sets those itself."""
    return {n: f for n, f in all_fields(cls).items() if n not in FROM_TRAIN and n not in around}


def hints(cls: type) -> dict[str, Any]:
    """The type of every field."""
    return typing.get_type_hints(cls, include_extras=True)


def held(cls: type, field: str) -> bool:
    """Whether a hyperparameter is a method itself."""
    return field in getattr(cls, "inner", {})


def plain(cls: type, field: str, value: Any) -> Any:
    """A hyperparameter's value as JSON has it."""
    if held(cls, field):
        return resolved(value, all_fields(cls))
    return TypeAdapter(hints(cls)[field]).dump_python(value, mode="json")


def default(cls: type, field: str) -> Any:
    """JSON form of a hyperparameter's default; UNTYPED where it has none."""
    f = all_fields(cls)[field]
    if f.default is not dataclasses.MISSING:
        return plain(cls, field, f.default)
    return plain(cls, field, f.default_factory()) if f.default_factory is not dataclasses.MISSING else UNTYPED


def optimizer(t: Train) -> Optimizer:
    """The optimizer that the train section describes."""
    from ..training.optimizers import SGD, AdamW

    if t.optimizer == "sgd":
        return SGD(t.lr, t.momentum, t.weight_decay)
    return AdamW(t.lr, t.betas, weight_decay=t.weight_decay)


def build(
    raw: Any, train: Train | None, path: str = "method", around: Collection[str] = ()
) -> tuple[Method | None, list[Problem]]:
    """The method that a method section describes, or None and every problem.

    train: None where it is wrong itself, or for a method inside another. path: of the section. around: see `own_fields`.
    """
    methods = table()
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, Mapping):
        return None, [Problem(path, raw, "a mapping with a name", f"write {path}: {{name: {next(iter(methods))}}}")]
    name = raw.get("name")
    if name is None:
        return None, [Problem(f"{path}.name", None, "a method", near("", methods))]
    if not isinstance(name, str) or name not in methods:
        return None, [Problem(f"{path}.name", name, "a method", near(str(name), methods))]
    return _construct(methods[name], {k: v for k, v in raw.items() if k != "name"}, train, path, around)


def _construct(
    cls: type[Method], given: Mapping[str, Any], train: Train | None, path: str, around: Collection[str]
) -> tuple[Method | None, list[Problem]]:
    known = own_fields(cls, around)
    values, problems = read(cls, {f: v for f, v in given.items() if f in known and not held(cls, f)}, path)
    for field, value in given.items():
        at = f"{path}.{field}"
        if field in FROM_TRAIN:
            problems.append(Problem(at, value, "it in the section train", f"set train.{field} instead"))
        elif field in around and field in all_fields(cls):
            outer = path.rpartition(".")[0]
            problems.append(Problem(at, value, f"nothing: it has {outer}.{field}", f"set {outer}.{field} instead"))
        elif field not in known:
            problems.append(unknown(at, value, f"method {cls.name}", known))
        elif held(cls, field):
            inside, wrong = build(value, None, at, all_fields(cls))
            problems += wrong
            if inside is not None:
                values[field] = inside
    needed = [f for f in known if default(cls, f) is UNTYPED]
    problems += [
        Problem(f"{path}.{f}", None, "a value", f"{cls.title} has no default for it; add it")
        for f in needed
        if f not in given
    ]
    if not values.keys() >= set(needed):
        return None, problems
    taken = all_fields(cls)
    if train is not None and "optimizer" in taken:
        values["optimizer"] = optimizer(train)
    if train is not None and train.clip is not None:
        if "clip" in taken:
            values["clip"] = train.clip
        else:
            problems.append(Problem("train.clip", train.clip, "null", f"{cls.title} does not clip"))
    # Wrong fields take their defaults here, so that the problems that __post_init__ finds are shown as well.
    try:
        method = cls(**values)
    except ConfigError as e:
        return None, problems + [_renamed(p, path) for p in e.problems]
    except (ValueError, TypeError) as e:
        return None, [*problems, Problem(path, dict(given), f"what {cls.title} takes", str(e))]
    return (None if problems else method), problems


def read(cls: type, given: Mapping[str, Any], path: str) -> tuple[dict[str, Any], list[Problem]]:
    """Values for fields of a dataclass from what YAML gave, and what is wrong with the others."""
    types = hints(cls)
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for field, value in given.items():
        at = f"{path}.{field}"
        if isinstance(value, Mapping) and typing.get_origin(types[field]) is tuple:
            value = [list(pair) for pair in value.items()]  # a frozen dataclass holds a map as a tuple of pairs
        values[field], wrong = of_value(at, types[field], value, default(cls, field))
        if wrong and _is_map(types[field]):
            remedy = f"write {field}: {{name: 4}}, a space after the colon"
            wrong = [Problem(at, given[field], "a map of names to numbers", remedy)]
        if wrong:
            del values[field]
            problems += wrong
    return values, problems


def _is_map(hint: Any) -> bool:
    """Whether a hyperparameter is a tuple of pairs, which recipes write as a map."""
    inner = typing.get_args(hint)
    return typing.get_origin(hint) is tuple and typing.get_origin(inner[0]) is tuple


def _renamed(p: Problem, path: str) -> Problem:
    """A problem found by an optimizer or a method, with the recipe's name of the field."""
    head, _, field = p.field.partition(".")
    if head in ("SGD", "AdamW"):
        return dataclasses.replace(p, field=f"train.{field}")
    if head == "train":
        return p
    return dataclasses.replace(p, field=f"{path}.{field if head == 'method' else p.field}")


def resolved(method: Method, around: Collection[str] = ()) -> dict[str, Any]:
    """Name and every hyperparameter, defaults included, as JSON has them. around: see `own_fields`."""
    cls = type(method)
    return {"name": method.name} | {f: plain(cls, f, getattr(method, f)) for f in own_fields(cls, around)}
