"""No message of one side stops the other, or the run: every field of every packet, replaced by everything it should not be.

The honest replies of four sites are recorded once and played back, so that a round costs its server's half alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_deploy import A_SITE, METHOD, RECIPE, Loop, server, sites

from fedlora.deploy import claims, schema
from fedlora.deploy.attendance import Attendance
from fedlora.deploy.packets import PROTOCOL, Packet, order_of, reply_of
from fedlora.deploy.refusal import REASONS, told
from fedlora.deploy.remote import Remote, Terms
from fedlora.deploy.schema import PacketError
from fedlora.deploy.site import Site
from fedlora.errors import TrainingError, UploadError
from fedlora.federation import wire
from fedlora.federation.callbacks import Callback
from fedlora.federation.engine import RoundLog
from fedlora.federation.run import Federation
from fedlora.federation.setting import Sampling
from fedlora.methods.contract import Client, ServerState, Upload
from fedlora.tree import Key, Params

NESTED: Any = None
for _ in range(1000):
    NESTED = [NESTED]
WRONG: dict[str, Any] = {
    "null": None, "text": "x", "number": 7.5, "list": [1], "empty": {}, "huge": 10**400, "wide": 2**62, "negative": -1,
    "NaN": math.nan, "infinite": math.inf, "yes": True, "nested": NESTED,
}  # fmt: skip
GONE = object()
LIAR = "c3"


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of nested JSON in which one place is another value, or gone."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    inner = changed(copy[path[0]], path[1:], new)
    if inner is GONE:
        del copy[path[0]]
    else:
        copy[path[0]] = inner
    return copy


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested JSON."""
    if path:
        yield path
    for k in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[k], (*path, k))


class Canned(Loop):
    """Sites whose honest answers are played back; one of them lies."""

    def __init__(self, real: Loop):
        super().__init__(real.sites, real.names)
        self.known: dict[tuple[int, str], Packet] = {}
        self.lie: Callable[[Packet], Any] | None = None

    def exchange(self, packets: Mapping[int, Packet], deadline: float) -> Iterator[tuple[int, Packet | str]]:
        for node, order in sorted(packets.items(), reverse=True):
            if (node, order.kind) not in self.known:
                answer = self.sites[node].answer(Packet(order.kind, json.loads(json.dumps(order.header)), order.parts))
                self.known[node, order.kind] = answer
            reply = self.known[node, order.kind]
            yield node, reply if self.lie is None or node != 3 else self.lie(reply)


class Stage:
    """A server before its first round, and what it says."""

    def __init__(self, folder: Path):
        self.heard: list[str] = []
        self.link = Canned(sites(METHOD, folder))
        self.fed: Federation = server(METHOD, folder / "there", self.link, sampling=Sampling(rounds=3))
        self.fed.store.root.mkdir(parents=True, exist_ok=True)
        terms = Terms(clients=4, poll=0.0, pause=0.0)
        self.remote = Remote(self.fed, Callback(), self.link, terms, RECIPE, self.heard.append)
        self.start = METHOD.init(self.fed.context)
        self.whole, _ = self.train()
        self.lines = self.remote.evaluate(self.start)
        self.link.lie = lambda reply: "no reply"
        self.without, _ = self.train()  # the oracle: what the server has without the liar

    def train(self) -> tuple[ServerState, RoundLog]:
        cohort = [self.fed.client(k) for k in range(4)]
        return self.remote.round(self.start, 3, cohort, lambda u: None)

    def join(self) -> dict[int, Any]:
        self.remote.here.sites.clear()
        self.remote.here.failed.clear()
        self.remote.online()
        joined = dict(self.remote.here.sites)
        if len(joined) < 4:
            self.link.lie = None
            self.remote.online()  # it is asked again, and the next test finds it here
        return joined


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("stage"))


def header(path: tuple[Any, ...], new: Any) -> Callable[[Packet], Packet]:
    return lambda r: Packet(r.kind, changed(dict(r.header), path, new), r.parts)


