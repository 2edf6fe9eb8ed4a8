"""What was tried to break a federation, counted: `make reliability`, which writes its tables into docs/reliability.md.

    kills        SIGKILL at random moments of runs of methods and guards, until each run has ended
    events       a kill before every file-system event of a run, from the claim of its folder on
    damage       every file of a stopped run, damaged in every way
    fuzz         messages that are nearly right, in every kind
    soak         a deployment of 10,000 clients, 200 a round, of which 20 % drop out: does anything grow?
    connections  strangers who connect and say half a word, or nothing

A part that the results file holds already is done again only when it is named. Attacks on what is learned: attacks.py.
The small network and the laws behind these counts are those of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
import test_damage  # noqa: E402
import torch  # noqa: E402

from fedlora.data.federated import roster  # noqa: E402
from fedlora.deploy.packets import Packet  # noqa: E402
from fedlora.deploy.remote import Remote, Terms  # noqa: E402
from fedlora.deploy.site import Site  # noqa: E402
from fedlora.federation.callbacks import Callback  # noqa: E402
from fedlora.federation.guards import GUARDS  # noqa: E402
from fedlora.federation.run import Federation  # noqa: E402
from fedlora.federation.setting import Evaluation, Sampling  # noqa: E402
from fedlora.federation.summary import processor  # noqa: E402
from fedlora.methods import METHODS  # noqa: E402

Say = Callable[[str], None]
Found = dict[str, Any]
METHODS_TRIED = ("homlora", "fedsa", "hetlora", "flexlora", "pf2lora", "slora", "feddpa-t", "local")
GUARDS_TRIED = ("none", "clip", "feedback", "median", "bound")


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Runs of some milliseconds: the score by hand, and a disk that need not be waited for. Kills are not felt less."""
    with pytest.MonkeyPatch.context() as m, warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        m.setattr(test_damage.Classification, "scores", test_damage.scored_plainly)
        m.setattr(test_damage.summary, "environment", lambda f: {"python": "3"})
        m.setattr(os, "fsync", lambda fd: None)
        yield


def federation(folder: Path, method: str, guard: str) -> Federation:
    """The small federation of tests/test_damage.py with a guard; three clients in each of three rounds."""
    guards = () if guard == "none" else (GUARDS[guard](),)
    return test_damage.federation(folder, method, sampling=Sampling(rounds=3, guards=guards))


def pairs() -> list[tuple[str, str]]:
    """Methods with the guards that can serve them."""
    return [
        (m, g)
        for m in METHODS_TRIED
        for g in GUARDS_TRIED
        if g == "none" or not GUARDS[g]().cannot(METHODS[m](rank=4, head="frozen"))
    ]


# kills --------------------------------------------------------------------------------------------------------------
def kills(a: argparse.Namespace, say: Say) -> Found:
    """Each run is killed several times at random moments, then goes on to its end, which must be that of a run left alone."""
    draw, by, total = random.Random(0), {f"{m}, {g}": {"kills": 0, "runs": 0, "exact": 0} for m, g in pairs()}, 0
    wholes: dict[str, test_damage.Ending] = {}
    lengths: dict[str, float] = {}
    while total < a.kills:
        for method, guard in pairs():
            name = f"{method}, {guard}"
            with tempfile.TemporaryDirectory() as temporary:
                if name not in wholes:
                    start = time.perf_counter()
                    assert _attempt(Path(temporary) / "whole", method, guard, None) == 0
                    lengths[name] = time.perf_counter() - start
                    wholes[name] = test_damage.ending(Path(temporary) / "whole")
                folder, times = Path(temporary) / "run", 0
                while times < 12:
                    ended = _attempt(folder, method, guard, draw.uniform(0, lengths[name]))
                    assert ended in (0, -signal.SIGKILL), (name, ended)
                    if ended == 0:
                        break
                    times += 1
                assert _attempt(folder, method, guard, None) == 0, name
                one = by[name]
                one["kills"], one["runs"], total = one["kills"] + times, one["runs"] + 1, total + times
                one["exact"] += test_damage.same(test_damage.ending(folder), wholes[name])
        say(f"{total} kills")
    return {
        "kills": total,
        "runs": sum(x["runs"] for x in by.values()),
        "exact": sum(x["exact"] for x in by.values()),
        "by": by,
    }


