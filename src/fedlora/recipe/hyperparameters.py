"""The method section: a name, and the hyperparameters that the method's own dataclass declares.

`optimizer` and `clip` are the exception: a method has them as fields, a recipe says them in the section train.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from ..errors import ConfigError, Problem, near
from .problems import UNTYPED, of_value, unknown
from .sections import Train

if TYPE_CHECKING:
    from ..method import Method
    from ..optim import Optimizer

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
    return {f.name: f for f in dataclasses.fields(cls) if f.init}


def own_fields(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The hyperparameters that a recipe's method section may set."""
    return {n: f for n, f in all_fields(cls).items() if n not in FROM_TRAIN}


def hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def plain(hint: Any, value: Any) -> Any:
    """A hyperparameter's value as JSON has it."""
    return TypeAdapter(hint).dump_python(value, mode="json")


def default(cls: type, field: str) -> Any:
    """JSON form of a hyperparameter's default; UNTYPED where it has none."""
    f = own_fields(cls)[field]
    if f.default is not dataclasses.MISSING:
        return plain(hints(cls)[field], f.default)
    return plain(hints(cls)[field], f.default_factory()) if f.default_factory is not dataclasses.MISSING else UNTYPED


def optimizer(t: Train) -> Optimizer:
    """The optimizer that the train section describes."""
    from ..optim import SGD, AdamW

    if t.optimizer == "sgd":
        return SGD(t.lr, t.momentum, t.weight_decay)
    return AdamW(t.lr, t.betas, weight_decay=t.weight_decay)


def build(raw: Any, train: Train | None) -> tuple[Method | None, list[Problem]]:
    """The method that a method section describes, or None and every problem. train: None where it is wrong itself."""
    methods = table()
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, Mapping):
        return None, [Problem("method", raw, "a mapping with a name", f"write method: {{name: {next(iter(methods))}}}")]
    name = raw.get("name")
    if name is None:
        return None, [Problem("method.name", None, "a method", near("", methods))]
    if not isinstance(name, str) or name not in methods:
        return None, [Problem("method.name", name, "a method", near(str(name), methods))]
    return _construct(methods[name], {k: v for k, v in raw.items() if k != "name"}, train)


def _construct(cls: type[Method], given: Mapping[str, Any], train: Train | None) -> tuple[Method | None, list[Problem]]:
    known, types = own_fields(cls), hints(cls)
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    for field, value in given.items():
        path = f"method.{field}"
        if field in FROM_TRAIN:
            problems.append(Problem(path, value, "it in the section train", f"set train.{field} instead"))
        elif field not in known:
            problems.append(unknown(path, value, f"method {cls.name}", known))
        else:
            if isinstance(value, Mapping) and typing.get_origin(types[field]) is tuple:
                value = [list(pair) for pair in value.items()]  # a frozen method holds a map as pairs
            values[field], wrong = of_value(path, types[field], value, default(cls, field))
            if wrong and _is_map(types[field]):
                wrong = [
                    Problem(
                        path,
                        given[field],
                        "a map of names to numbers",
                        f"write {field}: {{name: 4}}, a space after the colon",
                    )
                ]
            if wrong:
                del values[field]
                problems += wrong
    needed = [f for f in known if default(cls, f) is UNTYPED]
    problems += [
        Problem(f"method.{f}", None, "a value", f"{cls.title} has no default for it; add it")
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
    # Built even where a field is wrong, with its default in place, so that what __post_init__ finds is shown as well.
    try:
        method = cls(**values)
    except ConfigError as e:
        return None, problems + [_renamed(p) for p in e.problems]
    except (ValueError, TypeError) as e:
        return None, [*problems, Problem("method", dict(given), f"what {cls.title} takes", str(e))]
    return (None if problems else method), problems


def _is_map(hint: Any) -> bool:
    """Whether a hyperparameter is a tuple of pairs, which recipes write as a map."""
    inner = typing.get_args(hint)
    return typing.get_origin(hint) is tuple and typing.get_origin(inner[0]) is tuple


def _renamed(p: Problem) -> Problem:
    """A problem found by an optimizer or a method, with the recipe's name of the field."""
    head, _, field = p.field.rpartition(".")
    if head in ("SGD", "AdamW"):
        return dataclasses.replace(p, field=f"train.{field}")
    return p if head in ("method", "train") else dataclasses.replace(p, field=f"method.{p.field}")


def resolved(method: Method) -> dict[str, Any]:
    """Name and every hyperparameter, defaults included, as JSON has them."""
    types = hints(type(method))
    return {"name": method.name} | {f: plain(types[f], getattr(method, f)) for f in own_fields(type(method))}
