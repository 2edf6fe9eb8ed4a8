"""What a run gives back in Python: the numbers of summary.json, its history as a table, and a page's worth of it in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FedloraError
from ..units import NOTHING, number, seconds, size
from .records import EvalLine, TrainLine, read_lines

if TYPE_CHECKING:
    import pandas

VIEWS = {"personal": "each client's own model", "global": "the global model", "unseen": "clients that never trained"}


class MissingPandas(FedloraError):
    """pandas is not installed; everything but tables in Python works without it."""


def pandas_() -> Any:
    """The library of tables. Raises MissingPandas."""
    try:
        import pandas
    except ImportError as e:
        raise MissingPandas(f"no tables: pandas cannot be imported ({e}); pip install pandas") from e
    return pandas


class Summary(dict[str, Any]):
    """summary.json as a dict, with the run's folder and its history.

    summary["test"], summary["views"]["global"]["mean"]; summary.history is a DataFrame.
    """

    def __init__(self, found: Mapping[str, Any], folder: str | Path):
        super().__init__(found)
        self.folder = Path(folder)

    @property
    def history(self) -> pandas.DataFrame:
        """One row for each round of training (split "train": the clients' mean loss, bytes sent up and down in the round) and for
        each evaluation (its view, its split, and the mean over clients of every metric). Raises MissingPandas."""
        rows: list[dict[str, Any]] = []
        for x in read_lines(self.folder):
            if isinstance(x, TrainLine):
                sent = {"bytes_up": x.sent("up"), "bytes_down": x.sent("down")}
                rows.append({"round": x.round, "split": "train", "loss": x.loss, **sent})
            elif isinstance(x, EvalLine) and x.stage is None:
                rows.append({"round": x.round, "split": x.split, "view": x.view, **x.mean})
        return pandas_().DataFrame(rows)

    def __repr__(self) -> str:
        return f"Summary({self['name']}: {self['method']['title']}, {self._score()}, {size(self['bytes']['total'])} sent; {self.folder})"

    def _score(self) -> str:
        if self.get("test") is None:
            return f"{self['rounds']} rounds, no test rows"
        return f"{self['metric']} {number(self['test'])} on test after round {self['chosen_round']} of {self['rounds']}"

    def _repr_html_(self) -> str:
        """A table of the run for a notebook."""
        rows = [
            (f"{self['metric']} on test, {VIEWS.get(view, view)}", number(v["mean"].get(self["metric"])))
            for view, v in self.get("views", {}).items()
        ]
        constant = self.get("constant")
        rows += [("always a client's most frequent class", number(constant))] if constant is not None else []
        rows += [
            ("round", f"{self['chosen_round']} of {self['rounds']}, the best on {self['chosen_on']}"),
            ("trained parameters of a client", f"{self['parameters'].get('trainable', NOTHING):,}"),
            ("sent up and down", f"{size(self['bytes']['up'])} and {size(self['bytes']['down'])}"),
            ("time", seconds(self["seconds"])),
            ("folder", str(self.folder)),
        ]
        body = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in rows)
        caption = html.escape(f"{self['name']}: {self['method']['title']}")
        return f"<table><caption>{caption}</caption><tbody>{body}</tbody></table>"