def _attempt(folder: Path, method: str, guard: str, seconds: float | None) -> int:
    """Run in a process of its own, killed after so many seconds; its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            federation(folder, method, guard).run()
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# events -------------------------------------------------------------------------------------------------------------
def events(a: argparse.Namespace, say: Say) -> Found:
    """Folders as a kill before every single event would leave them; each is resumed, and must end in the same bits."""
    by: dict[str, dict[str, int]] = {}
    for method in ("fedsa", "pf2lora", "hetlora") if not a.quick else ("fedsa",):
        with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as m:
            root = Path(temporary)
            left = test_damage.moments(test_damage.federation(root / "run", method), root / "left", m)
            whole = test_damage.ending(root / "run")
            ended = [test_damage.outcome(folder, method, whole) for folder in left]
            by[method] = {"events": len(left), "exact": ended.count("same")}
            say(f"{method}: {by[method]}")
    return {"events": sum(x["events"] for x in by.values()), "exact": sum(x["exact"] for x in by.values()), "by": by}


# damage -------------------------------------------------------------------------------------------------------------
def damage(a: argparse.Namespace, say: Say) -> Found:
    """File by file and damage by damage: the same bits again, or an error that names the file."""
    table: dict[str, dict[str, list[int]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        test_damage.federation(root / "whole").run()
        with contextlib.suppress(KeyboardInterrupt):
            test_damage.federation(root / "stopped").run(test_damage.Stop(3))
        whole = test_damage.ending(root / "whole")
        for path in sorted((root / "stopped").rglob("*")):
            if not path.is_file() or path.name in test_damage.DERIVED:
                continue
            file = path.relative_to(root / "stopped")
            kind = {"server": "server's states", "clients": "clients' states"}.get(file.parts[0], str(file))
            for name, harm in test_damage.DAMAGES.items():
                shutil.copytree(root / "stopped", root / "copy")
                harm(root / "copy" / file)
                said = test_damage.outcome(root / "copy", "fedsa", whole)
                cell = table.setdefault(kind, {}).setdefault(name, [0, 0, 0])  # same bits, named, neither
                cell[0 if said == "same" else 1 if file.name in said else 2] += 1
                shutil.rmtree(root / "copy")
    say(f"{sum(sum(c) for row in table.values() for c in row.values())} damages")
    return {"table": table}


# fuzz ---------------------------------------------------------------------------------------------------------------
def fuzz(a: argparse.Namespace, say: Say) -> Found:
    """Every case is taken or refused with an error of the house; anything else raises here."""
    import test_packets

    out: dict[str, dict[str, float]] = {}
    for kind in test_packets.CASES:
        start, before = time.perf_counter(), psutil.Process().memory_info().rss
        test_packets.fuzz(kind, a.cases)
        grown = psutil.Process().memory_info().rss - before
        out[kind] = {"cases": a.cases, "seconds": time.perf_counter() - start, "grown_bytes": grown}
        say(f"{kind}: {a.cases:,} cases in {out[kind]['seconds']:.0f} s, memory {grown / 1e6:+.0f} MB")
    return out


# soak ---------------------------------------------------------------------------------------------------------------
SITES, CLIENTS, COHORT, LOST = 100, 10_000, 200, 0.2


class Link:
    """Sites in this process; a fifth of their replies to training never arrives."""

    def __init__(self, sites: Mapping[int, Site]):
        self.sites, self.draw, self.lost, self.asked = sites, random.Random(0), 0, 0

    def nodes(self) -> Mapping[int, str | None]:
        return dict.fromkeys(self.sites)

    def exchange(self, packets: Mapping[int, Packet], deadline: float) -> Iterator[tuple[int, Packet | str]]:
        for node, order in sorted(packets.items()):
            as_sent = Packet(order.kind, json.loads(json.dumps(order.header)), dict(order.parts))
            reply = self.sites[node].answer(as_sent)
            if order.kind == "train":
                self.asked += 1
                if self.draw.random() < LOST:
                    self.lost += 1
                    continue
            yield node, Packet(reply.kind, json.loads(json.dumps(reply.header)), reply.parts)


class Watch(Callback):
    """Looks at the process after every round, and ends it when the time is up."""

    def __init__(self, folder: Path, seconds: float, say: Say):
        self.folder, self.until, self.say = folder, time.perf_counter() + seconds, say
        self.seen: list[dict[str, float]] = []
        self.last = time.perf_counter()

    def round_start(self, round: int, clients: int) -> None:
        now, me = time.perf_counter(), psutil.Process()
        if round > 1:
            gc.collect()
            files = sum(len(names) for _, _, names in os.walk(self.folder)) if round % 50 == 2 else -1
            self.seen.append(
                {
                    "round": round - 1,
                    "seconds": now - self.last,
                    "rss": me.memory_info().rss,
                    "fds": me.num_fds(),
                    "files": files,
                }
            )
            if round % 50 == 2:
                self.say(
                    f"round {round - 1}: {me.memory_info().rss / 1e6:.0f} MB, {me.num_fds()} descriptors, {files} files"
                )
        self.last = time.perf_counter()
        if now > self.until:
            raise KeyboardInterrupt


def soak(a: argparse.Namespace, say: Say) -> Found:
    """FedSA-LoRA, whose clients keep leaves of their own on disk."""
    each = CLIENTS // SITES

    def settings(count: int) -> dict[str, Any]:
        return {"sampling": Sampling(rounds=1_000_000, clients_per_round=count), "evaluation": Evaluation(every=10**9, views=("personal",)),
                "seed": 3, "block": 50}  # fmt: skip

    def make(k: int) -> Callable[[Mapping[str, Any], Path], Federation]:
        def made(recipe: Mapping[str, Any], where: Path) -> Federation:
            fed = test_damage.federation(where, "fedsa")
            old = fed.data
            ids = [f"s{k}c{i}" for i in range(each)]
            rows = test_damage.Rows(np.arange(each + 1) * 4, np.arange(4 * each) % 12)
            data = test_damage.FederatedData(old.examples, ids, {"train": rows, "validation": rows}, old.label_names)
            return Federation(
                fed.model,
                fed.task,
                data,
                fed.method,
                where,
                plan=fed.plan,
                recipe=fed.recipe,
                recipe_hash=fed.recipe_hash,
                **settings(each),
            )

        return made

    told: list[str] = []

    def heard(text: str) -> None:
        """What the server says to its operator, the first few lines of it."""
        told.append(text)
        if len(told) <= 5:
            say(text)

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        link = Link({k: Site(make(k), root / f"site{k}", say=heard) for k in range(SITES)})
        probe = test_damage.federation(root / "probe", "fedsa")
        server = Federation(
            probe.model, probe.task, roster([], {"train": []}, probe.data.label_names), probe.method, root / "server", plan=probe.plan,
            recipe=probe.recipe, recipe_hash=probe.recipe_hash,
            runtime=lambda f, watch: Remote(f, watch, link, Terms(clients=CLIENTS, poll=0.0), {"data": {}, "deployment": {}}, heard),
            **settings(COHORT),
        )  # fmt: skip
        watch = Watch(root, a.minutes * 60, say)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(watch)
    rounds = watch.seen
    half = rounds[len(rounds) // 2 :]
    grow = (
        {n: float(np.polyfit([r["round"] for r in half], [r[n] for r in half], 1)[0]) for n in ("rss", "fds")}
        if len(half) > 2
        else {}
    )
    files = [r for r in rounds if r["files"] >= 0]
    return {"minutes": a.minutes, "rounds": len(rounds), "orders": link.asked, "lost": link.lost, "first": rounds[0] if rounds else {},
            "last": rounds[-1] if rounds else {}, "slope_second_half": grow, "files": [(r["round"], r["files"]) for r in files][-6:]}  # fmt: skip


# connections --------------------------------------------------------------------------------------------------------
def connections(a: argparse.Namespace, say: Say) -> Found:
    """844 strangers of one address hold what they can of the server's door; another address goes on asking."""
    import socket

    import test_door

    from fedlora.flower import door

    def stranger(port: int, words: bytes) -> socket.socket | None:
        s = socket.socket()
        s.bind(("127.0.0.2", 0))
        s.settimeout(20)
        try:
            s.connect(("127.0.0.1", port))
            s.sendall(words)
        except OSError:
            return None
        return s

    took = []
    most = door.room()
    with test_door.listening(most, min(door.EACH, max(most // 2, 1))) as (port, heard):
        held = [stranger(port, test_door.HEAD if i < 244 else b"") for i in range(844)]
        for _ in range(20):
            start = time.perf_counter()
            assert test_door.post(port, b"hello").endswith(b"hello")
            took.append(time.perf_counter() - start)
        for s in held:
            if s is not None:
                s.close()
    say(f"an honest request took {max(took) * 1e3:.1f} ms at most")
    return {
        "strangers": len(held),
        "let_in": min(door.EACH, max(most // 2, 1)),
        "answered": len(took),
        "slowest_seconds": max(took),
        "lines_said": len(heard),
    }


PARTS: dict[str, Callable[[argparse.Namespace, Say], Found]] = {
    "kills": kills, "events": events, "damage": damage, "fuzz": fuzz, "soak": soak, "connections": connections,
}  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; those without results by default")
    p.add_argument("--kills", type=int, default=1000)
    p.add_argument("--cases", type=int, default=100_000, help="messages of each kind")
    p.add_argument("--minutes", type=float, default=60.0, help="of the soak")
    p.add_argument("--quick", action="store_true", help="little of everything: the whole path in a minute")
    p.add_argument("--results", type=Path, default=ROOT / "bench/results/reliability.json")
    p.add_argument("--page", type=Path, default=ROOT / "docs/reliability.md")
    a = p.parse_args()
    if odd := [x for x in a.parts if x not in PARTS]:
        p.error(f"{', '.join(odd)}: no such part; there are {', '.join(PARTS)}")
    if a.quick:
        a.kills, a.cases, a.minutes = min(a.kills, 20), min(a.cases, 20), min(a.minutes, 0.2)
    torch.set_num_threads(1)
    found: dict[str, Any] = json.loads(a.results.read_text(encoding="utf-8")) if a.results.exists() else {}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    for part in a.parts or [x for x in PARTS if x not in found]:
        start = time.perf_counter()
        with quick() if part in ("kills", "events", "damage", "soak") else contextlib.nullcontext():
            counted = PARTS[part](a, lambda text, part=part: print(f"{part}: {text}", flush=True))  # type: ignore[misc]
        found[part] = {
            "commit": commit.stdout.strip(),
            "processor": processor(),
            "took": time.perf_counter() - start,
        } | counted
        a.results.parent.mkdir(parents=True, exist_ok=True)
        a.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    from reliability_page import put

    put(found, a.page)


if __name__ == "__main__":
    main()
