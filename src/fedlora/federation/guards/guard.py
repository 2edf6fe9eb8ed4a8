"""What a guard is: something done to uploads around any method, in a simulation and in a deployment alike.

A guard is a frozen dataclass, like a method. It may act at a client before it sends (`leave`), on the form of the message
(`encode`, `decode`), and at the server before and after the method aggregates (`arrive`, `settle`). What it remembers is
kept like the leaves of a method: a client's with its personal leaves, the server's with the server's.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...arguments import Checked
from ...errors import ConfigError, Problem, UploadError
from ...methods.contract import Client, Method, RoundInfo, ServerState, Upload
from ...tree import Key, Params, cut_rank, rank, rank_axis

STATED = ("rank", "norm")  # parts that state a fact of the other leaves; they are not trained values


@dataclass(frozen=True)
class Place:
    """Where a guard stands. clients: that may take part; expected: of a round, in the mean under Poisson sampling; fresh: whether
    randomness must be secret and new each time (a deployment), instead of a function of the seed."""

    seed: int
    rounds: int
    clients: int
    expected: float
    cohort: Literal["poisson", "everybody", "uniform", "fixed"]
    fresh: bool = False


class Guard(Checked, ABC):
    """Subclasses override what they need; as it stands, a guard changes nothing."""

    name: ClassVar[str]  # in recipes
    title: ClassVar[str]  # in tables
    paper: ClassVar[str] = ""
    remembers: ClassVar[bool] = False  # whether clients keep something from round to round
    encodes: ClassVar[bool] = False  # whether it changes the form of the message; a channel has one such guard at most

    def __post_init__(self) -> None:
        if bad := self.problems():
            raise ConfigError(bad)

    def problems(self) -> list[Problem]:
        """What is wrong with the fields; each names its field alone, e.g. "norm"."""
        return []

    def cannot(self, method: Method) -> str | None:
        """Why this guard cannot serve `method`, as the end of a sentence; None where it can."""
        return None if method.sends else f"{method.title} uploads nothing"

    def beside(self, other: Guard) -> str | None:
        """Why this guard cannot stand beside another one, as a sentence's end; None where it can."""
        return None

    @property
    def withholds(self) -> bool:
        """Whether a run's records may tell nothing of single clients or of their rows."""
        return False

    def placed(self, place: Place) -> Guard:
        """This guard in a run; one that needs no facts of the run is itself."""
        return self

    def opened(
        self, server: ServerState, state: Params, like: Callable[[], Params], weight: Callable[[Upload], float]
    ) -> Guard:
        """This guard for one aggregation; one that carries nothing from `arrive` to `settle` is itself.

        state: what it remembers at the server. like: an upload of this round by a client that has not trained. weight: the
        method's, of an upload.
        """
        return self

    # at the client ----------------------------------------------------------------------------------------------
    def leave(self, up: Params, down: Params, state: Params, info: RoundInfo, client: Client) -> Params:
        """What the client means to send instead of `up`, having received `down`. Leaves have no client axis.

        state: what `remember` gave after the client's last accepted upload, {} before the first.
        """
        return up

    def encode(self, up: Params, down: Params, info: RoundInfo, client: Client) -> Params:
        """The leaves of the message that carries `up`; what is drawn is a function of the round and the client."""
        return up

    def remember(self, meant: Params, arrived: Params, down: Params, state: Params) -> Params:
        """What the client keeps: it received `down`, meant to send `meant`, and the server will read `arrived`."""
        return {}

    # at the server ----------------------------------------------------------------------------------------------
    def decode(self, message: Params, down: Params) -> Params:
        """Inverse of `encode`, for a client that received `down`. Raises UploadError for what `encode` did not make."""
        return message

    def arrive(self, uploads: Iterable[Upload], server: ServerState) -> Iterable[Upload]:
        """What the method aggregates instead of `uploads`. Can stream."""
        return uploads

    def settle(self, new: ServerState, old: ServerState, state: Params) -> tuple[ServerState, Params]:
        """After aggregation: the next server, and what the guard remembers at the server."""
        return new, state


def no_mean(method: Method, why: str) -> str | None:
    """Why a guard that hands the method one mean of all uploads cannot serve it; None where it can. why: what is lost where the
    server is no mean of its clients' leaves."""
    if not method.sends or method.pooled:
        return f"{method.title} has no clients whose uploads are summed"
    if not method.averages:
        return f"the server of {method.title} is no mean of its clients' leaves: {why}"
    return no_change(method)


def no_change(method: Method) -> str | None:
    """Why a guard that looks at changes cannot serve `method`; None where it can."""
    if method.anew:
        return f"clients of {method.title} send adapters that did not come down, so their change has no start to be seen from"
    return None


def change(up: Params, down: Params) -> Params:
    """What a client's work has added to the leaves that it received; stated facts and new leaves are left out.

    A client that has pruned its rank is compared with the leading components of what it received.
    """
    return {k: v - cut_rank(k, down[k], rank(k, v)) if ranked(k) else v - down[k] for k, v in values(up, down).items()}


def values(up: Params, down: Params) -> Params:
    """The real-valued leaves of `up` that came down too."""
    return {k: v for k, v in up.items() if k in down and v.is_floating_point() and k.part not in STATED}


def ranked(k: Key) -> bool:
    """Whether a leaf has a rank axis."""
    return rank_axis(k) is not None


def stated_ranks(p: Params) -> Mapping[tuple[str, str], int]:
    """(adapter, layer) -> the rank that an upload states; layer "" stands for all. Raises UploadError for other things."""
    found = {(k.adapter, k.layer): v for k, v in p.items() if k.part == "rank"}
    for (adapter, layer), v in found.items():
        if v.numel() != 1 or v.is_floating_point():
            raise UploadError(
                f"leaf {Key(adapter, layer, 'rank')} is {list(v.shape)} {v.dtype}, expected one whole number"
            )
    return {at: int(v) for at, v in found.items()}
