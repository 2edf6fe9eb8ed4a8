"""What a user gives from Python is what the signature says, or one ConfigError names every argument that is not.

A function is decorated with `checked`, a class inherits from `Checked`. Both read the types that stand in the signature, so
that nothing is written twice.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, TypeVar, Union, get_args, get_origin

import numpy as np

from .errors import ConfigError, Problem, near

P = ParamSpec("P")
T = TypeVar("T")

# Names of our classes -> how one is made.
MADE = {
    "Adapted": "fl.adapt(module, targets=[...]) makes one",
    "Callback": "inherit from fl.Callback",
    "Evaluation": "write fl.Evaluation(every=1)",
    "Federation": "write fl.Federation(model, task, data, method, output)",
    "FederatedData": "fl.from_arrays(columns, clients=...) makes them",
    "Guard": "write [fl.Clip(...)]",
    "LocalWork": "write fl.LocalWork(steps=10)",
    "Method": "write fl.FedSALoRA(rank=8), or another of fl.METHODS",
    "Module": "give a torch.nn.Module",
    "Optimizer": "write fl.AdamW(lr=1e-2)",
    "Sampling": "write fl.Sampling(rounds=5)",
    "Schedule": "write fl.Schedule()",
    "Task": "write fl.Classification(2), fl.Regression() or another task",
}
WORDS = {int: "an integer", float: "a number", str: "a text", bool: "True or False", type(None): "None", Path: "a path"}


class Checked:
    """Base of classes that a user makes: their arguments are looked at before `__init__` sees them.

    section: what stands before an argument's name in errors; the name of the class by default.
    """

    section: ClassVar[str] = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:  # a copy is made without any
            _check(cls, cls.section or cls.__name__, (None, *args), kwargs)
        return super().__new__(cls)


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which raises ConfigError for arguments that its signature does not have or that are of other types."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        _check(function, function.__name__, args, kwargs)
        return function(*args, **kwargs)

    return call


def _check(of: Any, section: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    names, hints, needed = _signature(of)
    if len(args) > len(names):
        shown = [n for n in names if n != "self"]
        extra = _Said(f"{len(args) - len(names) + len(shown)} arguments")
        raise ConfigError([Problem(section, extra, f"at most {len(shown)}: {', '.join(shown)}")])
    given = dict(zip(names, args, strict=False))
    known = dict.fromkeys([*names, *hints])
    problems = [
        Problem(f"{section}.{n}", v, f"an argument of {of.__name__}", near(n, [k for k in known if k != "self"]))
        for n, v in kwargs.items()
        if n not in known
    ]
    problems += [
        Problem(f"{section}.{n}", kwargs[n], "to be given once", "drop the one or the other")
        for n in given
        if n in kwargs
    ]
    given |= kwargs
    problems += [
        Problem(
            f"{section}.{n}",
            _Said("nothing"),
            _wanted(hints.get(n, Any)),
            MADE.get(getattr(hints.get(n), "__name__", ""), "give it"),
        )
        for n in needed
        if n not in given
    ]
    for n, v in given.items():
        hint = hints.get(n, Any)
        if not fits(v, hint):
            problems.append(Problem(f"{section}.{n}", _short(v), _wanted(hint), _remedy(v, hint)))
    if problems:
        raise ConfigError(problems)


@functools.lru_cache(maxsize=256)
def _signature(of: Any) -> tuple[list[str], dict[str, Any], list[str]]:
    """Names of arguments by position, every argument's type, and those that must be given. A type that cannot be resolved, as of a
    class that stands inside a function, is not looked at."""
    inherited = isinstance(of, type) and of.__init__ is not object.__init__  # type: ignore[misc]
    function = of.__init__ if inherited else of
    parameters = inspect.signature(function).parameters
    try:
        types_ = typing.get_type_hints(of)
    except (NameError, TypeError):
        types_ = {}
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [n for n, p in parameters.items() if p.kind in kinds]
    needed = [n for n, p in parameters.items() if p.default is p.empty and n != "self" and p.kind.value in (0, 1, 3)]
    hints = {n: types_.get(n, Any) for n, p in parameters.items() if n != "self" and p.kind.value in (0, 1, 3)}
    if any(p.kind.value in (2, 4) for p in parameters.values()):  # the class takes anything
        return list(map(str, range(100))), {}, []
    return names, hints, needed


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as signatures write it. An integer is a number too; True is neither; a list serves as a tuple."""
    origin, of = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, (TypeVar, str)):
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, h) for h in of)
    if origin is typing.Literal:
        return isinstance(value, (str, int, bool, type(None))) and any(
            value == a and type(value) is type(a) for a in of
        )
    if origin is typing.Annotated:
        return fits(value, of[0])
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, (bool, np.bool_))
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, (bool, np.bool_))
    kind = origin or hint
    if kind is Callable or getattr(kind, "__name__", "") == "Callable":
        return callable(value)
    if not isinstance(kind, type):
        return True
    if issubclass(kind, Mapping):
        pairs = isinstance(value, Mapping)
        return pairs and (len(of) < 2 or all(fits(k, of[0]) and fits(v, of[1]) for k, v in value.items()))
    if kind is tuple or kind in (Sequence, list):
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence | np.ndarray):
            return False
        if kind is tuple and of and of[-1] is not Ellipsis:
            return len(value) == len(of) and all(fits(v, h) for v, h in zip(value, of, strict=True))
        return not of or all(fits(v, of[0]) for v in value)
    return isinstance(value, kind)


def words(hint: Any) -> str:
    """A type as people say it."""
    origin, of = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        said = list(dict.fromkeys(words(h) for h in of))
        return ", ".join(said[:-1]) + " or " + said[-1] if len(said) > 1 else said[0]
    if origin is typing.Literal:
        return " or ".join(repr(a) for a in of) if len(of) < 9 else "one of " + ", ".join(map(repr, of))
    if hint in WORDS:
        return WORDS[hint]
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a dict"
    if kind is tuple and of and of[-1] is not Ellipsis:
        return f"a pair ({', '.join(words(h) for h in of)})" if len(of) == 2 else f"{len(of)} values"
    if kind in (tuple, list, Sequence):
        return f"a list (each {words(of[0])})" if of and of[0] is not Any else "a list"
    name = getattr(kind, "__name__", str(kind))
    if name == "Callable":
        return "a function"
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _wanted(hint: Any) -> str:
    return "a value" if hint is Any else words(hint)


def _remedy(value: Any, hint: Any) -> str:
    classes = [h for h in (get_args(hint) or (hint,)) if isinstance(h, type)]
    if isinstance(value, type) and any(issubclass(value, c) for c in classes):
        return f"that is the class itself: write {value.__name__}(...)"
    literals = [a for h in (hint, *get_args(hint)) if get_origin(h) is typing.Literal for a in get_args(h)]
    if isinstance(value, str) and literals:
        return near(value, literals)
    return next((MADE[c.__name__] for c in classes if c.__name__ in MADE), "")


def _short(value: Any) -> Any:
    """A value for an error: whole where it is small, and else its type."""
    said = repr(value)
    if len(said) <= 80 and "\n" not in said:
        return value
    return _Said(f"a {type(value).__name__}")


class _Said(str):
    """A text that is shown without quotes."""

    def __repr__(self) -> str:
        return str(self)
