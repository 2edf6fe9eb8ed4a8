"""Finds the classes of a package, so that a file put there is known without a list that names it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from typing import TypeVar

T = TypeVar("T")


def found(package: str, path: Iterable[str], base: type[T]) -> dict[str, type[T]]:
    """Name -> class, of every concrete subclass of `base` that has a `name` of its own, by file and place in the file."""
    out: dict[str, type[T]] = {}
    for module in sorted(m.name for m in iter_modules(path)):
        for cls in vars(import_module(f"{package}.{module}")).values():
            own = isinstance(cls, type) and issubclass(cls, base) and cls.__module__ == f"{package}.{module}"
            if own and not inspect.isabstract(cls) and "name" in vars(cls):
                name: str = vars(cls)["name"]
                assert name not in out, f"two classes of {package} are called {name!r}"
                out[name] = cls
    return out
