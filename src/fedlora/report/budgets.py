"""Runs cut where they have used equally much, so that a score at equal work, bytes or time can be read off longer runs.

A method that draws four minibatches a step sees four times the rows of one that draws one; a method whose messages are half as
large may have twice the rounds. `equal` takes the smallest total that a run of the comparison has used, per client, and reads every
run up to its last round within that total. The round is then chosen among those, on validation, as in any run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from ..errors import StateError
from .read import Records

Quantity = Literal["steps", "rows", "tokens", "bytes", "seconds"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)


def used(run: Records, what: Quantity) -> dict[int, float] | None:
    """What a client of a run has used on average up to each round, from round 0; None where the run does not know.

    Totals are divided by all clients that train, whether they took part or not. seconds: of training, on the machine that ran it.
    """
    clients = max(_clients(run), 1)
    if what == "bytes":
        return {r: n / clients for r, n in run.bytes_by_round().items()}
    each = {t.round: t.train_seconds if what == "seconds" else float(getattr(t, what)) for t in run.timings}
    if not any(each.values()):
        return None
    out, total = {0: 0.0}, 0.0
    for r in sorted(each):
        total += each[r] / clients
        out[r] = total
    return out


def equal(runs: Sequence[Records], what: Quantity) -> tuple[list[Records], float]:
    """The runs, each up to its last round within the smallest total of all; and that total, for a client.

    Raises StateError for a run that does not know what it has used, and for one that has no evaluated round so early.
    """
    found = [used(r, what) for r in runs]
    if lost := [r.name for r, u in zip(runs, found, strict=True) if u is None]:
        raise StateError(
            f"--equal {what}: {lost[0]} has not recorded its {what} (a deployment, or an older run); choose bytes, or run it again"
        )
    known = [u for u in found if u is not None]
    budget = min(max(u.values()) for u in known)
    out = []
    for r, u in zip(runs, known, strict=True):
        last = max(k for k, n in u.items() if n <= budget * (1 + 1e-9))
        if not any(x.round and x.round <= last for x in r.evals(r.main)):
            first = min((x.round for x in r.evals(r.main) if x.round), default=0)
            raise StateError(
                f"--equal {what}: {r.name} is first evaluated in round {first}, which is past {budget:,.0f} {what} a client; set "
                "evaluation.every to less, or give the others more rounds"
            )
        out.append(until(r, last))
    return out, budget


def until(run: Records, last: int) -> Records:
    """The run as if it had ended after round `last`: its choice of the round, its scores and its costs."""
    from ..federation.summary import costs, outcome
    from ..training.tasks import TASKS

    lines = [x for x in run.lines if x.round <= last]
    timings = [t for t in run.timings if t.round <= last]
    cut = replace(run, lines=lines, timings=timings)
    if run.summary is None:
        return cut
    lower = TASKS[run.summary["task"]].lower if run.summary.get("task") in TASKS else frozenset({"loss"})
    own = outcome(lines, run.metric, lower) | costs(lines, timings) | {"rounds": last}
    return replace(cut, summary=run.summary | own)


def _clients(run: Records) -> int:
    """Clients that train."""
    return len(run.partition.get("ids", ())) - int(run.partition.get("unseen", 0))
