"""A site's policy: what an order may ask, what of an answer leaves, and that nothing else does."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cli import model_folder, rows, write_csv

from fedlora.checkpoints.pretrained import fingerprint, load
from fedlora.cli import main
from fedlora.data import template
from fedlora.deploy import gate as gates
from fedlora.deploy import limits
from fedlora.deploy.audit import Audit, digest
from fedlora.deploy.coordinator import coordinator, told_to_sites
from fedlora.deploy.gate import Gate
from fedlora.deploy.packets import EVERYBODY, PROTOCOL, Packet
from fedlora.deploy.policy import METHODS, Policy
from fedlora.deploy.refusal import REASONS, Refusal, heard, told
from fedlora.deploy.site import Holding, Site, guarded
from fedlora.errors import ConfigError, printable
from fedlora.federation import wire
from fedlora.methods import METHODS as ALL
from fedlora.methods.contract import Client
from fedlora.recipe import Recipe

ROOT = Path(__file__).parents[1]
NOWHERE = "/nowhere/rows.csv"  # an order that is refused before data are touched never notices that there are none
CLASSES = ["food", "sea", "sport"]


def recipe(*sets: str, method: str = "fedsa", model: str = "minilm") -> Recipe:
    """An order that the default policy allows, with changes."""
    raw: dict[str, Any] = {
        "model": {"name": model, "device": "cpu"},
        "data": {"source": "(of the site)", "text": "text", "label": "label", "classes": CLASSES, "max_length": 16},
        "method": {"name": method},
        "train": {"steps": 4, "batch_size": 4, "dropout": False},
        "federation": {"rounds": 2},
        "run": {"threads": 1},
    }
    return Recipe.from_dict(raw, ["run.block=1", *sets])


def policy(**sections: Mapping[str, Any]) -> Policy:
    return Policy(**sections)


def packet(given: Mapping[str, Any], kind: Any = "join", run: str = "r-1", round: int = 0, **more: Any) -> Packet:
    head = {"run": run, "protocol": PROTOCOL, "round": round, "rounds": given["federation"]["rounds"], "recipe": given}
    return Packet(kind, head | {"clients": {"a": None}} | more)


def gate(folder: Path, p: Policy, *accepted: Mapping[str, Any], **more: Any) -> Gate:
    """A gate in front of data that do not exist."""
    return Gate(p, folder, Holding("a", NOWHERE, {}, policy=p).recipe, accept=[digest(a) for a in accepted], **more)


def refusal(g: Gate, order: Packet) -> tuple[str, str | None]:
    with pytest.raises(Refusal) as e:
        g.admit(order)
    return e.value.code, e.value.field


# what may be asked: each field of a policy with an order inside it and one outside -----------------------------------
ASKED: dict[str, tuple[dict[str, Any], list[str], list[str], str]] = {  # policy, inside, outside, field
    "data.classes": ({"data": {"classes": CLASSES}}, [], ["data.classes=[food, plague]"], "data.classes"),
    "data.columns": ({"data": {"columns": ["subject"]}}, ['data.template="{subject} {text}"'], ['data.template="{patient} {text}"'], "data.template"),
    "a column twice": ({}, ['data.template="so: {text}"'], ['data.template="{text}{text}"'], "data.template"),
    "a long template": ({}, ['data.template="so: {text}"'], [f'data.template="{"x" * 501}{{text}}"'], "data.template"),
    "pairs": ({"data": {"text": ["a", "b"]}}, ["data.text=[x, y]"], ["data.text=x"], "data.text"),
    "model.known": ({}, ["model.name=minilm"], ["model.name=somebody/a-model"], "model.name"),
    "a path as model": ({}, ["model.name=minilm"], ["model.name=/etc"], "model.name"),
    "allow.tasks": ({"allow": {"tasks": ["classification"]}}, [], ["model.task=regression"], "model.task"),
    "allow.methods": ({}, ["method.name=homlora"], ["method.name=bitfit"], "method.name"),
    "full": ({}, ["method.name=homlora"], ["method.name=homlora", "method.adapter=full"], "method.adapter"),
    "biases": ({}, ["method.name=homlora", "method.adapter=dora"], ["method.name=homlora", "method.adapter=bitfit"], "method.adapter"),
    "allow.adapters": ({"allow": {"adapters": ["lora"]}}, ["method.name=homlora"], ["method.name=homlora", "method.adapter=dora"], "method.adapter"),
    "sparse": ({"allow": {"methods": ["sft", "slora", "fedsa", "homlora"]}}, [], ["method.name=slora"], "method.adapter"),
    "allow.heads": ({"allow": {"heads": ["personal"]}}, ["method.head=personal"], ["method.head=shared"], "method.head"),
    "targets": ({}, ["model.targets=[query, value]"], ['model.targets="(a+)+$"'], "model.targets"),
    "patterns": ({}, ["method.rank_pattern={query: 4}"], ['method.rank_pattern={"(a+)+$": 4}'], "method.rank_pattern"),
    "least.rows": ({"least": {"rows": 17}}, ["train.steps=5"], ["train.steps=4"], "train.steps"),
    "least.batch": ({}, ["train.batch_size=4"], ["train.batch_size=3", "train.steps=9"], "train.batch_size"),
    "least.steps": ({"least": {"steps": 5}}, ["train.steps=5"], ["train.steps=4"], "train.steps"),
    "most.rank": ({}, ["method.rank=64"], ["method.rank=65"], "method.rank"),
    "VeRA's rank": ({}, ["method.adapter=vera"], ["method.adapter=vera", "method.rank=100000"], "method.rank"),
    "a pattern's rank": ({}, ["method.rank_pattern={query: 64}"], ["method.rank_pattern={query: 65}"], "method.rank_pattern"),
    "most.steps": ({}, ["train.steps=1000"], ["train.steps=1000000000"], "train.steps"),
    "steps of tuning": ({}, ["method.name=fedavg-ft"], ["method.name=fedavg-ft", "method.tune=1001"], "method.tune"),
    "most.epochs": ({}, ["train.steps=null", "train.epochs=10"], ["train.steps=null", "train.epochs=10.5"], "train.epochs"),
    "most.batch": ({}, ["train.batch_size=256"], ["train.batch_size=257"], "train.batch_size"),
    "a batch of evaluation": ({}, ["evaluation.batch_size=256"], ["evaluation.batch_size=257"], "evaluation.batch_size"),
    "most.tokens": ({}, ["data.max_length=512"], ["data.max_length=513"], "data.max_length"),
    "most.rounds": ({}, ["federation.rounds=500"], ["federation.rounds=501"], "federation.rounds"),
}  # fmt: skip


@pytest.mark.parametrize("name", ASKED)
def test_an_order_within_the_policy_is_taken_and_one_outside_is_not(name: str, tmp_path: Path) -> None:
    sections, inside, outside, field = ASKED[name]
    good, bad = (told_to_sites(recipe(*sets)) for sets in (inside, outside))
    g = gate(tmp_path, policy(**sections), good, bad)  # both accepted by the operator: the policy comes first
    if name == "pairs":
        assert refusal(g, packet(bad)) == ("policy", field)
        g.admit(packet(good))
        return
    g.admit(packet(good))
    assert refusal(g, packet(bad)) == ("policy", field)
    asked = [x["recipe"] for x in g.audit.lines() if x["event"] == "asked"]
    assert asked == [digest(good)]


def test_the_default_allows_low_rank_updates_alone() -> None:
    """By the leaves that methods send, not by their names: A, B, d, b, m, ranks and norms, and the head."""
    from fedlora.methods.facts import leaves

    sgd = {"scaffold": ["train.optimizer=sgd"]}  # which it is for
    asked = {n: recipe(*sgd.get(n, []), method=n) for n in ALL}
    allowed = {n for n, m in ALL.items() if not m.pooled and not limits.problems(Policy(), asked[n])}
    assert allowed == set(METHODS)
    for name in ALL:
        sent = set(leaves(ALL[name]())[0])  # type: ignore[call-arg]
        if name in allowed:
            assert sent <= {"A", "B", "rank", "norm", "head"}
        elif not ALL[name].pooled:
            assert sent & {"weight", "bias", "values", "down", "table", "dA", "R", "cA", "A_rest"}, name


def test_all_that_is_wrong_with_a_policy_is_said_at_once(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "least: {rows: 0, batch: 300}\nmost: {rank: many, flavour: 1}\nallow: {adapters: [lora, wings]}\nsend: 3\nwhat: 1\n"
    )
    with pytest.raises(ConfigError) as e:
        Policy.load(path)
    found = {p.field for p in e.value.problems}
    assert found == {"what", "least.rows", "most.rank", "most.flavour", "allow.adapters", "send"}
    with pytest.raises(ConfigError) as e:
        policy(data={"label": "text", "template": "{text:>9}"}, least={"batch": 300}, allow={"methods": ["magic"]})
    assert {p.field for p in e.value.problems} == {"data.label", "data.template", "least.batch", "allow.methods"}
    path.write_text(Policy().to_yaml())
    assert Policy.load(path) == Policy()


def test_a_server_says_which_columns_it_needs_and_the_site_which_they_are() -> None:
    """No name of a column, no encoding and no file comes from the server."""
    p = policy(data={"text": "note", "label": "outcome", "encoding": "latin-1"})
    r = Holding("a", "a.csv", {}, policy=p).recipe(
        told_to_sites(
            recipe(
                "data.text=patient",
                "data.label=diagnosis",
                "data.encoding=utf-16",
                "data.test=/etc/passwd",
                "data.limit=1",
            )
        )
    )
    assert (r.data.text, r.data.label, r.data.encoding, r.data.source, r.data.test, r.data.limit) == (
        "note",
        "outcome",
        "latin-1",
        "a.csv",
        None,
        None,
    )
    p = policy(data={"text": "note", "template": "{subject}: {note}"})
    r = Holding("a", "a.csv", {}, policy=p).recipe(told_to_sites(recipe()))
    assert (r.data.text, r.data.template) == (None, "{subject}: {note}")
    trusting = Holding("a", "a.csv", {}).recipe(told_to_sites(recipe("data.label=diagnosis")))
    assert trusting.data.label == "diagnosis"


def test_an_order_outside_the_policy_is_refused_before_data_are_read(tmp_path: Path) -> None:
    """There are none here: whoever looks for them says so."""
    given = told_to_sites(recipe("train.batch_size=1"))
    s = guarded(Holding("a", NOWHERE, {}, policy=Policy(), device="cpu"), tmp_path, accept=[digest(given)])
    assert s.answer(packet(given)).header["error"]["code"] == "policy"


# how often -----------------------------------------------------------------------------------------------------------
def test_rounds_scores_and_runs_are_counted_over_a_day_and_a_restart(tmp_path: Path) -> None:
    now = [1e9]
    given = told_to_sites(recipe("federation.rounds=3"))
    limit = policy(most={"rounds": 3, "rounds_a_day": 4, "scores_a_day": 2, "runs_a_day": 2})

    def again() -> Gate:
        return gate(tmp_path, limit, given, clock=lambda: now[0])

    for _ in range(3):
        again().admit(packet(given, "train"))
    assert refusal(again(), packet(given, "train")) == ("limit", "federation.rounds")
    again().admit(packet(given, "train", run="r-2"))
    assert refusal(again(), packet(given, "train", run="r-2"))[0] == "limit"  # four today
    for _ in range(2):
        again().admit(packet(given, "evaluate"))
    assert refusal(again(), packet(given, "evaluate"))[0] == "limit"
    assert refusal(again(), packet(given, run="r-3"))[0] == "limit"
    now[0] += 24 * 3600 + 1
    again().admit(packet(given, run="r-3"))
    again().admit(packet(given, "train", run="r-2"))
    again().admit(packet(given, "evaluate"))


@pytest.mark.parametrize("more", [{"round": -1}, {"round": 2}, {"round": True}, {"round": "0"}, {"rounds": 3}])
def test_a_round_is_one_of_the_recipe(more: dict[str, Any], tmp_path: Path) -> None:
    given = told_to_sites(recipe())
    assert refusal(gate(tmp_path, Policy(), given), packet(given, "train", **more))[0] == "order"


def test_a_message_is_no_larger_than_the_policy_says(tmp_path: Path) -> None:
    given = told_to_sites(recipe())
    g = gate(tmp_path, policy(most={"gigabytes": 1e-6}), given)
    g.admit(Packet("train", packet(given, "train").header, {"": bytes(1000)}))
    assert refusal(g, Packet("train", packet(given, "train").header, {"": bytes(1001)}))[0] == "policy"


# consent -------------------------------------------------------------------------------------------------------------
def test_a_recipe_is_shown_and_asked_for_once(tmp_path: Path) -> None:
    given = told_to_sites(recipe())
    shown: list[str] = []
    answers = iter([True])
    g = gate(tmp_path, Policy(), ask=lambda q: next(answers), say=shown.append)
    g.admit(packet(given))
    for text in (
        "minilm",
        "label label",
        "FedSA-LoRA, at most 2 rounds of 4 steps with 4 rows",
        "sends:      A, head",
        "scores: no",
        digest(given),
    ):
        assert text in shown[0]
    g.admit(packet(given, "train"))
    gate(tmp_path, Policy()).admit(packet(given, run="r-9"))  # started again, with nobody there: it is remembered
    other = told_to_sites(recipe("train.lr=0.5"))
    assert refusal(gate(tmp_path, Policy()), packet(other))[0] == "consent"


def test_without_consent_nothing_is_done(tmp_path: Path) -> None:
    given, asked = told_to_sites(recipe()), []
    g = gate(tmp_path, Policy(), ask=lambda q: bool(asked.append(q)))
    assert [refusal(g, packet(given))[0] for _ in range(3)] == ["consent"] * 3
    assert len(asked) == 1  # a server cannot wear an operator out
    assert refusal(gate(tmp_path, Policy(), told_to_sites(recipe("train.lr=0.5"))), packet(given))[0] == "consent"


# nothing but codes leaves --------------------------------------------------------------------------------------------
SECRETS = ("Zebedee", "syphilis", "Q9column", "ward-of-shame", "beside-it", "4711.59")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with secrets in its name, in the files beside, in columns, labels and texts."""
    folder = tmp_path_factory.mktemp("site") / "ward-of-shame"
    folder.mkdir()
    model_folder(folder / "model")
    good = [(text, label, "Zebedee") for text, label, _ in rows(90)]
    write_csv(folder / "good.csv", good, ("text", "label", "Q9column"))
    write_csv(folder / "label.csv", [*good, ("Zebedee coughs", "syphilis", "x")], ("text", "label", "Q9column"))
    write_csv(folder / "empty.csv", [*good, ("Zebedee coughs", "", "x")], ("text", "label", "Q9column"))
    write_csv(folder / "real.csv", [(t, "4711.59", w) for t, _, w in good], ("text", "label", "Q9column"))
    write_csv(folder / "column.csv", good, ("text", "Q9column", "other"))
    write_csv(folder / "few.csv", good[:9], ("text", "label", "Q9column"))
    (folder / "encoding.csv").write_bytes(b"text,label\nZebedee has syphilis,food\n" + b"\xff\xfe,sea\n")
    (folder / "cut.csv").write_text('text,label\n"Zebedee has syphilis,food\n')
    (folder / "lines.csv").write_text("text,label\nZebedee,syphilis,4711.59\n")
    (folder / "beside-it.csv").write_text("Q9column\n1\n")
    return folder


