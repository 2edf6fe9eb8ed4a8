"""`python -m fedlora` is the command `fedlora`."""

from .cli import entry

entry()
