"""The one road between a server and its clients: what leaves go through on their way, and the bytes they take.

Every runtime sends by it: the engine, a site and its server, a Flower strategy, and `fedlora check`, which only measures.

    server   down     what a client receives, rounded to the messages' precision
    client   up       what it sends: through every guard, then rounded; and what its guards keep
    server   read     an upload as leaves again; refused unless it is what the method declares
             aggregate   through every guard, around the method's own rule
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..errors import ConfigError, Problem
from ..methods.contract import Client, Context, Method, RoundInfo, ServerState, Upload
from ..tree import GUARD, Params, cut_rank, rank, rank_axis, stack, unstack
from . import wire
from .guards.guard import Guard


@dataclass(frozen=True)
class Sent:
    """A message. message: leaves as they travel; params: leaves as the other side reads them, in float32."""

    message: Params
    params: Params
    header: Mapping[str, int]
    kept: Params = field(default_factory=dict)  # state of the sender's guards, stored beside its personal leaves

    @property
    def traffic(self) -> wire.Traffic:
        """Bytes of the encoded message, which is not made for it."""
        return wire.measure(self.message, wire.size(self.message, self.header))

    def encode(self) -> bytes:
        """The message as bytes."""
        return wire.encode(self.message, self.header)


@dataclass(frozen=True)
class Channel:
    """precision: of the messages. norm_bound: an upload whose leaves together have a larger norm is refused. guards: in the
    order in which a client applies them; the server applies its halves from the last to the first.

    Raises ConfigError for guards that do not fit together.
    """

    precision: wire.Precision = "fp32"
    norm_bound: float | None = None
    guards: Sequence[Guard] = ()

    def __post_init__(self) -> None:
        if bad := together(self.guards):
            raise ConfigError(bad)

    @property
    def remembers(self) -> bool:
        """Whether clients keep something for their guards from round to round."""
        return any(g.remembers for g in self.guards)

    # server to client -------------------------------------------------------------------------------------------
    def down(self, p: Params, info: RoundInfo) -> Sent:
        """A broadcast. p: leaves without client axis."""
        message = wire.pack(p, self.precision)
        return Sent(message, wire.unpack(message), {"round": info.round, "rounds": info.rounds})

    # client to server -------------------------------------------------------------------------------------------
    def up(self, p: Params, down: Params, kept: Params, info: RoundInfo, client: Client) -> Sent:
        """An upload. p: the method's; down: what the client received; kept: what its guards kept, {} before the first."""
        before: dict[str, Params] = {g.name: {} for g in self.guards}
        for k, v in kept.items():
            adapter, _, guard = k.adapter.partition(GUARD)
            before.setdefault(guard, {})[k._replace(adapter=adapter)] = v
        meant: dict[str, Params] = {}
        for g in self.guards:
            p = meant[g.name] = g.leave(p, down, before[g.name], info, client)
        message = wire.pack(self.encoded(p, down, info, client), self.precision)
        arrived = self.opened(message, down)
        after = {
            k._replace(adapter=f"{k.adapter}{GUARD}{g.name}"): v
            for g in self.guards
            if g.remembers
            for k, v in g.remember(meant[g.name], arrived, down, before[g.name]).items()
        }
        return Sent(message, arrived, {"round": info.round, "examples": client.examples}, after)

    def encoded(self, p: Params, down: Params, info: RoundInfo, client: Client) -> Params:
        """Leaves in the form in which the guards let them travel."""
        for g in self.guards:
            if g.encodes:
                p = g.encode(p, down, info, client)
        return p

    def opened(self, message: Params, down: Params) -> Params:
        """Inverse of pack and encode: the leaves of a message from a client that received `down`. Raises UploadError."""
        p = wire.unpack(message, self.precision)
        for g in reversed(self.guards):
            if g.encodes:
                p = g.decode(p, down)
        return p

    def read(self, message: Params, down: Params, spec: wire.Spec) -> Params:
        """The leaves of an upload. Raises UploadError unless they are what was declared."""
        return self.accept(self.opened(message, down), spec)

    def accept(self, p: Params, spec: wire.Spec) -> Params:
        """Leaves that are what was declared. Raises UploadError for others."""
        prunes = any(k.part == "rank" for k in spec)  # the method lets clients lower their rank
        wire.validate(p, spec, self.norm_bound, ranks_may_shrink=prunes)
        return p

    # server -----------------------------------------------------------------------------------------------------
    def aggregate(
        self, method: Method, context: Context, server: ServerState, uploads: Iterable[Upload]
    ) -> ServerState:
        """The next server, through every guard."""

        def like() -> Params:
            info, nobody = RoundInfo(server.round, server.round + 1), Client("", 1)
            return first_upload(method, context, info, method.broadcast(context, server, nobody), nobody)

        remembered = {g.name: remembered_by(g, server.guards) for g in self.guards}
        guards = [g.opened(server, remembered[g.name], like, method.weight) for g in self.guards]
        for g in reversed(guards):
            uploads = g.arrive(uploads, server)
        new = method.aggregate(context, server, uploads)
        states: Params = {}
        for g in reversed(guards):
            new, mine = g.settle(new, server, remembered[g.name])
            states |= {k._replace(adapter=f"{k.adapter}{GUARD}{g.name}"): v for k, v in mine.items()}
        return replace(new, guards=states)

    def advance(self, method: Method, context: Context, server: ServerState) -> ServerState:
        """The method's change of stage, if one is due; the same object where there is none."""
        new = method.advance(context, server)
        return new if new is server else replace(new, guards=server.guards)


