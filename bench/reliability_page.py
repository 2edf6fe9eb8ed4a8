"""The tables of bench/reliability.py in docs/reliability.md, between its two marks."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.units import seconds, size

BEGIN, END = "<!-- counted by make reliability -->", "<!-- end of what is counted -->"


def put(found: Mapping[str, Any], page: Path) -> None:
    """Write the tables into the page; what stands before and behind the marks stays."""
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Reliability\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text:
        first, _, rest = text.partition("## Attackers")
        text = f"{first}{BEGIN}\n{END}\n\n" + (f"## Attackers{rest}" if rest else "")
    before, _, rest = text.partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{tables(found)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def _said(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 100)


def _made(part: Mapping[str, Any]) -> str:
    return f"Commit {part['commit']}; {part['processor']}; {seconds(part['took'])}."


def tables(found: Mapping[str, Any]) -> str:
    """All parts that were counted, as Markdown."""
    out: list[str] = []
    if p := found.get("kills"):
        out += ["## Killed at random", "", _said(
            f"{p['kills']:,} SIGKILLs over {p['runs']:,} runs of a small network, {len(p['by'])} pairs of method and guard. Each run was killed "
            f"up to twelve times at a random moment, then went on to its end. {p['exact']:,} of {p['runs']:,} ended in the bits of a run that was "
            "left alone.", _made(p)), "", "| method, guard | kills | runs | same bits |", "|---|---|---|---|"]  # fmt: skip
        out += [f"| {n} | {x['kills']} | {x['runs']} | {x['exact']} |" for n, x in p["by"].items()] + [""]
    if p := found.get("events"):
        out += ["## Killed at every event", "", _said(
            "A kill before every open, sync, rename, deletion and new folder of a run, from the claim of its folder to the end: "
            + "; ".join(f"{m} {x['exact']} of {x['events']}" for m, x in p["by"].items()) + " ended in the same bits.", _made(p)), ""]  # fmt: skip
    if p := found.get("damage"):
        kinds = list(next(iter(p["table"].values())))
        out += ["## Damaged files", "", _said(
            "Every file of a run that was stopped in its third round, damaged before it goes on. A cell counts files: those after which the "
            "run ended in the same bits, and those that an error named with what to do. No damage gave other results.", _made(p)), "",
            "| file | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]  # fmt: skip
        for file, row in p["table"].items():
            out.append(f"| {file} | " + " | ".join(_cell(row[k]) for k in kinds) + " |")
        out.append("")
    if p := {k: v for k, v in (found.get("fuzz") or {}).items() if isinstance(v, dict)}:
        out += ["## Messages that are nearly right", "", _said(
            "Replies, orders and contents of Flower's messages in which fields are missing, of other types, huge, negative, no number or deeply "
            "nested. Every one was taken or refused with a reason; none ended its reader. Memory is that of the process, with what the "
            "maker of cases remembers of them.", _made(found["fuzz"])), "",
            "| kind | cases | time | memory |", "|---|---|---|---|"]  # fmt: skip
        out += [
            f"| {k} | {x['cases']:,} | {seconds(x['seconds'])} | {_signed(x['grown_bytes'])} |" for k, x in p.items()
        ] + [""]
    if (p := found.get("soak")) and p["rounds"]:
        first, last, slope = p["first"], p["last"], p["slope_second_half"]
        said = (
            f"{p['minutes']:g} minutes of a deployment in one process: 10,000 clients at 100 sites, 200 clients a round; "
            f"{p['lost']:,} of {p['orders']:,} orders to sites were never answered. {p['rounds']:,} rounds, "
            f"{p['minutes'] * 60 / p['rounds']:.1f} s each. FedSA-LoRA, whose clients keep leaves of their own on disk. The machine did "
            "other work as well, so its times say little."
        )
        files = ", ".join(f"{r:.0f}: {n:,.0f}" for r, n in p["files"])
        out += [
            "## A long run", "", _said(said, _made(p)), "",
            "| | after the first round | at the end | growth a round in the second half |", "|---|---|---|---|",
            f"| memory | {size(first['rss'])} | {size(last['rss'])} | {_signed(slope.get('rss', 0.0))} |",
            f"| open descriptors | {first['fds']:.0f} | {last['fds']:.0f} | {slope.get('fds', 0.0):+.3f} |", "",
            _said(f"Files on disk, by round: {files}. They grow until every client has trained, since each has a state of its own."), "",
        ]  # fmt: skip
    if p := found.get("connections"):
        out += ["## Strangers at the door", "", _said(
            f"{p['strangers']} connections from one address, 244 with half a request and the others silent, while another address asked "
            f"{p['answered']} times: all were answered, in at most {p['slowest_seconds'] * 1e3:.0f} ms.", _made(p)), ""]  # fmt: skip
    return "\n".join(out)


def _cell(counts: list[int]) -> str:
    same, named, neither = counts
    shown = [f"{n} {word}" for n, word in ((same, "same"), (named, "named"), (neither, "**neither**")) if n]
    return ", ".join(shown) or "-"


def _signed(n: float) -> str:
    return ("-" if n < 0 else "+") + size(abs(round(n)))
