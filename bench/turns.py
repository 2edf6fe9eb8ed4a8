"""Systems that do the same rounds in turn, so that a busy machine is busy for all; paired.py and kernels.py share it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from fedlora.bench.systems import System
from fedlora.bench.work import Work, tokens
from fedlora.federation.memory import kept


def take_turns(
    work: Work, systems: Mapping[str, System], warm: int, rounds: int, clock: Callable[[], float], second: str
) -> None:
    """Print each system's speed in the last round, and over the first system's: the median of the pairs (least-most).

    warm: rounds before those that are measured. clock: seconds; second: what one of them is called.
    """
    seconds: dict[str, list[float]] = {n: [] for n in systems}
    with kept():
        for r in range(warm + rounds):
            batches = work.batches(r)
            for n, system in systems.items():
                start = clock()
                system.round(batches)
                seconds[n].append(clock() - start)
    reference = seconds[next(iter(systems))]
    for n, mine in seconds.items():
        ratios = sorted(a / b for a, b in zip(reference[warm:], mine[warm:], strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(
            f"{n:20}{tokens(batches) / mine[-1]:8,.0f} tokens/{second} in the last round, {spread} x the first",
            flush=True,
        )
