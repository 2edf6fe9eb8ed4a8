"""A deployment without a network: sites and a server that speak in packets, against the simulation on the same data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_contract import TABLE

from fedlora.data.federated import roster
from fedlora.deploy.packets import Packet
from fedlora.deploy.remote import Remote, Terms
from fedlora.deploy.site import Site
from fedlora.errors import TrainingError
from fedlora.federation import wire
from fedlora.federation.run import Federation
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods.contract import Method
from fedlora.tree import Key, Params

RECIPE = {"data": {}, "deployment": {}}
DEPLOYED = [n for n, row in TABLE.items() if not row.method.pooled]


class Loop:
    """Sites called directly. change: what becomes of a reply on its way; alive: who is there."""

    def __init__(self, sites: Mapping[int, Site], names: Mapping[int, str | None] | None = None):
        self.sites, self.names = sites, names or dict.fromkeys(sites)
        self.alive = set(sites)
        self.seen: list[tuple[int, Packet, Packet | str]] = []
        self.change: Callable[[int, Packet, Packet], Packet | str | None] = lambda node, order, reply: reply

    def nodes(self) -> Mapping[int, str | None]:
        return {n: self.names[n] for n in sorted(self.alive)}

    def exchange(self, packets: Mapping[int, Packet], deadline: float) -> Iterator[tuple[int, Packet | str]]:
        for node in sorted(packets, key=lambda n: (n % 2, -n)):  # replies arrive neither as asked for nor by size
            if node not in self.alive:
                continue
            order = packets[node]
            as_sent = Packet(order.kind, json.loads(json.dumps(order.header)), dict(order.parts))
            answer = self.sites[node].answer(as_sent)
            reply = self.change(node, order, Packet(answer.kind, json.loads(json.dumps(answer.header)), answer.parts))
            self.seen.append((node, order, reply if reply is not None else "late"))
            if reply is not None:
                yield node, reply


def sites(method: Method, folder: Path, count: int = 4, **more: Any) -> Loop:
    def make(k: int) -> Callable[[Mapping[str, Any], Path], Federation]:
        return lambda recipe, where: tiny.federation(
            method, where, data=tiny.data().only(k), block=1, keep="all", **more
        )

    return Loop({k: Site(make(k), folder / f"site{k}") for k in range(count)})


def server(method: Method, folder: Path, link: Loop, terms: Terms | None = None, **more: Any) -> Federation:
    terms = terms or Terms(clients=len(link.sites), poll=0.0)
    return tiny.federation(
        method,
        folder,
        data=roster([], {"train": []}),
        runtime=lambda f, watch: Remote(f, watch, link, terms, RECIPE),
        **more,
    )


def lines(f: Federation) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (f.store.root / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def state(f: Federation) -> Params:
    loaded = f.store.load_server()
    assert loaded is not None
    return loaded[1]


@pytest.mark.parametrize("name", DEPLOYED)
def test_deployment_equals_simulation(name: str, tmp_path: Path) -> None:
    """The same leaves, scores and bytes, bit for bit; and nothing but declared leaves on the wire."""
    method = TABLE[name].method
    length = {"sampling": Sampling(rounds=3 if name == "slora" else 2)}
    here = tiny.federation(method, tmp_path / "here", block=1, **length)
    here.run()
    link = sites(method, tmp_path)
    there = server(method, tmp_path / "there", link, **length)
    there.run()
    tiny.close(state(here), state(there), tol=0)
    theirs, ours = lines(there), lines(here)
    assert [x["kind"] for x in theirs] == [x["kind"] for x in ours]
    for a, b in zip(theirs, ours, strict=True):
        if a["kind"] == "train":
            for field in ("round", "loss", "losses", "clients", "examples", "refused", "exactness", "ranks"):
                assert a.get(field) == b.get(field), field
            assert a["bytes"]["up"] == b["bytes"]["up"]
            assert a["bytes"]["down"] == b["bytes"]["down"]
        elif a["kind"] == "eval":  # a simulation may put all clients' rows in one batch
            assert [a[k] for k in ("round", "view", "split")] == [b[k] for k in ("round", "view", "split")]
            for client, scores in a["clients"].items():
                assert scores == pytest.approx(b["clients"][client], rel=1e-5)
            assert a["clients"].keys() == b["clients"].keys()
    for _, order, reply in link.seen:
        if order.kind == "train":
            assert isinstance(reply, Packet)
            for part in reply.parts.values():
                leaves, _ = wire.decode(part)
                stages = {"lora.A", "lora.B", "common.A", "common.B"} if "slora" in name or name == "rolora" else set()
                assert {f"{k.adapter}.{k.part}" for k in leaves} <= set(TABLE[name].uploads.split()) | stages


METHOD = TABLE["fedsa"].method
A_SITE = Key("lora", "bert.encoder.layer.0.attention.self.query", "A")


def uploads_of(change: Callable[[Params], Params]) -> Callable[[Packet], Packet]:
    """A reply whose leaves are other ones."""

    def changed(reply: Packet) -> Packet:
        out = {}
        for c, part in reply.parts.items():
            leaves, header = wire.decode(part)
            out[c] = wire.encode(change(leaves), header)
        return Packet(reply.kind, reply.header, out)

    return changed


def at(k: Key, f: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Params], Params]:
    return lambda p: p | {k: f(p[k])}


def header(**more: Any) -> Callable[[Packet], Packet]:
    return lambda reply: Packet(reply.kind, {**reply.header, **more}, reply.parts)


def parts(f: Callable[[bytes], bytes]) -> Callable[[Packet], Packet]:
    return lambda reply: Packet(reply.kind, reply.header, {c: f(p) for c, p in reply.parts.items()})


FAULTS = {
    "NaN": (uploads_of(at(A_SITE, lambda v: v * float("nan"))), "non-finite"),
    "infinite": (uploads_of(at(A_SITE, lambda v: v / 0)), "non-finite"),
    "wrong shape": (uploads_of(at(A_SITE, lambda v: v.mT.contiguous())), "expected [4, 16]"),
    "higher rank": (uploads_of(at(A_SITE, lambda v: torch.cat([v, v]))), "expected [4, 16]"),
    "lower rank": (uploads_of(at(A_SITE, lambda v: v[:2].contiguous())), "expected [4, 16]"),
    "other dtype": (uploads_of(at(A_SITE, lambda v: v.double())), "float64"),
    "personal leaf": (uploads_of(lambda p: p | {A_SITE._replace(part="B"): torch.zeros(16, 4)}), "unexpected"),
    "missing leaf": (uploads_of(lambda p: {k: v for k, v in p.items() if k != A_SITE}), "missing"),
    "truncated": (parts(lambda b: b[: len(b) // 2]), "cut off"),
    "not a message": (parts(lambda b: b"hello"), "cut off"),
    "no parts": (lambda reply: Packet(reply.kind, reply.header), "no leaves of this client"),
    "another run": (header(run="abc-123"), "run 'abc-123'"),
    "another round": (header(round=17), "round 17"),
    "another kind": (lambda reply: Packet("evaluate", reply.header, reply.parts), "kind 'evaluate'"),
    "another version": (header(protocol=99), "protocol 99"),
    "no clients": (header(clients=None), "clients is None"),
    "an error": (header(error={"code": "paper", "field": None, "text": "out of paper"}), "out of paper (paper)"),
    "an error of the old form": (header(error="out of paper"), "in an old form"),
    "Flower's error": (lambda reply: "node unavailable", "node unavailable"),
    "too large a step": (uploads_of(at(A_SITE, lambda v: v * 1e9)), "exceeds the bound"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_upload_is_refused_and_the_round_goes_on(fault: str, tmp_path: Path) -> None:
    """Refused with its reason; the others count; the client goes on from what was accepted before."""
    change, reason = FAULTS[fault]
    link = sites(METHOD, tmp_path)
    link.change = lambda node, order, reply: (
        change(reply) if node == 3 and order.kind == "train" and order.header["round"] == 1 else reply
    )
    there = server(METHOD, tmp_path / "there", link, sampling=Sampling(rounds=3, norm_bound=1e6))
    there.run()
    train = [x for x in lines(there) if x["kind"] == "train"]
    assert [sorted(x["refused"]) for x in train] == [[], ["c3"], []]
    assert reason in train[1]["refused"]["c3"]
    told = {o.header["round"]: o.header["clients"] for n, o, _ in link.seen if n == 3 and o.kind == "train"}
    assert told == {0: {"c3": None}, 1: {"c3": 0}, 2: {"c3": 0}}
    # the oracle: a simulation whose server forgets that upload, and whose client goes back
    honest = sites(METHOD, tmp_path / "honest")
    honest.change = lambda node, order, reply: (
        None if node == 3 and order.kind == "train" and order.header["round"] == 1 else reply
    )
    other = server(METHOD, tmp_path / "other", honest, sampling=Sampling(rounds=3))
    other.run()
    tiny.close(state(there), state(other), tol=0)


def test_ranks_of_a_method_that_prunes_are_checked(tmp_path: Path) -> None:
    """HetLoRA may send less, but both halves of a site alike, and as stated."""
    method = TABLE["hetlora"].method
    for change, reason in (
        (at(A_SITE, lambda v: v[:1].contiguous()), "another leaf of its layer"),
        (at(Key("lora", "", "rank"), lambda v: v * 0 + 1), "the stated one"),
        (at(A_SITE, lambda v: torch.cat([v, v, v])), "expected"),
    ):
        link = sites(method, tmp_path / reason / str(id(change)))
        link.change = lambda n, o, r, change=change: uploads_of(change)(r) if n == 3 and o.kind == "train" else r  # type: ignore[misc]
        there = server(method, tmp_path / reason / f"there{id(change)}", link, sampling=Sampling(rounds=1))
        there.run()
        (refused,) = [x["refused"] for x in lines(there) if x["kind"] == "train"]
        assert list(refused) == ["c3"]
        assert reason in refused["c3"]


def test_a_reply_sent_again_is_refused(tmp_path: Path) -> None:
    link = sites(METHOD, tmp_path)
    first: list[Packet] = []

    def replay(node: int, order: Packet, reply: Packet) -> Packet:
        if node == 2 and order.kind == "train":
            first.append(reply)
            return first[0]
        return reply

    link.change = replay
    there = server(METHOD, tmp_path / "there", link)
    there.run()
    refused = [x["refused"] for x in lines(there) if x["kind"] == "train"]
    assert not refused[0]
    assert all("sent again" in r["c2"] for r in refused[1:])


@pytest.mark.parametrize("when", ["before aggregation", "during aggregation", "before the commit"])
def test_server_killed_and_started_again(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No accepted round is lost or counted twice: the end is that of a run that nobody killed."""
    whole = server(METHOD, tmp_path / "whole", sites(METHOD, tmp_path / "a"))
    whole.run()
    link = sites(METHOD, tmp_path / "b")
    killed = server(METHOD, tmp_path / "killed", link)

    class Killed(BaseException):
        pass

    def boom(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    if when == "before aggregation":
        link.change = lambda n, o, r: boom() if o.kind == "train" and o.header["round"] == 1 and n == 0 else r
    elif when == "during aggregation":
        original = type(METHOD).aggregate

        def half(self: Method, context: Any, s: Any, uploads: Any) -> Any:
            if s.round == 1:
                next(iter(uploads))
                boom()
            return original(self, context, s, uploads)

        monkeypatch.setattr(type(METHOD), "aggregate", half)
    else:
        save = killed.store.save_server
        monkeypatch.setattr(killed.store, "save_server", lambda r, *a: boom() if r == 2 else save(r, *a))
    with pytest.raises(Killed):
        killed.run()
    monkeypatch.undo()
    link.change = lambda n, o, r: r
    again = server(METHOD, tmp_path / "killed", link)
    again.run()
    tiny.close(state(whole), state(again), tol=0)
    assert [(x["kind"], x["round"]) for x in lines(again)] == [(x["kind"], x["round"]) for x in lines(whole)]


def test_client_killed_and_started_again(tmp_path: Path) -> None:
    """A client's process comes back with nothing but its folder."""
    whole = server(METHOD, tmp_path / "whole", sites(METHOD, tmp_path / "a"))
    whole.run()
    link = sites(METHOD, tmp_path / "b")

    def restart(node: int, order: Packet, reply: Packet) -> Packet:
        if node == 1:
            link.sites = {**link.sites, 1: sites(METHOD, tmp_path / "b").sites[1]}
        return reply

    link.change = restart
    other = server(METHOD, tmp_path / "other", link)
    other.run()
    tiny.close(state(whole), state(other), tol=0)


def test_a_client_that_lost_its_leaves_says_so(tmp_path: Path) -> None:
    import shutil

    link = sites(METHOD, tmp_path)

    def lose(node: int, order: Packet, reply: Packet) -> Packet:
        if node == 1 and order.kind == "train" and order.header["round"] == 0:
            for folder in (tmp_path / "site1").glob("*/clients"):
                shutil.rmtree(folder)
        return reply

    link.change = lose
    there = server(METHOD, tmp_path / "there", link)
    there.run()
    refused = [x["refused"] for x in lines(there) if x["kind"] == "train"]
    assert not refused[0]
    assert all("(state)" in r["c1"] and list(r) == ["c1"] for r in refused[1:])


def test_a_client_whose_disk_is_full_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    link = sites(METHOD, tmp_path)
    replace = os.replace

    def full(source: Any, to: Any) -> None:
        if "site2" in str(to) and "000001" in str(to):
            raise OSError(errno.ENOSPC, "No space left on device", str(to))
        replace(source, to)

    monkeypatch.setattr(os, "replace", full)
    there = server(METHOD, tmp_path / "there", link)
    there.run()
    refused = [x["refused"] for x in lines(there) if x["kind"] == "train"]
    assert [list(r) for r in refused] == [[], ["c2"], []]
    assert "(disk)" in refused[1]["c2"]


def test_too_few_uploads_stop_the_run_and_it_goes_on_later(tmp_path: Path) -> None:
    whole = server(METHOD, tmp_path / "whole", sites(METHOD, tmp_path / "a"))
    whole.run()
    link = sites(METHOD, tmp_path / "b")
    link.change = lambda n, o, r: None if o.kind == "train" and o.header["round"] == 1 else r
    stuck = server(METHOD, tmp_path / "stuck", link, Terms(clients=4, attempts=2, poll=0.0))
    with pytest.raises(TrainingError, match=r"round 2: 0 acceptable uploads of 4.*late"):
        stuck.run()
    asked = [n for n, o, _ in link.seen if o.kind == "train" and o.header["round"] == 1]
    assert len(asked) == 2 * 4
    link.change = lambda n, o, r: r
    again = server(METHOD, tmp_path / "stuck", link)
    again.run()
    tiny.close(state(whole), state(again), tol=0)


def test_over_selection_takes_the_first(tmp_path: Path) -> None:
    link = sites(METHOD, tmp_path)
    there = server(METHOD, tmp_path / "there", link, Terms(clients=4, over_selection=2.0, poll=0.0),
                   sampling=Sampling(rounds=2, clients_per_round=2))  # fmt: skip
    there.run()
    for x in lines(there):
        if x["kind"] == "train":
            assert len(x["clients"]) == 4
            assert len(x["losses"]) == 2
            assert sorted(x["losses"]) == ["c0", "c2"]  # whose replies the loop gives first
            assert {v for v in x["refused"].values()} == {"late: no reply in time"}


def test_clients_that_are_away_are_not_asked(tmp_path: Path) -> None:
    link = sites(METHOD, tmp_path)

    def leave(node: int, order: Packet, reply: Packet) -> Packet:
        if order.kind == "train":
            link.alive = {0, 1, 2, 3} - ({1} if order.header["round"] == 0 else set())
        return reply

    link.change = leave
    there = server(METHOD, tmp_path / "there", link, evaluation=Evaluation(every=5))
    there.run()
    train = [x for x in lines(there) if x["kind"] == "train"]
    assert [x["clients"] for x in train] == [["c0", "c1", "c2", "c3"], ["c0", "c2", "c3"], ["c0", "c1", "c2", "c3"]]


@pytest.mark.parametrize(("asks", "grants"), [(False, False), (True, False), (False, True), (True, True)])
def test_histograms_need_both_sides(asks: bool, grants: bool, tmp_path: Path) -> None:
    link = sites(METHOD, tmp_path)
    for site in link.sites.values():
        site.histograms = grants
    recipe = {"data": {"classes": ["class0", "class1", "class2"]}, "deployment": {"histograms": asks}}
    there = server(METHOD, tmp_path / "there", link)
    there.runtime = lambda f, watch: Remote(f, watch, link, Terms(clients=4, poll=0.0), recipe)
    there.run()
    joins = [reply for _, order, reply in link.seen if order.kind == "join"]
    for reply in joins:
        assert isinstance(reply, Packet)
        assert ("histogram" in json.dumps(reply.header)) == (asks and grants)
    assert ("histogram" in there.store.read_json("partition.json")) == (asks and grants)


def test_a_site_speaks_for_its_own_clients_only(tmp_path: Path) -> None:
    link = sites(METHOD, tmp_path, 3)
    link.names = {0: "c0", 1: "somebody", 2: "c"}
    heard: list[str] = []
    there = server(METHOD, tmp_path / "there", link)
    there.runtime = lambda f, watch: Remote(f, watch, link, Terms(clients=1, poll=0.0), RECIPE, heard.append)
    there.run()
    assert there.data.ids == ["c0"]
    assert any("client 'c1' is not of site 'somebody'" in text for text in heard)
    assert any("client 'c2' is not of site 'c'" in text for text in heard)
    assert not any("site c0 cannot" in text for text in heard)


def test_two_sites_of_one_name(tmp_path: Path) -> None:
    link = sites(METHOD, tmp_path, 2)
    link.sites = {**link.sites, 7: sites(METHOD, tmp_path / "twin").sites[0]}
    link.names, link.alive = dict.fromkeys((0, 1, 7)), {0, 1, 7}
    heard: list[str] = []
    there = server(METHOD, tmp_path / "there", link)
    there.runtime = lambda f, watch: Remote(f, watch, link, Terms(clients=2, poll=0.0), RECIPE, heard.append)
    there.run()
    assert any("'c0' is already here from another site" in text for text in heard)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_message_precision_is_that_of_the_simulation(precision: Any, tmp_path: Path) -> None:
    """The same leaves after the same rounding, on both runtimes; fewer bytes, and close to full precision."""
    sampling = Sampling(rounds=2, precision=precision)
    here = tiny.federation(METHOD, tmp_path / "here", block=1, sampling=sampling)
    here.run()

    def lossy(k: int) -> Callable[[Mapping[str, Any], Path], Federation]:
        return lambda recipe, where: tiny.federation(
            METHOD, where, data=tiny.data().only(k), block=1, keep="all", sampling=sampling
        )

    link = Loop({k: Site(lossy(k), tmp_path / f"site{k}") for k in range(4)})
    there = server(METHOD, tmp_path / "there", link, sampling=sampling)
    there.run()
    tiny.close(state(here), state(there), tol=0)
    full = tiny.federation(METHOD, tmp_path / "full", block=1, sampling=Sampling(rounds=2))
    full.run()
    tiny.close(state(here), state(full), tol=0.05)
    assert any(not torch.equal(a, b) for a, b in zip(state(here).values(), state(full).values(), strict=True))
    sent = [sum(x["bytes"]["up"]["adapter"] for x in lines(f) if x["kind"] == "train") for f in (here, full)]
    # Int8: rows of 16 entries with one float32 scale each.
    assert sent[0] / sent[1] == pytest.approx(
        {"fp16": 1 / 2, "bf16": 1 / 2, "int8": 1 / 4 + 1 / 16}[precision], rel=0.05
    )


def test_a_site_of_many_clients_trains_them_in_blocks(tmp_path: Path) -> None:
    here = tiny.federation(METHOD, tmp_path / "here", block=4)
    here.run()
    site = Site(lambda recipe, where: tiny.federation(METHOD, where, block=4, keep="all"), tmp_path / "site")
    link = Loop({0: site})
    there = server(METHOD, tmp_path / "there", link, Terms(clients=4, poll=0.0))
    there.run()
    tiny.close(state(here), state(there), tol=0)
    for _, order, _ in link.seen:
        if order.kind == "train":
            assert list(order.parts) == [""]  # what all receive is sent to a site once
