"""What the headers of packets may say. Both sides parse every packet here, strictly, before anything else sees it.

Strict means: no conversion between types, every number within its range, and a limit to every length and depth. Entries that
nobody reads are passed over. What one client of a site claims (its losses, its scores) is parsed client by client, so that
one of them cannot spoil the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from ..errors import UploadError, printable

Split = Literal["train", "validation", "test"]
MOST_CLIENTS = 10_000  # clients that one site may hold
LONGEST_ID = 200  # characters of a client's id
MOST_ROWS = 10**9  # rows in one split of one client
MOST_ROUNDS = 10**6
MOST_TOKENS = 10**15
LARGEST = 1e15  # magnitude of a loss; larger ones say nothing
DEEPEST = 24  # levels of a recipe
LONGEST_JSON = 2**24  # bytes of a header


class PacketError(UploadError):
    """A packet that is not what it should be. Its text names the dotted place in the header, if there is one."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("only printable characters")
    return text


def _finite(value: float) -> float:
    if not math.isfinite(value) or abs(value) > LARGEST:
        raise ValueError(f"a finite number of at most {LARGEST:.0e}")
    return value


def _shallow(value: dict[str, Any]) -> dict[str, Any]:
    level, todo = 0, list[Any]([value])
    while todo:
        level += 1
        if level > DEEPEST:
            raise ValueError(f"at most {DEEPEST} levels")
        todo = [
            inner
            for outer in todo
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return value


Id = Annotated[str, Field(min_length=1, max_length=LONGEST_ID), AfterValidator(_printable)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@~-]{1,64}$")]  # characters of the name of a metric or a view
Fingerprint = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
RunId = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{1,64}$")]
Round = Annotated[int, Field(ge=0, le=MOST_ROUNDS)]
Count = Annotated[int, Field(ge=0, le=MOST_ROWS)]
Finite = Annotated[float, AfterValidator(_finite)]
Counts = Annotated[list[Count], Field(max_length=100_000, fail_fast=True)]
Clients = Annotated[dict[Id, Any], Field(min_length=1, max_length=MOST_CLIENTS)]


class Said(BaseModel):
    """Immutable and strict; entries that nobody reads are passed over."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


# orders of a server ------------------------------------------------------------------------------------------------
class JoinOrder(Said):
    """Says what a site should tell of itself."""

    run: RunId
    round: Round
    recipe: Annotated[dict[str, Any], AfterValidator(_shallow)]
    histograms: bool = False


class WorkOrder(Said):
    """Asks clients to train round `round` (0-based) of `rounds`, or to evaluate after `round` rounds. clients: id -> the round
    of its last accepted upload, or None."""

    run: RunId
    round: Round
    rounds: Round
    recipe: Annotated[dict[str, Any], AfterValidator(_shallow)]
    clients: Annotated[dict[Id, Round | None], Field(min_length=1, max_length=MOST_CLIENTS)]


# replies of a site -------------------------------------------------------------------------------------------------
class Reply(Said):
    """What every reply that does what was asked names."""

    run: RunId
    round: Round
    protocol: Count


class Facts(Said):
    """Rows of a client in each split. histogram: split -> rows of each class."""

    train: Annotated[int, Field(ge=1, le=MOST_ROWS)]
    validation: Count = 0
    test: Count = 0
    histogram: Annotated[dict[Split, Counts], Field(max_length=3)] | None = None

    def sizes(self) -> dict[Split, int]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


class Joined(Reply):
    """base: `pretrained.fingerprint` of the site's base."""

    base: Fingerprint
    clients: Annotated[dict[Id, Facts], Field(min_length=1, max_length=MOST_CLIENTS)]


class Trained(Reply):
    """clients: id -> what `Done` parses."""

    clients: Clients


class Losses(Said):
    """A loss is NaN where the site's policy lets none out."""

    loss: Finite = math.nan


class Done(Said):
    """What a client says of a round beside its upload. tokens: 0 where the site's policy lets no number out."""

    examples: Count
    tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    metrics: Losses


class Line(Said):
    """Scores of one view and split. clients: id -> what `claims.scores` parses."""

    view: Name
    split: Split
    clients: Annotated[dict[Id, Any], Field(max_length=MOST_CLIENTS)]


class Scores(Said):
    """n (rows), and a number for each metric."""

    scores: Annotated[dict[Name, int | float], Field(max_length=32)]


class Evaluated(Reply):
    lines: Annotated[list[Line], Field(max_length=64, fail_fast=True)]


class Failure(Said):
    """Why a site cannot do what was asked, as `refusal.told` writes it and `refusal.heard` reads it."""

    code: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_.-]{0,63}$")]
    field: Annotated[str, Field(max_length=256)] | None
    text: Annotated[str, Field(max_length=10_000)]


