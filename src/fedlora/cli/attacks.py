"""What `fedlora attack` does."""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from ..federation.store import Which
from ..units import NOTHING, number
from .actions import err, opened, out
from .tables import _spent, _table


def attack(
    folder: Path, kind: Literal["membership", "inversion", "both"], rows: int, trials: int, batches: Sequence[int],
    steps: Sequence[int], json: bool, which: Which,
) -> None:  # fmt: skip
    """Run the attacks on a run folder and show what they got."""
    from ..data.examples import Tokens
    from ..files import sealed
    from ..serving.attacks.inversion import inversion
    from ..serving.attacks.membership import membership

    _, fed = opened(folder)
    spent = _spent((sealed.read(folder / "summary.json") or {}).get("privacy"))
    if kind != "inversion":
        with err.status("membership inference"):
            found = membership(fed, which, rows=rows)
        if json:
            sys.stdout.write("".join(json_.dumps({"kind": "membership", **asdict(f)}) + "\n" for f in found))
        else:
            table = _table(
                f"membership: was this row trained on?{spent}",
                "attack",
                "model",
                "advantage",
                "95 %",
                "AUC",
                "at 1 %",
                fed.task.metric,
            )
            for f in found:
                score = NOTHING if f.accuracy is None else number(f.accuracy)
                table.add_row(
                    f.attack,
                    f.model,
                    f"{f.advantage:.3f}",
                    f"{f.low:.3f} to {f.high:.3f}",
                    f"{f.auc:.3f}",
                    f"{f.at_1:.3f}",
                    score,
                )
            table.caption, table.caption_justify = f"{found[0].members:,} members, {found[0].others:,} others", "left"
            out.print(table)
    if kind == "inversion" or (kind == "both" and isinstance(fed.data.examples, Tokens) and fed.method.sends):
        with err.status("gradient inversion"):
            read = inversion(fed, which, batches, steps, trials)
        if json:
            sys.stdout.write("".join(json_.dumps({"kind": "inversion", **asdict(r)}) + "\n" for r in read))
        else:
            table = _table(
                "inversion: words named rightly, as a share",
                "rows a step",
                "steps",
                "seen",
                "named",
                "95 %",
                "by guessing",
            )
            for r in read:
                table.add_row(
                    str(r.batch),
                    str(r.steps),
                    r.seen,
                    f"{r.share:.3f}",
                    f"{r.low:.3f} to {r.high:.3f}",
                    f"{r.guessed:.3f}",
                )
            out.print(table)
