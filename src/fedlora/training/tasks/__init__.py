"""The tasks, one short file each. A file put here is found: its name, with "-" for "_", is what recipes call the task.

NAMES are known without loading torch; TASKS, from names to classes, is made when it is first asked for.
"""

from __future__ import annotations

from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any

from ...registry import classes

if TYPE_CHECKING:
    from ..task import Task

    TASKS: dict[str, type[Task]]

NAMES: tuple[str, ...] = tuple(sorted(m.name.replace("_", "-") for m in iter_modules(__path__)))


def _found() -> dict[str, type[Task]]:
    """The one concrete Task class of every file."""
    from ..task import Task

    kinds = {(cls.kind, cls.__module__): cls for cls in classes(__name__, __path__, Task)}  # type: ignore[type-abstract]
    own = {(name, f"{__name__}.{name.replace('-', '_')}") for name in NAMES}
    assert kinds.keys() == own, f"every file holds the one task of its name, but {sorted(kinds.keys() ^ own)} differ"
    return {name: cls for (name, _), cls in sorted(kinds.items())}


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