# what a server does with a reply -----------------------------------------------------------------------------------
@pytest.mark.parametrize("what", [*WRONG, "missing"])
def test_no_field_of_a_trained_reply_ends_the_round(what: str, stage: Stage) -> None:
    """Whatever is in the liar's place: it alone is refused, with a reason, and the others' mean is the round's."""
    honest = dict(stage.link.known[3, "train"].header)
    for path in places(honest):
        new = GONE if what == "missing" else WRONG[what]
        if fits_well(path, new):
            continue
        stage.link.lie = header(path, new)
        new_server, log = stage.train()
        assert list(log.refused) == [LIAR], (path, what)
        assert log.refused[LIAR] and len(log.refused[LIAR]) < 3000
        tiny.close(new_server.params, stage.without.params, tol=0)
        assert sorted(log.losses) == ["c0", "c1", "c2"]


def fits_well(path: tuple[Any, ...], new: Any) -> bool:
    """Values that are none of the faults: a loss that is any finite one, or that a site's policy keeps, like its tokens."""
    if (path[-1] in ("loss", "tokens") and new is GONE) or (path[-1] == "metrics" and new == {}):
        return True
    if path[-1] == "loss":
        return isinstance(new, (int, float)) and not isinstance(new, bool) and abs(new) < 1e15
    return False


@pytest.mark.parametrize("what", [*WRONG, "missing"])
def test_no_field_of_an_evaluation_ends_it(what: str, stage: Stage) -> None:
    """The liar's scores are refused, the others' stay; no mean is spoiled."""
    honest = dict(stage.link.known[3, "evaluate"].header)
    for path in places(honest):
        new = GONE if what == "missing" else WRONG[what]
        if fits_well(path, new) or (
            path[-1] in ("accuracy", "macro_f1", "matthews") and what in ("negative", "missing")
        ):
            continue
        stage.link.lie, before = header(path, new), len(stage.heard)
        lines = stage.remote.evaluate(stage.start)
        for now, was in zip(lines, stage.lines, strict=True):
            assert {c: now.clients[c] for c in ("c0", "c1", "c2")} == {c: was.clients[c] for c in ("c0", "c1", "c2")}
            assert math.isfinite(now.mean["accuracy"]) and math.isfinite(now.weighted["loss"])
            assert now.clients.get(LIAR) in (None, was.clients[LIAR])
        assert len(stage.heard) > before or any(LIAR not in x.clients for x in lines), (path, what)


@pytest.mark.parametrize("what", [*WRONG, "missing"])
def test_no_field_of_a_joining_site_keeps_the_others_out(what: str, stage: Stage) -> None:
    honest = dict(stage.link.known[3, "join"].header)
    for path in places(honest):
        new = GONE if what == "missing" else WRONG[what]
        if path[-1] in ("validation", "test") and new is GONE:
            continue  # a site without such rows
        stage.link.lie = header(path, new)
        assert sorted(stage.join()) == [0, 1, 2], (path, what)


