"""The methods, one short file each. A file put here is found: METHODS maps the names in recipes to the classes."""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules

from ..method import Method


def _found() -> dict[str, type[Method]]:
    """Every concrete Method class of this package, by file and then by its place in the file."""
    out: dict[str, type[Method]] = {}
    for module in sorted(m.name for m in iter_modules(__path__)):
        for cls in vars(import_module(f"{__name__}.{module}")).values():
            own = isinstance(cls, type) and issubclass(cls, Method) and cls.__module__ == f"{__name__}.{module}"
            if own and not inspect.isabstract(cls) and "name" in vars(cls):
                assert cls.name not in out, f"two methods are called {cls.name!r}"
                out[cls.name] = cls
    return out


METHODS: dict[str, type[Method]] = _found()