def site(
    home: Path, state: Path, data: str = "good.csv", given: Mapping[str, Any] | None = None, **sections: Any
) -> Site:
    p = Policy(**sections).with_columns({}, str(home / "model"))
    holding = Holding("a", str(home / data), {}, policy=p, threads=1, device="cpu")
    return guarded(holding, state, accept=[digest(given or told_to_sites(recipe()))])


DATA = {
    "label": ("label.csv", "data.label"), "empty": ("empty.csv", "data.label"), "real": ("real.csv", "data.label"),
    "column": ("column.csv", "data.label"), "encoding": ("encoding.csv", "data.source"), "cut": ("cut.csv", "data.source"),
    "lines": ("lines.csv", "data.source"), "none": ("no-such-ward-of-shame.csv", "data.source"), "few": ("few.csv", None),
}  # fmt: skip


def bytes_of(reply: Packet) -> bytes:
    return json.dumps(dict(reply.header)).encode() + b"".join(reply.parts.values())


def refused(reply: Packet, said: list[str]) -> dict[str, Any]:
    """The error of a reply, which holds no secret, though the site's own log does say what is wrong."""
    text = bytes_of(reply)
    for secret in SECRETS:
        assert secret.encode() not in text, secret
    error = reply.header["error"]
    assert set(error) == {"code", "field", "text"}
    assert error["text"] == REASONS[error["code"]]
    assert said
    return dict(error)