REPLIES: dict[str, Callable[[Packet], Any]] = {
    "no packet": lambda r: None, "a text": lambda r: "gone", "a header that is a list": lambda r: Packet(r.kind, [1], r.parts),  # type: ignore[arg-type]
    "a part that is null": lambda r: Packet(r.kind, r.header, {LIAR: None}),  # type: ignore[dict-item]
    "parts that are a list": lambda r: Packet(r.kind, r.header, [b"x"]),  # type: ignore[arg-type]
    "an unknown kind": lambda r: Packet("stop", r.header, r.parts),  # type: ignore[arg-type]
    "an error of the old form": lambda r: Packet(r.kind, {**r.header, "error": "out of paper"}, r.parts),
    "an error that is a code": lambda r: Packet(r.kind, {"error": {"code": "disk", "field": None, "text": "full of it"}}),
    "an error that is nested": lambda r: Packet(r.kind, {"error": NESTED}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["train", "evaluate", "join"])
@pytest.mark.parametrize("reply", REPLIES)
def test_no_reply_ends_the_server(reply: str, kind: str, stage: Stage) -> None:
    stage.link.lie = REPLIES[reply]
    if kind == "train":
        new, log = stage.train()
        assert list(log.refused) == [LIAR]
        known = f"{REASONS['disk']} (disk)"
        assert (log.refused[LIAR] == known) == (reply == "an error that is a code")
        assert "out of paper" not in log.refused[LIAR]
        assert "full of it" not in log.refused[LIAR]  # of a code that is known here, the words are ours
        tiny.close(new.params, stage.without.params, tol=0)
    elif kind == "evaluate" and reply not in ("a part that is null", "parts that are a list"):
        lines = stage.remote.evaluate(stage.start)
        assert [sorted(x.clients) for x in lines] == [["c0", "c1", "c2"]] * len(lines)
    elif kind == "join":
        assert sorted(stage.join()) in ([0, 1, 2], [0, 1, 2, 3])


def leaves(change: Callable[[Params], Params], **head: Any) -> Callable[[Packet], Packet]:
    def lie(reply: Packet) -> Packet:
        message, said = wire.decode(reply.parts[LIAR])
        return Packet(reply.kind, reply.header, {LIAR: wire.encode(change(message), {**said, **head})})

    return lie


STRAY = Key("lora", "stray", "A~scale")
UPLOADS: dict[str, tuple[Callable[[Packet], Packet], str]] = {
    "3e38": (leaves(lambda p: {k: torch.full_like(v, 3e38) for k, v in p.items()}), "far from that of the others"),
    "1e30 in one place": (leaves(lambda p: p | {A_SITE: p[A_SITE].index_fill(0, torch.tensor([0]), 1e30)}), "far from"),
    "half precision": (leaves(lambda p: {k: v.half() for k, v in p.items()}), "expected a message of fp32"),
    "a stray scale": (leaves(lambda p: p | {STRAY: torch.zeros(1000)}), "expected a message of fp32"),
    "20,000 empty leaves": (leaves(lambda p: p | {Key("x", str(i), "A"): torch.zeros(0) for i in range(20_000)}), "leaves, expected at most"),
    "a long name": (leaves(lambda p: p | {Key("x", "y" * 5000, "A"): torch.zeros(0)}), "name is longer"),
    "round 0.0": (leaves(lambda p: p, round=0.0), "round 0.0"), "round false": (leaves(lambda p: p, round=False), "round False"),
    "round nested": (leaves(lambda p: p, round=[[[[0]]]]), "round a list of 1"), "round huge": (leaves(lambda p: p, round=10**400), "bits"),
}  # fmt: skip


@pytest.mark.parametrize("upload", UPLOADS)
def test_no_upload_ends_the_round(upload: str, stage: Stage) -> None:
    stage.link.lie, why = UPLOADS[upload]
    new, log = stage.train()
    assert list(log.refused) == [LIAR]
    assert why in log.refused[LIAR]
    tiny.close(new.params, stage.without.params, tol=0)


def test_one_upload_of_3e38_does_not_decide_a_run(tmp_path: Path) -> None:
    """The attacker stays for the whole run: all honest uploads count, its own never does, and the state stays finite."""
    link = sites(METHOD, tmp_path)
    lie = UPLOADS["3e38"][0]
    link.change = lambda node, order, reply: lie(reply) if node == 3 and order.kind == "train" else reply
    there = server(METHOD, tmp_path / "there", link, sampling=Sampling(rounds=3))
    there.run()
    loaded = there.store.load_server()
    assert loaded is not None and wire.finite_state(loaded[1]) is None
    train = [json.loads(x) for x in (there.store.root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(sorted(x["losses"]), list(x["refused"])) for x in train if x["kind"] == "train"] == [
        (["c0", "c1", "c2"], [LIAR])
    ] * 3


def test_a_loss_may_be_withheld(stage: Stage) -> None:
    """A site's policy may let no numbers out: its upload counts all the same."""
    stage.link.lie = lambda r: Packet(r.kind, {**r.header, "clients": {LIAR: {"examples": 5, "metrics": {}}}}, r.parts)
    new, log = stage.train()
    assert not log.refused
    assert math.isnan(log.losses[LIAR])
    tiny.close(new.params, stage.whole.params, tol=0)


# what an aggregate may be ------------------------------------------------------------------------------------------
def uploads(*values: float) -> list[Upload]:
    return [Upload(Client(f"c{i}", 1), {A_SITE: torch.full((2, 2), v)}) for i, v in enumerate(values)]


def summed(us: Any) -> ServerState:
    return ServerState(1, {A_SITE: torch.stack([u.params[A_SITE] for u in us]).sum(0)})


def test_the_largest_uploads_are_left_out_until_the_aggregate_is_finite() -> None:
    new, used, left = claims.aggregated(summed, uploads(1.0, 3e38, 2.0, 3.1e38, 2e38), least=2)
    assert (sorted(left), [u.client.id for u in used]) == (["c1", "c3"], ["c0", "c2", "c4"])
    assert "not finite" in left["c3"]
    assert torch.isfinite(new.params[A_SITE]).all()
    with pytest.raises(TrainingError, match=r"1 uploads are left, expected at least 2"):
        claims.aggregated(summed, uploads(3e38, 3e38), least=2)


def test_an_aggregate_keeps_to_the_norm_bound() -> None:
    _, used, left = claims.aggregated(summed, uploads(1.0, 1.0, 50.0), least=1, most=8.0)
    assert (list(left), len(used)) == (["c2"], 2)


def test_what_cannot_be_aggregated_is_no_end() -> None:
    def failing(us: Any) -> ServerState:
        if any(float(u.params[A_SITE].max()) > 10 for u in us):
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return summed(us)

    _, used, left = claims.aggregated(failing, uploads(1.0, 99.0), least=1)
    assert (list(left), len(used)) == (["c1"], 1)
    assert "LinAlgError" in left["c1"]


def test_who_stands_far_from_the_others_is_named_or_refused() -> None:
    assert list(claims.distant(uploads(1.0, 1.2, 0.9, 5e4), {})) == ["c3"]
    assert claims.distant(uploads(1.0, 1.2, 0.9, 300.0), {}) == {}
    assert claims.distant(uploads(5e4, 5e4), {A_SITE: torch.full((2, 2), 5e4)}) == {}
    (said,) = claims.odd({"a": 10.0, "b": 12.0, "c": 4000.0}, "rows")
    assert "c claims rows 4000, 333 times the median" in said or "c claims rows 4000, 400 times" in said
    assert claims.odd({"a": 10.0, "b": 4000.0}, "rows") == []
    assert len(claims.odd({"x": math.nan, "a": 10.0, "b": 12.0, "c": 4000.0, "y": math.nan}, "rows")) == 1


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"loss": 1.0, "accuracy": 0.5}, "n is None"), ({"n": 10**14, "loss": 1.0, "accuracy": 0.5}, "expected 0 to 20"),
        ({"n": 5.0, "loss": 1.0, "accuracy": 0.5}, "n is 5.0"), ({"n": 5, "loss": 10**400, "accuracy": 0.5}, "loss"),
        ({"n": 5, "loss": 1e300, "accuracy": 0.5}, "loss"), ({"n": 5, "loss": 1.0, "accuracy": 1.5}, "accuracy is 1.5"),
        ({"n": 5, "loss": 1.0}, "accuracy is missing"), ({"n": 5, "accuracy": 1.0}, "loss is missing"),
        ({"n": 5, "loss": math.nan, "accuracy": 0.5}, "loss is nan"), ({"n": True, "loss": 1.0, "accuracy": 0.5}, "True"),
        ([5], "scores"), ({"n": 5, "loss": 1.0, "accuracy": 0.5, "evil\n": 1}, "scores"),
    ],
)  # fmt: skip
def test_scores_that_cannot_be_are_refused(given: Any, why: str) -> None:
    with pytest.raises(PacketError, match=why):
        claims.scores(given, 20, "accuracy")


