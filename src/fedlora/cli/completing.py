"""What the shell proposes after a Tab: fields, methods, runs and clients."""

from __future__ import annotations

from pathlib import Path

import typer

from ..errors import FedloraError


def sets(incomplete: str) -> list[str]:
    """Fields of --set; after method.name= the methods."""
    from ..recipe.hyperparameters import table
    from ..recipe.overrides import paths

    path, equals, _ = incomplete.partition("=")
    if equals:
        found = [f"{path}={m}" for m in table()] if path == "method.name" else []
    else:
        found = [f"{p}=" for p in paths()]
    return [f for f in found if f.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Run folders below the folder that is being typed, or below runs/."""
    from .listing import runs_in

    typed = Path(incomplete or "runs")
    root = typed if typed.is_dir() else typed.parent
    try:
        found = [str(r) for r in runs_in(root)] if root.is_dir() else []
    except OSError:
        found = []
    return [f for f in found if f.startswith(incomplete)]


def clients(context: typer.Context, incomplete: str) -> list[str]:
    """Clients of the run that is named before."""
    from ..files import sealed

    # An option that still waits for its value ends click's parsing early: the folder is then among the words left over.
    folder = context.params.get("folder") or next((a for a in context.args if not a.startswith("-")), None)
    try:
        known = (sealed.read(Path(folder) / "partition.json") or {}) if folder else {}
    except FedloraError:
        known = {}
    return [c for c in known.get("ids", []) if c.startswith(incomplete)]