def remembered_by(g: Guard, states: Params) -> Params:
    """What a guard remembers at the server, of what all guards do."""
    end = GUARD + g.name
    return {k._replace(adapter=k.adapter.removesuffix(end)): v for k, v in states.items() if k.adapter.endswith(end)}


def together(guards: Sequence[Guard]) -> list[Problem]:
    """What is wrong with a list of guards: one named twice, or two that change the form of the message."""
    names = [g.name for g in guards]
    bad = []
    if len(set(names)) < len(names):
        bad.append(Problem("federation.guards", names, "each guard once", "drop the repetition"))
    elif len(forms := [g.name for g in guards if g.encodes]) > 1:
        expected = "one guard at most that changes the form of the message"
        bad.append(Problem("federation.guards", forms, expected, "drop all but one"))
    for g in guards:
        for other in guards:
            if other is not g and (why := g.beside(other)):
                expected = f"a guard that can stand beside {g.name}"
                bad.append(Problem("federation.guards", other.name, expected, f"{why}: drop one of the two"))
    return bad


def unserved(guards: Sequence[Guard], method: Method) -> list[Problem]:
    """The guards that cannot serve a method, each with its reason."""
    return [
        Problem("federation.guards", g.name, f"guards that can serve {method.name}", f"{why}: drop {g.name}")
        for g in guards
        if (why := g.cannot(method))
    ]


class Declared:
    """What clients of one round upload: names, shapes and types, from the method itself.

    A method whose broadcast does not depend on the client is asked once; else once for each set of shapes and ranks that comes
    down.
    """

    def __init__(self, method: Method, context: Context, info: RoundInfo):
        self.method, self.context, self.order = method, context, info
        self._known: dict[object, wire.Spec] = {}

    def __call__(self, down: Params, client: Client) -> wire.Spec:
        """What the client that received `down` uploads."""
        at = (
            tuple((k, v.shape, int(v) if k.part == "rank" else 0) for k, v in down.items())
            if self.method.per_client
            else None
        )
        if at not in self._known:
            self._known[at] = wire.expect(first_upload(self.method, self.context, self.order, down, client))
        return self._known[at]


def first_upload(method: Method, context: Context, info: RoundInfo, down: Params, client: Client) -> Params:
    """The upload of a client that has received `down` and has not trained: leaves as in every upload, values as received."""
    ranks = {(k.adapter, k.layer): rank(k, v) for k, v in down.items() if rank_axis(k) is not None}
    # A client that has pruned the half it receives has pruned its own.
    kept = {
        k: cut_rank(k, v, ranks.get((k.adapter.partition("~")[0], k.layer), rank(k, v)))
        for k, v in method.keep(context, client).items()
    }
    up, _ = method.finish(method.begin(context, info, stack([down]), stack([kept])))
    return unstack(up, 1)[0]
