"""What a run was started with: the command, and the commit of the folder it was started in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath, PureWindowsPath

from ..data.addresses import hidden, scheme

LONGEST = 2000  # characters of a command


def command(arguments: Sequence[str] | None = None) -> str | None:
    """The command line without folders of this machine and without passwords; None in a notebook, which has none."""
    import shlex

    program, *rest = sys.argv if arguments is None else arguments
    if not program or "ipykernel" in program or program == "-c":
        return None
    said = shlex.join([PurePath(program).name.removesuffix(".exe"), *map(_shown, rest)])
    return said if len(said) <= LONGEST else said[: LONGEST - 3] + "..."


def _shown(argument: str) -> str:
    """An argument as a page may show it, which is given to others."""
    name, sign, value = argument.partition("=")
    value = value if sign else name
    if "://" in value and scheme(value) is not None:
        value = hidden(value)
    elif value.startswith(("/", "~")) or PureWindowsPath(value).is_absolute():
        value = "/".join(value.rstrip("/\\").replace("\\", "/").split("/")[-2:])
    return f"{name}={value}" if sign else value


def commit(folder: Path | None = None) -> str | None:
    """The git commit of a folder, by default the one we are in, and whether files of it have changed since; None where there is
    no repository or no git."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "--no-optional-locks", *words],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=5,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    at = git("rev-parse", "HEAD")
    if at is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no")
    return at + (", with changes that are not committed" if changed else "")