class Envelope(Said):
    """The JSON that carries a packet's kind and header, and names its parts in their order."""

    kind: Literal["join", "train", "evaluate"]
    header: dict[str, Any]
    parts: Annotated[
        list[Annotated[str, Field(max_length=LONGEST_ID)]], Field(max_length=MOST_CLIENTS + 1, fail_fast=True)
    ]


# reading -----------------------------------------------------------------------------------------------------------
T = TypeVar("T", bound=BaseModel)
PARTS: TypeAdapter[dict[str, bytes]] = TypeAdapter(
    dict[Annotated[str, Field(max_length=LONGEST_ID)], bytes], config=ConfigDict(strict=True)
)


def parsed(model: type[T], value: object, what: str) -> T:
    """The value as `model`. what: whose it is, for the sentence. Raises PacketError that names the first field at fault."""
    try:
        return model.model_validate(dict(value) if isinstance(value, Mapping) else value)
    except ValidationError as e:
        raise _refused(e, what) from None


def parts(value: object, what: str) -> dict[str, bytes]:
    """Encoded messages by client id. Raises PacketError."""
    try:
        return PARTS.validate_python(dict(value) if isinstance(value, Mapping) else value)
    except ValidationError as e:
        raise _refused(e, f"{what}, leaves") from None


def json_of(text: object, what: str) -> Any:
    """A JSON value of bounded size and depth. Raises PacketError."""
    if not isinstance(text, str) or len(text) > LONGEST_JSON:
        raise PacketError(f"{what}: {shown(text)}, expected at most {LONGEST_JSON} characters of JSON")
    try:
        return from_json(text)
    except ValueError as e:
        raise PacketError(f"{what}: no JSON that can be read ({e})") from None


def same(header: Mapping[str, Any], **expected: Any) -> None:
    """Refuse a header that is not of this run and round. Raises PacketError. 0.0 and False are no round 0."""
    for name, want in expected.items():
        got = header.get(name)
        if type(got) is not type(want) or got != want:
            raise PacketError(
                f"message is of {name} {shown(got)}, expected {want!r}: it was sent again or belongs to another run"
            )


def _refused(e: ValidationError, what: str) -> PacketError:
    first = e.errors(include_url=False, include_context=False)[0]
    field = printable(".".join(str(x)[:64] for x in first["loc"]), 200)
    wanted = first["msg"].removeprefix("Value error, ")
    got = "missing" if first["type"] == "missing" else shown(first["input"])
    return PacketError(f"{what}: {field or 'all of it'} is {got}: {wanted}")


def shown(value: object) -> str:
    """A foreign value in a sentence of ours: short, on one line, and without looking into what it holds."""
    if isinstance(value, str):
        return repr(value[:60]) + ("..." if len(value) > 60 else "")
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return f"a whole number of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (Mapping, list, tuple, bytes)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def reason(e: Exception) -> str:
    """Why something of a peer was refused, in one line, whatever went wrong with it."""
    if isinstance(e, UploadError):
        return printable(e)
    return f"it cannot be used ({type(e).__name__}); the two sides may have different versions of fedlora"
