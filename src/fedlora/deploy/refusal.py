"""Why a site did not do what was asked, as the server is told it: a code, a field and a fixed sentence.

What went wrong in particular (a value, a column, a path, a row) is written into the site's own log and never sent: a server
that chooses what a site tries could otherwise read its data from what fails.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError, DataError, FedloraError, ModelError, StateError, TrainingError, UploadError, printable
from ..federation.engine import out_of_memory
from ..recipe.hyperparameters import own_fields, table
from ..recipe.sections import SECTIONS

REASONS = {
    "order": "the order is malformed, of another version or of another run",
    "policy": "the order asks for more than this site's policy allows",
    "consent": "the operator of this site has not accepted this recipe",
    "limit": "this site has done as much for this run, or today, as its policy allows",
    "rows": "this site has fewer rows than its policy asks for behind an upload",
    "recipe": "the recipe does not fit this site",
    "data": "this site's data do not fit this field of the recipe",
    "model": "this site cannot load the model",
    "base": "this site's base has other weights than its policy names",
    "leaves": "the upload would hold more than this site's policy lets out",
    "state": "this site's personal leaves or its run folder are missing or damaged",
    "disk": "this site cannot write: the disk is full or not its own",
    "memory": "this site ran out of memory; give it fewer clients at once, or ask for less",
    "time": "the order took longer than this site's policy allows",
    "training": "training at this site did not end with finite numbers",
    "failure": "something unexpected went wrong at this site",
}


class Refusal(FedloraError):
    """An order that a site will not do. code: one of REASONS. field: of the recipe. text: particulars for the site's log."""

    def __init__(self, code: str, text: str, field: str | None = None):
        assert code in REASONS
        super().__init__(text)
        self.code, self.field = code, field


def told(e: BaseException) -> dict[str, str | None]:
    """What the server learns of an error: nothing that the error itself says."""
    code, field = _classified(e)
    return {"code": code, "field": field if field in known_fields() else None, "text": REASONS[code]}


def _classified(e: BaseException) -> tuple[str, str | None]:
    if isinstance(e, Refusal):
        return e.code, e.field
    if isinstance(e, ConfigError):
        field = e.problems[0].field if e.problems else ""
        section = field.partition(".")[0]
        return {"data": "data", "partition": "data", "model": "model"}.get(section, "recipe"), field
    causes = list(_causes(e))
    if any(out_of_memory(c) for c in causes if isinstance(c, (MemoryError, RuntimeError))):
        return "memory", None
    if any(
        isinstance(c, OSError) and c.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT) for c in causes
    ):
        return "disk", None
    kinds = {
        DataError: "data",
        ModelError: "model",
        StateError: "state",
        UploadError: "order",
        TrainingError: "training",
    }
    return next((code for kind, code in kinds.items() if isinstance(e, kind)), "failure"), None


def _causes(e: BaseException | None) -> Iterable[BaseException]:
    while e is not None:
        yield e
        e = e.__cause__


def known_fields() -> frozenset[str]:
    """The fields that a recipe can have: what an error calls a field may hold anything, and only these names are sent."""
    own = {f"{s}.{f}" for s, kind in SECTIONS.items() for f in kind.model_fields}
    return frozenset(
        own
        | SECTIONS.keys()
        | {"method", "method.name", "name"}
        | {f"method.{f}" for m in table().values() for f in own_fields(m)}
    )


def heard(error: Mapping[str, Any]) -> str:
    """A site's refusal, parsed as `schema.Failure`, as the server prints it: the sentence of a code that is known here."""
    code, field = printable(error.get("code"), 40), error.get("field")
    text = REASONS.get(code) or printable(error.get("text") or "no reason given", 200)
    return f"{text} ({code}{', ' + printable(field, 80) if field else ''})"
