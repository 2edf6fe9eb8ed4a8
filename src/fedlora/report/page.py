"""Pages: what stands on them and in which order. HTML comes from page.html, escaped by jinja2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import TYPE_CHECKING, Any

import yaml

from ..federation.records import SamplesLine
from ..units import NOTHING, number, seconds, size
from . import figures, races
from .read import Records
from .tables import choice

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from ..bench.examples import Course


MOST_SHOWN = 400  # characters of a generated text


@dataclass(frozen=True)
class Tile:
    """A number in large type at the top of a page, with its name and a note."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Block:
    """A titled part of a page: text, then a picture, a table or preformatted text. wide: takes the whole line."""

    title: str
    text: str = ""
    figure: go.Figure | None = None
    table: Sequence[Sequence[str]] = ()  # the first row holds the headings
    code: str = ""
    wide: bool = False
    folded: bool = False


def run_page(run: Records) -> dict[str, Any]:
    """Title, tiles and blocks of one run."""
    s, m = run.summary, figures.words(run.metric)
    done = run.trains[-1].round if run.trains else 0
    model, data = run.recipe.get("model", {}), run.recipe.get("data", {})
    lead = f"{run.title} on {source(data)} with {short(model['name'])}" if model else run.title
    lead += f": {len(run.partition.get('ids', []))} clients, {done} rounds."
    if cut := run.partition.get("truncated"):
        lead += f" {cut:,} rows were longer than {data.get('max_length', '?')} tokens and were cut."
    sample = next((e for e in reversed(run.evals()) if e.of), None)
    if sample:
        lead += f" Scored are {len(sample.clients):,} of the {sample.of:,} clients that train, one sample drawn from the seed."
    tiles: list[Tile] = []
    if s:
        for view, note in (
            ("personal", "each client's own model, mean over clients"),
            ("global", "the shared part alone"),
            ("unseen", "clients that never trained"),
        ):
            if view in s["views"]:
                tiles.append(Tile(f"{m}, {view}", number(s["views"][view]["mean"][run.metric]), note))
        main = s["views"].get(run.main)
        if main:
            tiles.append(
                Tile(f"{m}, worst tenth", number(main["worst_decile"][run.metric]), f"of the clients, {run.main} model")
            )
        if s.get("constant") is not None:
            tiles.append(Tile(f"{m}, no model", number(s["constant"]), "always a client's most frequent class"))
        tiles += [
            Tile("sent", size(s["bytes"]["total"]), f"{size(s['bytes']['up'])} up, {size(s['bytes']['down'])} down"),
            Tile(
                "trained per client", f"{s['parameters']['trainable']:,}", f"of {s['parameters']['base']:,} parameters"
            ),
        ]
    chosen = (
        f"Test scores at round {s['chosen_round']}, the best one on {choice([{'chosen_on': [s['chosen_on']]}])}."
        if s
        else "This run is not finished."
    )
    if s and run.trains and s["chosen_round"] != done:
        chosen += f" export and predict serve this round's models, and those of the last, {done}, with --round last."
    if s and s["chosen_round"] == 0:
        chosen += " It is the start: no round of training was better."
    blocks = [
        Block(f"{m} against rounds".capitalize(), "Mean over clients; the band holds the middle 80 % of them.", figures.progress(run)),
        Block(f"{m} against bytes".capitalize(), "What a network would carry: adapters, head and framing.", figures.progress(run, "bytes")),
        Block("Who holds what", figures.holding(run), figures.partition(run)),
        Block("Client by client", "Each client's score on its own test data.", figures.spread(run)),
        Block("Training loss", "Mean over the clients of a round; the band holds the middle 80 %.", figures.losses(run)),
        Block("Everybody's model on everybody's data", "Row: whose model. Column: whose test data. A bright diagonal is personalisation.", figures.cross(run)),
        Block("Cost of averaging factors", "How far the product of averages is from the average of products.", figures.exactness(run)),
    ]  # fmt: skip
    blocks += [
        Block("The server's spectrum", "What lies beyond its first components. It falls where weaker clients count as zero there.", figures.spectrum(run)),
        Block("Ranks", "Of each client over the rounds.", figures.ranks(run)),
        Block("How alike clients' factors are", "Mean over pairs of clients. Much of A's likeness is the common start.", figures.likeness(run)),
    ]  # fmt: skip
    blocks = [b for b in blocks if b.figure is not None]
    if s:
        blocks += [Block("Scores on test", table=_scores(s)), Block("Cost", table=_costs(run, s))]
    if written := next((x for x in reversed(run.lines) if isinstance(x, SamplesLine)), None):
        what = (
            "One question of each of several clients, answered by the models of several clients, after the last round."
        )
        blocks.append(Block("What the models write", what, table=_written(written), wide=True))
    refused = [(str(x.round), c, why) for x in run.trains for c, why in x.refused.items()]
    if refused:
        blocks.append(
            Block(
                "Refused uploads",
                f"{len(refused)} in all.",
                table=[("round", "client", "reason"), *refused[:50]],
                wide=True,
            )
        )
    blocks += about(run)
    return {"title": run.name, "lead": lead, "note": chosen, "tiles": tiles, "blocks": blocks}


