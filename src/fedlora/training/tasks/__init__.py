"""The tasks, one short file each. A file put here is found: its name, with "-" for "_", is what recipes call the task.

NAMES are known without loading torch; TASKS, from names to classes, is made when it is first asked for.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..task import Task

    TASKS: dict[str, type[Task]]

NAMES: tuple[str, ...] = tuple(sorted(m.name.replace("_", "-") for m in iter_modules(__path__)))


def _found() -> dict[str, type[Task]]:
    """The one concrete Task class of every file."""
    from ..task import Task

    out: dict[str, type[Task]] = {}
    for name in NAMES:
        module = import_module(f"{__name__}.{name.replace('-', '_')}")
        own = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Task)
               and c.__module__ == module.__name__ and not inspect.isabstract(c)]  # fmt: skip
        assert len(own) == 1, f"{module.__name__} holds {len(own)} tasks, expected one"
        assert own[0].kind == name, f"the task of {module.__name__} is called {own[0].kind!r}, expected {name!r}"
        out[name] = own[0]
    return out


def lower_is_better(metric: str) -> bool:
    """Whether less is better, of a metric of any task."""
    tasks: dict[str, type[Task]] = __getattr__("TASKS")
    return any(metric in t.lower for t in tasks.values())


def made(name: str, outputs: int) -> Task:
    """The task `name` with so many outputs, which are numbered, and its usual options."""
    tasks: dict[str, type[Task]] = __getattr__("TASKS")
    return tasks[name].of([str(i) for i in range(outputs)], {})


def __getattr__(name: str) -> Any:
    if name != "TASKS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = _found()
    return found
