"""Reports: one HTML file for a run or a comparison. Nothing is fetched from a network when it is opened.

A page holds the plotting library (4.8 MB) itself, unless `beside` names a folder: then one copy lies there for all the pages of a
sweep, which name it by its relative path.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..errors import FedloraError, StateError
from ..files import sealed
from . import budgets
from .budgets import Quantity
from .read import records
from .tables import compare_rows

if TYPE_CHECKING:
    from ..bench.examples import Course


SEARCH = "search.json"  # in a sweep's folder: what the search of its hyperparameters has tried


class MissingPlotly(FedloraError):
    """The plotting library is not installed; everything but the pages works without it."""


def write_run(folder: str | Path, out: str | Path | None = None, beside: Path | None = None) -> Path:
    """Write the report of a run folder to `out` (default: report.html in it); returns where it is.

    beside: the folder of the plotting library's one copy; in the page itself by default.

    Raises MissingPlotly, and StateError for a folder that holds no run.
    """
    from .page import run_page

    run = records(folder)
    need_plotly()
    return write_page(run_page(run), Path(out) if out else Path(folder) / "report.html", beside)


def write_comparison(
    folders: Sequence[str | Path], out: str | Path, beside: Path | None = None, equal: Quantity | None = None
) -> Path:
    """Write the comparison of run folders to `out`; returns it. beside and errors as of write_run. equal: what the runs are cut at
    (report/budgets.py)."""
    from .comparison import at_equal_rows, comparison_page

    runs = [records(f) for f in folders]
    if len({r.metric for r in runs}) > 1:
        kinds = ", ".join(sorted({f"{r.metric} ({r.name})" for r in runs}))
        raise StateError(f"compare: the runs are scored differently: {kinds}; compare runs of one task")
    need_plotly()
    search = sealed.read(beside / SEARCH) if beside is not None else None
    budget = None
    more = at_equal_rows(runs) if equal != "rows" else None
    if equal is not None:
        runs, least = budgets.equal(runs, equal)
        budget = (equal, least)
    return write_page(comparison_page(runs, compare_rows(runs), search, budget, more), Path(out), beside)


def write_example(found: Sequence[Course], out: str | Path, seed: int = 0) -> Path:
    """Write the page of PF2LoRA's synthetic example to `out`; returns it. Raises MissingPlotly."""
    from ..bench.examples import CLIENTS, RANKS
    from .page import example_page

    need_plotly()
    return write_page(example_page(found, dict(zip(CLIENTS, RANKS, strict=True)), seed), Path(out))


def need_plotly() -> None:
    """Raise MissingPlotly where a page cannot be drawn."""
    lost = [m for m in ("plotly", "jinja2") if find_spec(m) is None]
    if lost:
        raise MissingPlotly(
            f"no HTML report: {' and '.join(lost)} not installed; pip install 'fedlora[report]', then `fedlora report FOLDER`"
        )


def write_page(page: dict[str, Any], out: Path, beside: Path | None = None) -> Path:
    """Write a page (title, lead, note, tiles and blocks, see page.py) to `out`; returns it. beside: as of write_run."""
    from plotly.offline import get_plotlyjs, get_plotlyjs_version

    library = beside / f"plotly-{get_plotlyjs_version()}.min.js" if _drawn(page) and beside else None
    script = get_plotlyjs() if _drawn(page) and not library else ""
    link = quote(os.path.relpath(library, out.parent).replace(os.sep, "/")) if library else ""
    html = html_of(page, script, link)
    if library and not library.exists():
        _put(get_plotlyjs(), library)
    return _put(html, out)


def _drawn(page: Mapping[str, Any]) -> bool:
    return any(b.figure is not None for b in page["blocks"])


def html_of(page: dict[str, Any], script: str = "", link: str = "", live: str = "") -> str:
    """A page as HTML. script, link: the plotting library, or where it is; live: what changes when the page is out of date, for one
    that asks for it (live.py)."""
    from importlib.metadata import version
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    from .figures import FONT

    count = iter(range(10_000))
    config = json.dumps(
        {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d"]}
    )

    def draw(figure: Any) -> str:
        """A figure's data as JSON in the page. "</" is escaped, since a client's name could otherwise end the script."""
        id, data = f"figure-{next(count)}", figure.to_json().replace("</", "<\\/").replace("<!--", "<\\u0021--")
        height = figure.layout.height
        return (
            f'<div id="{id}" style="height:{height}px"></div>'
            f"<script>{{const f={data};drawn({id!r},f);Plotly.newPlot({id!r},f.data,f.layout,{config});}}</script>"
        )

    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(
        (files("fedlora.report") / "page.html").read_text(encoding="utf-8")
    )
    return template.render(
        page=page, font=FONT, script=script, link=link, draw=draw, version=version("fedlora"), live=live
    )


def _put(text: str, out: Path) -> Path:
    """Write a file whole or not at all."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out)
    except OSError as e:
        raise StateError(f"{out}: cannot be written: {e.strerror}; give another file with --output") from e
    return out