def example_page(found: Sequence[Course], true: Mapping[str, int], seed: int) -> dict[str, Any]:
    """PF2LoRA's synthetic example: how near each method comes to each client's true update, and with which rank."""
    clients = list(true)
    head = (
        "method",
        *(f"error, client {c}" for c in clients),
        *(f"effective rank, client {c} (true {true[c]})" for c in clients),
    )
    rows = [(c.label, *(f"{c.errors[k][-1]:.1e}" for k in clients), *(str(c.ranks[k]) for k in clients)) for c in found]
    return {
        "title": "Clients whose true updates have different ranks",
        "lead": f"Linear clients y = W x in 10 x 10 whose true updates have rank {' and '.join(map(str, true.values()))} and share "
        "their leading directions.",
        "note": f"Relative error of the update that each client is served, seed {seed}. AdamW 0.01, ten steps a round, cosine decay.",
        "tiles": [],
        "blocks": [
            *(
                Block(
                    f"Client {c}: true rank {true[c]}",
                    "Lower is better; the scale is logarithmic.",
                    races.courses(found, c),
                )
                for c in clients
            ),
            Block("At the end", "", table=[head, *rows], wide=True),
        ],
    }


def shared(x: Any) -> Any:
    """A recipe without the folders of the machine it ran on: a page is given to others."""
    if isinstance(x, Mapping):
        return {k: shared(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [shared(v) for v in x]
    return short(x) if isinstance(x, str) and (x.startswith(("/", "~")) or PureWindowsPath(x).is_absolute()) else x


def short(path: str) -> str:
    """The last two parts of a path."""
    return "/".join(path.rstrip("/").replace("\\", "/").split("/")[-2:])


def source(data: Mapping[str, Any]) -> str:
    source = data.get("source", "own data")
    if source == "demo":
        return "the documentation of Python's standard library"
    first = source if isinstance(source, str) else source[0]
    return short(str(first))


def _scores(s: Mapping[str, Any]) -> list[tuple[str, ...]]:
    names = [n for v in s["views"].values() for n in v["mean"]]
    names = list(dict.fromkeys(names))
    head = ("model", "summary", *(figures.words(n) for n in names))
    words = {"mean": "mean over clients", "weighted": "weighted by rows", "worst_decile": "worst tenth"}
    return [head, *((v, words[k], *(number(x[k].get(n)) for n in names)) for v, x in s["views"].items() for k in words)]


def _written(x: SamplesLine) -> list[tuple[str, ...]]:
    """A row a question; the client that asks is named beside it, and each column of answers is headed by whose model wrote it."""
    head = ("question", "reference", *(f"model of {c}" for c in x.answers))
    return [
        head,
        *(
            (
                f"{q['client']}: {_cut(q['prompt'])}",
                " / ".join(map(_cut, q["references"][:3])),
                *(_cut(said[i]) for said in x.answers.values()),
            )
            for i, q in enumerate(x.questions)
        ),
    ]


def _cut(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 1] + "…"


def _costs(run: Records, s: Mapping[str, Any]) -> list[tuple[str, str]]:
    p, parts = (
        s["parameters"],
        {
            d: {k: sum(x.bytes[d][k] for x in run.trains) for k in ("adapter", "head", "framing")}
            for d in ("down", "up")
        },
    )
    total = {
        k: sum(getattr(t, k) for t in run.timings)
        for k in ("train_seconds", "eval_seconds", "server_seconds", "tokens")
    }
    pace = total["tokens"] / total["train_seconds"] if total["train_seconds"] else 0
    rows = [
        ("what", "value"),
        ("trained per client", f"{p['trainable']:,}"),
        ("of which shared, personal", f"{p['shared']:,}, {p['personal']:,}"),
        ("of which head", f"{p['head']:,}"),
        *((f"bytes {d}", f"{size(sum(v.values()))}: " + ", ".join(f"{k} {size(n)}" for k, n in v.items())) for d, v in parts.items()),
        ("training", seconds(total["train_seconds"])),
        ("evaluation", seconds(total["eval_seconds"])),
        ("tokens trained on", f"{total['tokens']:,}" + (f" ({pace:,.0f} a second)" if pace else "")),
        ("largest memory", size(s["peak_memory_bytes"])),
    ]  # fmt: skip
    return [(str(a), str(b)) for a, b in rows]


def about(run: Records) -> list[Block]:
    e = run.environment
    versions = ", ".join(f"{k} {v}" for k, v in e.get("packages", {}).items())
    operators = e.get("kernels", "PyTorch's")
    more = "" if operators == "PyTorch's" else f", operators {operators}"
    more = f", base in {e['numbers']}{more}" if "numbers" in e else more
    where = (
        f"{e.get('processor', '')}, {e.get('cores', '?')} cores, {e.get('threads', '?')} threads, "
        f"device {e.get('device', '?')}{more}; Python {e.get('python', '?')}, {versions}"
    )
    wall = sum(t.train_seconds + t.eval_seconds + t.server_seconds for t in run.timings)
    facts = [
        ("what", "value"),
        ("command", e.get("command") or "none: started from Python"),
        ("git commit", e.get("commit") or "none: started outside a repository"),
        ("data", ", ".join(f"{k} {v}" for k, v in run.inputs.items() if k != "base") or "at the sites"),
        ("base's weights", run.inputs.get("base", NOTHING)),
        ("recipe", run.hash),
        ("time", f"{seconds(wall)} in {len(run.timings)} rounds"),
    ]
    recipe = yaml.safe_dump(shared(run.recipe), sort_keys=False, allow_unicode=True) if run.recipe else ""
    out = [Block("Machine and versions", where if e else "unknown", wide=True)]
    out.append(Block("What this was made from", "Digests of what the numbers follow from.", table=facts, wide=True))
    if recipe:
        out.append(Block("Recipe", f"Hash {run.hash}.", code=recipe, wide=True, folded=True))
    return out