def test_scores_that_can_be_are_taken() -> None:
    assert claims.scores({"n": 20, "loss": 0.5, "accuracy": 1.0}, 20, "accuracy") == {
        "n": 20,
        "loss": 0.5,
        "accuracy": 1.0,
    }
    assert claims.scores({"n": 0, "loss": math.nan}, 0, "accuracy")["n"] == 0


def test_one_site_without_a_metric_does_not_take_it_from_all() -> None:
    full, bare = {"n": 5, "loss": 1.0, "accuracy": 0.5}, {"n": 5, "loss": 1.0}
    kept, left = claims.alike({"a": bare, "b": full, "c": full})
    assert (sorted(kept), list(left)) == (["b", "c"], ["a"])
    assert "accuracy" in left["a"]


def test_histograms_are_of_the_rows_and_classes_there_are() -> None:
    claims.histogram({"train": [3, 4]}, {"train": 7}, 2)
    for bad in ({"train": [3, 5]}, {"train": [7]}, {"test": [1, 0]}):
        with pytest.raises(UploadError, match="histogram"):
            claims.histogram(bad, {"train": 7}, 2)


def test_a_state_that_is_not_finite_is_never_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a simulation, too, where uploads stream and none can be left out afterwards."""
    fed = tiny.federation(METHOD, tmp_path, block=1, sampling=Sampling(rounds=3))
    original = type(METHOD).aggregate

    def broken(self: Any, context: Any, s: ServerState, us: Any) -> ServerState:
        new = original(self, context, s, us)
        return replace(new, params={k: v * math.inf for k, v in new.params.items()}) if s.round == 1 else new

    monkeypatch.setattr(type(METHOD), "aggregate", broken)
    with pytest.raises(TrainingError, match=r"round 2: .* not finite.*The round was dropped"):
        fed.run()
    monkeypatch.undo()
    loaded = fed.store.load_server()
    assert loaded is not None and loaded[0] == 1
    again = tiny.federation(METHOD, tmp_path, block=1, sampling=Sampling(rounds=3))
    assert again.run()["rounds"] == 3


# joining -----------------------------------------------------------------------------------------------------------
class Named:
    """A link of one site, whose answers are given."""

    known = ("hospital-a", "hospital-b")

    def __init__(self, *answers: Packet | str | None):
        self.answers, self.asked = list(answers), 0

    def nodes(self) -> Mapping[int, str | None]:
        return {12345: "hospital-a"}

    def exchange(self, packets: Mapping[int, Packet], deadline: float) -> Iterator[tuple[int, Packet | str]]:
        self.asked += 1
        answer = self.answers.pop(0)
        if answer is not None:
            yield 12345, answer


JOINED = Packet(
    "join", {"run": "r-1", "round": 0, "protocol": PROTOCOL, "base": "0" * 64, "clients": {"hospital-a": {"train": 5}}}
)


@pytest.mark.parametrize("first", [None, "no reply: the connection was cut", Packet("join", {"error": "old"})])
def test_a_site_whose_first_reply_is_lost_is_asked_again(first: Any) -> None:
    """With a pause, and by its name; without a change of its own."""
    link, heard = Named(first, first, JOINED), list[str]()
    here = Attendance(link, {"run": "r-1", "round": 0}, 1.0, 0.02, 0, heard.append)
    end = time.monotonic() + 30
    while not here.sites and time.monotonic() < end:
        here.refresh()
        if link.asked == 1:
            asked = link.asked
            here.refresh()
            assert link.asked == asked or time.monotonic() > here.failed[12345].again - 0.02  # not at once
            assert any("hospital-a" in s for s in here.missing())
            assert "hospital-b (not connected)" in here.missing()
        time.sleep(0.005)
    assert list(here.sites[12345]) == ["hospital-a"]
    assert not here.failed
    assert link.asked == 3
    assert sum("site hospital-a cannot join" in text for text in heard) == 1  # the same reason is said once
    assert not any("12345" in text for text in heard)
    assert not any("hospital-a" in s for s in here.missing())


# what a site does with an order ------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return sites(METHOD, tmp_path_factory.mktemp("site"), 1).sites[0]


def orders() -> dict[str, Packet]:
    fed = tiny.federation(METHOD, "nowhere")
    head = {"run": "run-1", "protocol": PROTOCOL, "recipe": RECIPE, "round": 0}
    part = wire.encode(
        METHOD.broadcast(fed.context, METHOD.init(fed.context), Client("c0", 1)), {"round": 0, "rounds": 3}
    )
    work = {**head, "rounds": 3, "clients": {"c0": None}}
    return {
        "join": Packet("join", {**head, "histograms": True}), "train": Packet("train", work, {"": part}),
        "evaluate": Packet("evaluate", work, {"": part}),
    }  # fmt: skip


ORDERS = orders()


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("what", [*WRONG, "missing"])
def test_no_field_of_an_order_ends_a_site(what: str, kind: str, site: Site) -> None:
    """A code, a sentence, and the next order is answered."""
    order = ORDERS[kind]
    for name in order.header:
        new = GONE if what == "missing" else WRONG[what]
        if (name, what) in {("run", "text"), ("recipe", "empty"), ("histograms", "missing"), ("histograms", "yes")}:
            continue
        reply = site.answer(Packet(order.kind, changed(dict(order.header), (name,), new), order.parts))
        failed = schema.parsed(schema.Failure, reply.header["error"], "reply")
        assert failed.code == "order", (name, what, failed)
        assert failed.text == REASONS["order"]
        json.dumps(reply.header)
    assert "error" not in site.answer(ORDERS["join"]).header


def test_a_recipe_is_not_looked_into_without_end(site: Site) -> None:
    deep: dict[str, Any] = {}
    for _ in range(60):
        deep = {"a": [deep]}
    order = ORDERS["join"]
    with pytest.raises(PacketError, match="at most 24 levels"):
        order_of(Packet("join", {**order.header, "recipe": deep}))
    assert site.answer(Packet("join", {**order.header, "recipe": deep})).header["error"]["code"] == "order"


BAD_PARTS: dict[str, Any] = {
    "none": {}, "null": {"": None}, "text": {"": "x"}, "a list": [b"x"], "bytes": {"": b"x"},
    "not finite": {"": wire.encode({A_SITE: torch.full((4, 16), math.nan)}, {"round": 0})},
    "other leaves": {"": wire.encode({Key("x", "y", "A"): torch.ones(2)}, {"round": 0})},
    "other shapes": {"": wire.encode({A_SITE: torch.ones(3, 3)}, {"round": 0})},
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_PARTS)
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_no_leaves_of_an_order_end_a_site(bad: str, kind: str, site: Site) -> None:
    reply = site.answer(Packet(ORDERS[kind].kind, ORDERS[kind].header, BAD_PARTS[bad]))
    assert schema.parsed(schema.Failure, reply.header["error"], "reply").text
    assert "error" not in site.answer(ORDERS["join"]).header


# anything at all ---------------------------------------------------------------------------------------------------
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(2**61, 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from([10**400, 0.0, "c0", "c3", "loss", "train", "run-1", PROTOCOL]),
)  # fmt: skip
NAMES = st.sampled_from(
    ["run", "round", "rounds", "protocol", "recipe", "clients", "c0", "metrics", "loss", "examples", "tokens", "lines", "view", "split",
     "train", "test", "histogram", "error", "code", "field", "text", "n", "accuracy", "kind", "header", "parts", ""]
)  # fmt: skip
JSON = st.recursive(
    SCALAR,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=6)),
    max_leaves=12,
)
MODELS = {"join": schema.Joined, "train": schema.Trained, "evaluate": schema.Evaluated}
GOOD = {
    "join": dict(JOINED.header),
    "train": {"run": "r-1", "round": 0, "protocol": PROTOCOL, "clients": {"c0": {"examples": 5, "tokens": 9, "metrics": {"loss": 1.0}}}},
    "evaluate": {"run": "r-1", "round": 0, "protocol": PROTOCOL,
                 "lines": [{"view": "personal", "split": "test", "clients": {"c0": {"n": 5, "loss": 1.0, "accuracy": 0.5}}}]},
}  # fmt: skip


@st.composite
def near(draw: st.DrawFn, good: dict[str, Any]) -> Any:
    """A good header in which one place is something else; or nothing like it."""
    if draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    return changed(good, draw(st.sampled_from(list(places(good)))), draw(JSON))


def a_reply(kind: Any, head: Any) -> None:
    """Through all that a server does with it."""
    try:
        said = reply_of(Packet(kind, head), MODELS[kind], kind, "r-1", 0)
        if isinstance(said, schema.Trained):
            schema.parsed(schema.Done, said.clients.get("c0"), "reply")
        elif isinstance(said, schema.Evaluated):
            for one in said.lines:
                for scores in one.clients.values():
                    found = claims.scores(scores, 20, "accuracy")
                    assert found["n"] <= 20 and all(math.isfinite(v) for v in found.values() if found["n"])
    except UploadError as e:
        assert 0 < len(schema.reason(e)) < 3000


def an_order(kind: Any, head: Any) -> None:
    try:
        order_of(Packet(kind, head))
    except PacketError as e:
        said = told(e)
        schema.parsed(schema.Failure, said, "own")
        json.dumps(said)


def a_message(data: bytes) -> None:
    try:
        message, said = wire.decode(data, most=8)
        wire.validate(wire.unpack(message, "fp32"), SPEC, ranks_may_shrink=True)
        schema.same(said, round=0)
    except UploadError as e:
        assert 0 < len(schema.reason(e)) < 3000


SPEC = {A_SITE: wire.Leaf((4, 16), torch.float32)}
MESSAGE = wire.encode({A_SITE: torch.ones(4, 16)}, {"round": 0})
HEAD = 8 + int.from_bytes(MESSAGE[:8], "little")


@st.composite
def bent(draw: st.DrawFn) -> bytes:
    """A message in which some bytes, most of them of its header, are others, or which is cut off."""
    data = bytearray(MESSAGE)
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, HEAD - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def contents(said: str, array: Any) -> None:
    from fedlora.flower import records

    class Content:
        config_records, array_records = {"fedlora": {"json": said}}, {"parts": {"0": array}}

    try:
        records.unpack(Content())  # type: ignore[arg-type]
    except PacketError as e:
        assert 0 < len(schema.reason(e)) < 3000


ENVELOPE = {"kind": "train", "header": GOOD["train"], "parts": ["c0"]}
CASES: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    **{f"reply {k}": (a_reply, (st.just(k), near(GOOD[k]))) for k in MODELS},
    **{f"order {k}": (an_order, (st.just(k), near(dict(p.header)))) for k, p in ORDERS.items()},
    "message": (a_message, (bent(),)),
    "Flower's content": (contents, (st.one_of(near(ENVELOPE).map(json.dumps), st.text(), st.just("[" * 5000)), SCALAR)),
}  # fmt: skip


def fuzz(kind: str, cases: int) -> None:
    run, given_by = CASES[kind]

    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.tuples(*given_by))
    def every(args: tuple[Any, ...]) -> None:
        run(*args)

    every()


@pytest.mark.parametrize("kind", CASES)
def test_anything_is_taken_or_refused(kind: str) -> None:
    if kind == "Flower's content":
        pytest.importorskip("flwr")
    fuzz(kind, 60)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_anything_is_taken_or_refused_a_hundred_thousand_times(kind: str) -> None:
    """And costs neither time nor memory."""
    import resource

    if kind == "Flower's content":
        pytest.importorskip("flwr")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz(kind, 100_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB (bytes on macOS)


@pytest.mark.parametrize(
    "text", ["[" * 10**6, '{"a":' * 10**5, "1" * 10**6, "[" + "0," * 10**6 + "0]", '{"kind": "train", "header": {}, "parts": [' + '"a",' * 10**5 + '"b"]}'],
    ids=["deep list", "deep object", "long number", "long list", "many parts"],
)  # fmt: skip
def test_large_headers_are_cheap(text: str) -> None:
    """None of them is looked into beyond what is allowed: the work is that of reading the text once."""
    from tracemalloc import get_traced_memory, start, stop

    start()
    try:
        with pytest.raises(PacketError):
            schema.parsed(schema.Envelope, schema.json_of(text, "message"), "message")
        assert get_traced_memory()[1] < 64 * 2**20
    finally:
        stop()