@pytest.mark.parametrize("name", DATA)
def test_data_that_do_not_fit_are_told_as_a_code(name: str, home: Path, tmp_path: Path) -> None:
    file, field = DATA[name]
    s = site(home, tmp_path, file)
    said: list[str] = []
    s.say = said.append
    error = refused(s.answer(packet(told_to_sites(recipe()))), said)
    assert (error["code"], error["field"]) == (("rows" if name == "few" else "data"), field)
    assert any(x in "".join(said) for x in (*SECRETS, "row 91", "6 rows"))  # the particulars are for the site alone
    (line,) = [x for x in Audit(tmp_path).lines() if x["event"] == "refused"]
    assert line["code"] == error["code"]


class Sick(RuntimeError):
    """An error that nobody has thought of, with a secret in it."""


FAILURES: dict[str, tuple[BaseException, str]] = {
    "memory": (MemoryError("Zebedee"), "memory"),
    "an allocator": (RuntimeError("DefaultCPUAllocator: Zebedee"), "memory"),
    "a full disk": (OSError(errno.ENOSPC, "No space left", "/ward-of-shame/Zebedee"), "disk"),
    "no permission": (PermissionError(errno.EACCES, "denied", "/ward-of-shame"), "disk"),
    "something": (Sick("syphilis of Zebedee"), "failure"),
    "a key": (KeyError("Q9column"), "failure"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_whatever_fails_is_told_as_a_code(name: str, tmp_path: Path) -> None:
    """Also what no part of the program has foreseen; and the site goes on."""
    e, code = FAILURES[name]
    said: list[str] = []

    def make(given: Mapping[str, Any], folder: Path) -> Any:
        raise e

    s = Site(make, tmp_path, say=said.append)
    for _ in range(2):
        assert refused(s.answer(packet(told_to_sites(recipe()))), said)["code"] == code


ODD: dict[str, Callable[[Packet], Packet]] = {
    "protocol": lambda p: Packet(p.kind, {**p.header, "protocol": 99}),
    "no recipe": lambda p: Packet(p.kind, {k: v for k, v in p.header.items() if k != "recipe"}),
    "recipe of another kind": lambda p: Packet(p.kind, {**p.header, "recipe": {"data": "Q9column"}}),
    "a run that is a path": lambda p: Packet(p.kind, {**p.header, "run": "../../a"}),
    "foreign clients": lambda p: Packet("train", {**p.header, "clients": {"b": None}}),
    "no leaves": lambda p: Packet("train", p.header),
    "leaves cut off": lambda p: Packet("train", p.header, {EVERYBODY: b"hello"}),
}


def test_odd_orders_are_told_as_a_code(home: Path, tmp_path: Path) -> None:
    given = told_to_sites(recipe())
    s = site(home, tmp_path)
    said: list[str] = []
    s.say = said.append
    codes = {name: refused(s.answer(change(packet(given))), said)["code"] for name, change in ODD.items()}
    assert set(codes.values()) <= {"order", "failure", "recipe"}
    assert codes["protocol"] == codes["foreign clients"] == codes["leaves cut off"] == "order"


def test_fields_are_told_by_their_own_names_only() -> None:
    from fedlora.errors import Problem

    assert told(ConfigError([Problem("data.Zebedee", 1, "x")]))["field"] is None
    assert told(ConfigError([Problem("method.rank", 1, "x")]))["field"] == "method.rank"
    assert set(heard({"code": "data", "field": "data.label", "text": "x"})) >= set("data")
    assert heard({"code": "data", "field": None}) == f"{REASONS['data']} (data)"
    assert "\x1b" not in heard({"code": "\x1b[2J", "field": "\x1b", "text": "\x1b]0;x"})


# what leaves ---------------------------------------------------------------------------------------------------------
def order(s: Site, kind: Any, given: Mapping[str, Any], home: Path, tmp_path: Path, round: int = 0) -> Packet:
    """A train or evaluate order with the method's own leaves, as a server of ours writes it."""
    server = coordinator(
        Recipe.from_dict({**given, "model": {**given["model"], "name": str(home / "model")}}),
        tmp_path / "server",
        lambda: None,  # type: ignore[arg-type, return-value]
    )
    params = server.method.broadcast(server.context, server.method.init(server.context), Client("a", 1))
    facts = {"round": round, "rounds": given["federation"]["rounds"]}
    return s.answer(Packet(kind, packet(given, kind, round=round).header, {EVERYBODY: wire.encode(params, facts)}))


def test_only_the_adapter_leaves_unless_it_is_said(home: Path, tmp_path: Path) -> None:
    """By default no loss, score or token count, even where the recipe asks for all; the audit log is what was sent."""
    given = told_to_sites(recipe("deployment.histograms=true"))
    s = site(home, tmp_path, given=given, least={"score_rows": 1})
    joined = s.answer(packet(given, histograms=True))
    assert set(joined.header) == {"run", "round", "protocol", "clients", "base"}
    assert joined.header["clients"] == {"a": {"train": 63, "validation": 9, "test": 18}}
    trained = order(s, "train", given, home, tmp_path)
    assert trained.header["clients"] == {"a": {"examples": 63, "metrics": {}}}
    assert {f"{k.adapter}.{k.part}" for k in wire.decode(trained.parts["a"])[0]} == {
        "lora.A",
        "head.weight",
        "head.bias",
    }
    assert order(s, "evaluate", given, home, tmp_path).header["lines"] == []
    sent = [x for x in Audit(tmp_path).lines() if x["event"] == "sent"]
    assert [x["kind"] for x in sent] == ["join", "train", "evaluate"]
    assert sent[1]["parts"]["a"] == {
        "bytes": len(trained.parts["a"]),
        "sha256": hashlib.sha256(trained.parts["a"]).hexdigest(),
    }
    assert sent[1]["leaves"] == {str(k): list(v.shape) for k, v in wire.decode(trained.parts["a"])[0].items()}


def test_scores_are_rounded_and_have_rows_behind_them(home: Path, tmp_path: Path) -> None:
    given = told_to_sites(recipe("deployment.histograms=true"))
    s = site(
        home, tmp_path, given=given, send={"scores": True, "digits": 1, "histograms": True}, least={"score_rows": 18}
    )
    assert s.answer(packet(given, histograms=True)).header["clients"]["a"]["histogram"]["train"] == [21, 21, 21]
    loss = order(s, "train", given, home, tmp_path).header["clients"]["a"]["metrics"]["loss"]
    assert loss == round(loss, 1)
    lines = order(s, "evaluate", given, home, tmp_path).header["lines"]
    assert {x["split"] for x in lines} == {"test"}  # the 9 rows of validation are too few
    assert all(v == round(v, 1) for x in lines for v in x["clients"]["a"].values())


def test_an_upload_of_other_leaves_is_held_back(home: Path, tmp_path: Path) -> None:
    """Whatever its recipe has been called: embeddings and personal heads do not leave."""
    from fedlora.tree import Key

    g = gate(tmp_path, Policy(), told_to_sites(recipe()))
    fed: Any = None
    for key, ok in (
        (Key("lora", "x", "A"), True),
        (Key("lora", "x", "B~scale"), True),
        (Key("head", "x", "weight"), True),
        (Key("full", "x", "table"), False),
    ):
        reply = Packet(
            "train", {"clients": {"a": {"examples": 1, "metrics": {}}}}, {"a": wire.encode({key: torch.zeros(2, 2)})}
        )
        if ok:
            g.leave(reply, fed)
        else:
            with pytest.raises(Refusal, match="table"):
                g.leave(reply, fed)
    closed = gate(tmp_path / "b", policy(allow={"heads": ["personal"]}))
    with pytest.raises(Refusal, match="head"):
        closed.leave(
            Packet("train", {"clients": {}}, {"a": wire.encode({Key("head", "x", "weight"): torch.zeros(2)})}), fed
        )


def test_an_order_has_its_time_and_its_memory(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = told_to_sites(recipe())
    s = site(home, tmp_path / "memory", most={"gigabytes": 1e-5})
    assert s.answer(packet(given)).header["error"]["code"] == "memory"
    s = site(home, tmp_path / "time", most={"seconds": 1e4})
    assert "error" not in s.answer(packet(given)).header
    clock = iter([0.0, *[1e4 - 1] * 3, *[1e4 + 1] * 99])
    monkeypatch.setattr(gates.time, "monotonic", lambda: next(clock))
    reply = order(s, "train", given, home, tmp_path)
    assert reply.header["error"]["code"] == "time"
    assert not reply.parts
    left = 103 - len(list(clock))
    assert left < 20  # it stopped at a step, not at the end


def test_epochs_are_steps_once_the_rows_are_known(home: Path, tmp_path: Path) -> None:
    given = told_to_sites(recipe("train.steps=null", "train.epochs=0.1"))
    s = site(home, tmp_path, given=given)
    assert s.answer(packet(given)).header["error"]["code"] == "rows"


def test_what_cannot_be_recorded_is_not_sent(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = site(home, tmp_path)
    write = Audit.write

    def full(self: Audit, event: str, **facts: Any) -> None:
        if event == "sent":
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        write(self, event, **facts)

    monkeypatch.setattr(Audit, "write", full)
    assert s.answer(packet(told_to_sites(recipe()))).header["error"]["code"] == "disk"


@pytest.mark.parametrize("scores", [True, False])
def test_a_run_through_gates_comes_to_its_end(
    scores: bool, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites whose columns have other names, with scores and without; the report and the tables do without them."""
    from test_deploy import Loop

    tables = pytest.importorskip("fedlora.cli.tables")
    from fedlora.report import write_run

    r = recipe("deployment.clients=2", "federation.min_clients=2", model="./model")
    monkeypatch.chdir(home)
    given = told_to_sites(r)
    write_csv(tmp_path / "b.csv", [(t, c, w) for t, c, w in rows(90, 1)], ("note", "outcome", "who"))
    p = policy(model={"known": {"./model": None}}, send={"scores": scores}, least={"score_rows": 9})
    kinds = {0: ("a", home / "good.csv", {}), 1: ("b", tmp_path / "b.csv", {"text": "note", "label": "outcome"})}
    sites = {
        n: guarded(
            Holding(id, str(data), columns, threads=1, policy=p.with_columns(columns)), tmp_path / id, accept=[digest(given)]
        )
        for n, (id, data, columns) in kinds.items()
    }  # fmt: skip
    said: list[str] = []
    there = coordinator(r, tmp_path / "run", lambda: Loop(sites), said.append)
    summary = there.run()
    assert summary["rounds"] == 2
    assert (summary["test"] is not None) == scores
    assert f"sites accept this recipe with --accept {digest(given)}" in said
    assert [x["event"] for x in Audit(tmp_path / "a").lines()][:4] == ["start", "accepted", "asked", "sent"]
    write_run(tmp_path / "run")
    from rich.console import Console

    tables.result(Console(), tmp_path / "run")
    assert ("at round" if scores else "no scores") in capsys.readouterr().out


# one base ------------------------------------------------------------------------------------------------------------
def test_a_fingerprint_is_of_weights_alone(home: Path, tmp_path: Path) -> None:
    model_folder(tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="the head's outputs are drawn anew"):  # which are no part of it
        one, two = load(str(home / "model"), classes=2), load(str(tmp_path / "elsewhere"), classes=5, seed=9)
    name = fingerprint(one.base, one.head)
    assert name == fingerprint(two.base, two.head)
    with torch.no_grad():
        next(p for n, p in two.base.named_parameters() if "word" in n)[3, 1] += 1e-6
    assert fingerprint(two.base, two.head) != name
    assert fingerprint(one.base) != name


def test_a_model_that_is_known_by_its_weights(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked before a row is read: there are none."""
    monkeypatch.chdir(home)
    name = "./model"  # a server does not tell its absolute folders
    loaded = load(name, classes=3)
    for known, code in ((fingerprint(loaded.base, loaded.head), "data"), ("0" * 64, "base")):
        p = policy(model={"known": {name: known}})
        given = told_to_sites(recipe(model=name))
        s = guarded(Holding("a", NOWHERE, {}, policy=p), tmp_path / code, accept=[digest(given)])
        assert s.answer(packet(given)).header["error"]["code"] == code


def test_sites_share_the_servers_base(tmp_path: Path) -> None:
    from test_deploy import METHOD, Loop, Remote, Sampling, Terms, server

    def make(change: float) -> Callable[[Mapping[str, Any], Path], Any]:
        base = tiny.bert()
        with torch.no_grad():
            next(base.parameters())[0, 0] += change
        k = int(change > 0)
        return lambda given, where: tiny.federation(METHOD, where, base, data=tiny.data().only(k), block=1, keep="all")

    for same, ids in ((True, ["c0"]), (False, ["c0", "c1"])):
        folder = tmp_path / str(same)
        link = Loop({k: Site(make(x), folder / f"site{k}") for k, x in enumerate((0.0, 1e-3))})
        heard_: list[str] = []
        there = server(METHOD, folder / "there", link, sampling=Sampling(rounds=1))
        asked = {"data": {}, "deployment": {"same_base": same}}
        there.runtime = lambda f, watch, link=link, asked=asked, heard_=heard_: Remote(
            f, watch, link, Terms(poll=0.0), asked, heard_.append
        )  # type: ignore[misc]
        there.run()
        assert there.data.ids == ids
        assert any("same_base" in text for text in heard_) == same
    assert recipe().hash == recipe("deployment.same_base=false").hash


# templates -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "odd", ["{text:>100000000}", "{text!r}", "{text.__class__}", "{text[0]}", "{}", "{0}", "{text"]
)
def test_a_template_holds_plain_names(odd: str) -> None:
    with pytest.raises(ConfigError) as e:
        recipe(f"data.template={json.dumps(odd + ' {text}')}")
    assert [p.field for p in e.value.problems] == ["data.template"]
    assert template.fill(template.parts("{{{a b}}} {c}"), {"a b": "{x}", "c": "y"}) == "{{x}} y"


# no code over the wire -----------------------------------------------------------------------------------------------
LOADERS = ("from_pretrained", "from_config", "load_dataset", "load_dataset_builder", "pipeline")


def loaders(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in LOADERS:
                yield node


def test_no_loader_may_run_remote_code() -> None:
    """Without the keyword transformers asks whoever sits at the terminal, and runs the code on a "y"."""
    found = [(p, c) for d in ("src", "bench", "examples") for p in sorted((ROOT / d).rglob("*.py")) for c in loaders(p)]
    assert len(found) >= 3
    for path, call in found:
        said = {k.arg: k.value for k in call.keywords}.get("trust_remote_code")
        assert isinstance(said, ast.Constant) and said.value is False, f"{path}:{call.lineno}"


# what the other side has sent is printed harmlessly ------------------------------------------------------------------
def test_escape_sequences_reach_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_deploy import METHOD, RECIPE, Remote, Terms, server, sites

    link = sites(METHOD, tmp_path, 3)
    evil = "\x1b]0;owned\x07\x1b[2J\u202e"
    said: list[str] = []

    def change(node: int, asked: Packet, reply: Packet) -> Packet | str:
        if node == 1:
            return Packet(reply.kind, {**reply.header, "error": {"code": evil, "field": evil, "text": evil}})
        if node == 2 and asked.kind == "join":
            return Packet(reply.kind, {**reply.header, "clients": {f"c2{evil}": {"train": 9}}})
        return f"no reply {evil}" if asked.kind == "train" and asked.header["round"] == 1 else reply

    link.change = change
    there = server(METHOD, tmp_path / "there", link)
    there.runtime = lambda f, watch: Remote(f, watch, link, Terms(attempts=1, poll=0.0), RECIPE, said.append)
    with pytest.raises(Exception, match="no reply"):
        there.run()
    files = "".join(p.read_text() for p in (tmp_path / "there").rglob("*.json*"))
    for text in ("".join(said), files):
        assert "owned" in text
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "\\u001b" not in files
    assert "\\u202e" not in files.replace("\\\\u202e", "")  # neither as JSON writes it
    assert main(["status", str(tmp_path / "there")]) == 0
    assert "\x1b]" not in capsys.readouterr().out
    assert printable("a\nb\x1b", 9) == "a\\nb\\x1b"


# the attack ----------------------------------------------------------------------------------------------------------
def test_one_row_of_full_fine_tuning_is_read_back_only_where_the_server_is_trusted(home: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import inversion
    finally:
        sys.path.pop(0)
    texts = [(text, label) for text, label, _ in rows(60)]
    trusted = inversion.attack(str(home / "model"), texts, tmp_path / "trusted", True)
    assert trusted == [1.0] * inversion.ROWS
    assert inversion.attack(str(home / "model"), texts, tmp_path / "guarded", False) == [0.0] * inversion.ROWS


# the command line ----------------------------------------------------------------------------------------------------
def test_the_client_says_all_that_is_wrong_with_its_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "site.yaml").write_text("least: {rows: 0}\n")
    line = ["client", "--id", "a", "--server", "h", "--data", "none.csv", "--insecure"]
    assert main([*line, "--policy", str(tmp_path / "site.yaml"), "--accept", "12ab"]) == 2
    said = capsys.readouterr().err
    assert all(f in said for f in ("least.rows", "--accept", "--server", "--data"))
    assert main([*line, "--trust-server", "--share-scores"]) == 2
    assert "--trust-server" in capsys.readouterr().err
