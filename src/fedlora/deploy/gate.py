"""The gate of a site: every order passes it on the way in, before a row is read, and every reply on the way out."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, printable
from ..federation import wire
from ..federation.memory import client_bytes
from ..federation.run import Federation
from ..methods.facts import leaves
from ..recipe import Recipe
from ..units import size
from . import limits
from .audit import Audit, contents, digest
from .packets import Packet
from .policy import Policy
from .refusal import Refusal, told

ACCEPTED = "accepted.json"
HEAD = "head"
Ask = Callable[[str], bool]


class Gate:
    """policy: what may be asked; None trusts the server with everything. folder: of the audit log and of what was accepted.

    typed: a server's recipe over this site's columns. accept: digests of recipes that need no question. ask: shows a summary
    to the operator and returns the answer; None where nobody sits there.
    """

    def __init__(
        self, policy: Policy | None, folder: Path, typed: Callable[[Mapping[str, Any]], Recipe], *,
        accept: Sequence[str] = (), ask: Ask | None = None, say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.time,
    ):  # fmt: skip
        self.policy, self.folder, self.typed, self.accept, self.ask, self.say = policy, folder, typed, accept, ask, say
        self.audit = Audit(folder, clock)
        self._admitted: dict[str, Recipe] = {}  # recipes that were checked, by digest
        self._declined: set[str] = set()
        self._end = math.inf
        facts = "none: the server is trusted" if policy is None else policy.model_dump(mode="json")
        self.audit.write("start", policy=facts)

    # in -----------------------------------------------------------------------------------------------------------
    def admit(self, packet: Packet) -> None:
        """Take an order up, or raise Refusal. Nothing of the site's data has been read when this returns."""
        h = packet.header
        given, run, kind = h["recipe"], str(h["run"]), packet.kind
        name = digest(given)
        bytes_ = sum(map(len, packet.parts.values()))
        facts = {"kind": kind, "run": run, "round": h.get("round"), "recipe": name, "bytes": bytes_}
        if self.policy is not None:
            self._end = time.monotonic() + self.policy.most.seconds
            recipe = self._recipe(given, name)
            self._within(packet, recipe, run, bytes_)
            self._consent(recipe, given, name)
        self.audit.write("asked", **facts)

    def _recipe(self, given: Mapping[str, Any], name: str) -> Recipe:
        assert self.policy is not None
        if name not in self._admitted:
            recipe = self.typed(given)
            if problems := limits.problems(self.policy, recipe):
                raise Refusal("policy", f"outside this site's policy: {ConfigError(problems)}", problems[0].field)
            self._admitted[name] = recipe
        return self._admitted[name]

    def _within(self, packet: Packet, r: Recipe, run: str, bytes_: int) -> None:
        """Numbers of this order, and of those before it."""
        assert self.policy is not None
        most, kind, h = self.policy.most, packet.kind, packet.header
        if bytes_ > most.gigabytes * 1e9:
            raise Refusal("policy", f"a message of {size(bytes_)}, the policy allows {most.gigabytes} GB")
        if kind == "join":
            if len(self.audit.runs() - {run}) >= most.runs_a_day and not self.audit.of_run("join", run):
                raise Refusal("limit", f"{most.runs_a_day} runs in 24 hours (most.runs_a_day)")
            return
        round, rounds = h["round"], h["rounds"]
        last = r.federation.rounds
        if type(round) is not int or rounds != last or not 0 <= round <= last - (kind == "train"):
            raise Refusal("order", f"round {round!r} of {rounds!r}, the recipe has {last}")
        if kind == "train" and self.audit.of_run("train", run) >= most.rounds:
            raise Refusal("limit", f"{most.rounds} rounds of this run (most.rounds)", "federation.rounds")
        day = most.rounds_a_day if kind == "train" else most.scores_a_day
        if self.audit.today(kind) >= day:
            raise Refusal(
                "limit", f"{day} orders to {kind} in 24 hours (most.{'rounds' if kind == 'train' else 'scores'}_a_day)"
            )

    def _consent(self, r: Recipe, given: Mapping[str, Any], name: str) -> None:
        """The operator has seen this recipe and said yes, now or earlier. Raises Refusal."""
        path = self.folder / ACCEPTED
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if name in known:
            return
        shown = self.summary(r, given, name)
        if name not in self.accept:
            self.say(shown)
            if name in self._declined or self.ask is None or not self.ask("Take part? [y/N] "):
                self._declined.add(name)
                raise Refusal(
                    "consent", f"nobody here has accepted this recipe; start this client with --accept {name}"
                )
        how = "--accept" if name in self.accept else "the operator"
        self.audit.write("accepted", recipe=name, how=how, summary=shown)
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known | {name: how}, indent=1), encoding="utf-8")

    def summary(self, r: Recipe, given: Mapping[str, Any], name: str) -> str:
        """What a recipe asks of this site, for its operator."""
        assert self.policy is not None
        d, t, send = r.data, r.train, self.policy.send
        columns = [
            *((d.text,) if isinstance(d.text, str) else d.text or ()),
            *((d.prompt,) if isinstance(d.prompt, str) else d.prompt or ()),
            d.completion,
            d.messages,
            d.template,
        ]
        work = f"{t.steps} steps" if t.steps else f"{t.epochs} epochs"
        method: Any = r.method_object()
        # Patterns name layers, and only the model, which is not loaded yet, knows its layers.
        plain = {f.name: () for f in dataclasses.fields(method) if "pattern" in f.name}
        sent, stays = leaves(dataclasses.replace(method, **plain))
        asked = bool((given.get("deployment") or {}).get("histograms"))
        lines = {
            "model": r.model.name if self.policy.model.folder is None else f"{r.model.name} (this site's own)",
            "task": f"{r.model.task}, classes {', '.join(d.classes)}" if d.classes else r.model.task,
            "reads": f"{', '.join(c for c in columns if c)}; label {d.label}",
            "method": f"{method.title}, at most {r.federation.rounds} rounds of {work} with {t.batch_size} rows each",
            "sends": f"{', '.join(sent) or 'nothing'} of every adapted layer; kept here: {', '.join(stays) or 'nothing'}",
            "also sends": f"how many rows there are; scores: {f'yes, {send.digits} digits' if send.scores else 'no'}; "
            f"rows of each class: {'yes' if asked and send.histograms else 'no'}",
        }
        told = "\n".join(f"  {k + ':':12}{printable(v, 400)}" for k, v in lines.items())
        return f"The server asks this site to take part in {printable(r.name)!r}:\n{told}\n  {'recipe:':12}{name}"

    # while it works -------------------------------------------------------------------------------------------------
    def holds(self, fed: Federation) -> None:
        """Enough rows behind what a site's clients will send, and memory for it; asked once, when the data are there."""
        if self.policy is None:
            return
        least, most = self.policy.least, self.policy.most
        for id, n in zip(fed.data.ids, fed.data.splits["train"].sizes.tolist(), strict=True):
            steps = fed.plan.count(n, fed.method.draws)
            behind = min(n, steps * fed.plan.batch_size * fed.method.draws)
            if behind < least.rows or steps < least.steps:
                raise Refusal("rows", f"client {id!r}: {behind} rows in {steps} steps would stand behind an upload, the policy asks for "
                              f"{least.rows} and {least.steps} (least.rows, least.steps)")  # fmt: skip
            if steps > most.steps:
                raise Refusal("policy", f"client {id!r}: {steps} steps, the policy allows {most.steps}", "train.epochs")
        needed = client_bytes(fed)
        if needed > most.gigabytes * 1e9:
            raise Refusal(
                "memory", f"one client's training needs about {size(needed)}, the policy allows {most.gigabytes} GB"
            )

    def tick(self) -> None:
        """Raise Refusal once an order has taken its time."""
        if time.monotonic() > self._end:
            raise Refusal("time", "the order took longer than most.seconds")

    def pace(self, inner: Callable[..., float]) -> Callable[..., float]:
        """A learning-rate schedule, which every step asks, that also looks at the clock."""

        def timed(*args: Any) -> float:
            self.tick()
            return inner(*args)

        return timed

    # out ------------------------------------------------------------------------------------------------------------
    def leave(self, reply: Packet, fed: Federation) -> Packet:
        """A reply with no more in it than the policy lets out; recorded before it leaves. Raises Refusal."""
        self.tick()
        header = dict(reply.header)
        if self.policy is not None:
            if reply.kind == "train":
                header["clients"] = {c: self._facts(f) for c, f in header["clients"].items()}
                for message in reply.parts.values():
                    self._parts(message)
            if reply.kind == "evaluate":
                header["lines"] = self._scores(header["lines"], fed)
        out = Packet(reply.kind, header, reply.parts)
        self.audit.write("sent", kind=out.kind, **contents(out))
        return out

    def _facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        assert self.policy is not None
        send = self.policy.send
        loss = (
            {"loss": round(facts["metrics"]["loss"], send.digits)} if send.scores and "loss" in facts["metrics"] else {}
        )
        return {"examples": facts["examples"], "metrics": loss}

    def _parts(self, message: bytes) -> None:
        assert self.policy is not None
        may, head = self.policy.parts(), "shared" in self.policy.allow.heads
        for k in wire.decode(message)[0]:
            if not (head if k.adapter == HEAD else k.part.removesuffix(wire.SCALE) in may):
                raise Refusal(
                    "leaves", f"leaf {k} would leave, which the policy does not allow (allow.adapters, allow.heads)"
                )

    def _scores(self, lines: Sequence[Mapping[str, Any]], fed: Federation) -> list[dict[str, Any]]:
        """Rounded, and of clients with rows enough; none where scores stay here."""
        assert self.policy is not None
        send, least = self.policy.send, self.policy.least.score_rows
        if not send.scores:
            return []
        rows = {s: dict(zip(fed.data.ids, r.sizes.tolist(), strict=True)) for s, r in fed.data.splits.items()}
        out = []
        for x in lines:
            some = {c: {m: round(v, send.digits) for m, v in s.items()}
                    for c, s in x["clients"].items() if rows[x["split"]][c] >= least}  # fmt: skip
            if some:
                out.append({**x, "clients": some})
        return out

    def refused(self, packet: Packet, e: BaseException) -> None:
        """Record why an order was not done; what cannot be recorded is at least said."""
        h = packet.header if isinstance(packet.header, Mapping) else {}
        run, round = h.get("run"), h.get("round")
        facts: dict[str, Any] = {"run": printable(run, 64) if isinstance(run, str) else None}
        facts["round"] = round if type(round) is int and abs(round) < 2**63 else None
        try:
            self.audit.write(
                "refused", kind=printable(packet.kind, 64), **facts, **told(e), why=f"{type(e).__name__}: {e}"
            )
        except OSError as broken:
            self.say(f"{self.audit.path}: cannot be written ({broken.strerror})")
