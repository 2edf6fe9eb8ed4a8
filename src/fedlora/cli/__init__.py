"""The command `fedlora`. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import sys
from typing import TextIO


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 fine, 1 failed, 2 bad input, 130 interrupted."""
    import warnings

    import click

    from ..errors import FedloraError
    from .sites import app  # importing sites adds its commands to those of app.py

    code: object = 0
    try:
        warnings.showwarning = _warned
        code = app(args=argv, standalone_mode=False, prog_name="fedlora")
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as e:
        e.show()
        code = 2
    except click.exceptions.Exit as e:
        code = e.exit_code
    except FedloraError as e:
        _say(str(e))
        code = e.exit_code
    except KeyboardInterrupt:
        _say("interrupted")
        code = 130
    except BrokenPipeError:  # the program that reads our output (head, less) has ended
        sys.stderr.close()
        code = 0
    return code if isinstance(code, int) else 0


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of ours is for the user and needs no line of code; others (libraries') look as ever."""
    import warnings

    if category is UserWarning and "fedlora" in filename:
        _say(str(message), "warning", "bold yellow")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def _say(text: str, what: str = "error", style: str = "bold red") -> None:
    from rich.console import Console
    from rich.text import Text

    from ..errors import printable

    # The message may quote what another machine has sent.
    shown = "\n".join(printable(line, 10**6) for line in text.split("\n"))
    Console(stderr=True).print(Text(f"{what}: ", style=style) + Text(shown), soft_wrap=True)


def entry() -> None:
    """Console script."""
    sys.exit(main())
