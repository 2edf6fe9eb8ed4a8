"""What `fedlora cache` does."""

from __future__ import annotations

import json as json_
import sys

from ..errors import StateError
from ..files import cache
from ..units import seconds, size
from .actions import out
from .tables import _table


def show(clear: bool, json: bool) -> None:
    """List the files of the user's cache, or delete them."""
    place = cache.folder()
    if place is None:
        out.print("the cache is off: nothing is kept (FEDLORA_CACHE)", highlight=False)
        return
    try:
        found = cache.clear() if clear else cache.entries()
    except OSError as e:
        raise StateError(f"{e.filename}: cannot be deleted: {e.strerror}; delete it yourself") from e
    total = size(sum(e.size for e in found))
    if json:
        files = [{"kind": e.kind, "file": str(e.path), "bytes": e.size, "age_seconds": e.age} for e in found]
        sys.stdout.write(json_.dumps({"folder": str(place), "cleared": clear, "files": files}) + "\n")
    elif clear:
        out.print(f"{place}: {len(found)} files deleted, {total}", soft_wrap=True, highlight=False)
    else:
        # A table's title would be broken to the table's width, and a folder's name with it.
        out.print(f"{place}: {len(found)} files, {total}", soft_wrap=True, highlight=False)
        shown = _table("", "kind", "size", "age", "file")
        for entry in found:
            shown.add_row(entry.kind, size(entry.size), seconds(entry.age), entry.path.name)
        out.print(shown)
