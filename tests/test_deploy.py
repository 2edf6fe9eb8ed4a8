"""A deployment without a network: sites and a server that speak in packets, against the simulation on the same data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_contract import TABLE

from fedlora import wire
from fedlora.data.examples import Arrays, Rows
from fedlora.data.federated import FederatedData
from fedlora.deploy.packets import Packet
from fedlora.deploy.remote import Remote, Terms
from fedlora.deploy.site import Site
from fedlora.federation import Federation, Sampling
from fedlora.method import Method
from fedlora.tree import Params

RECIPE = {"data": {}, "deployment": {}}
DEPLOYED = [n for n, row in TABLE.items() if not row.method.pooled]


def part_of(data: FederatedData, k: int) -> FederatedData:
    """One client's rows alone."""
    splits = {s: Rows(np.array([0, r.sizes[k]]), r[k]) for s, r in data.splits.items()}
    return dataclasses.replace(data, ids=[data.ids[k]], splits=splits)


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
        for node in sorted(packets, reverse=True):  # replies arrive in another order than they were asked for
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
            method, where, data=part_of(tiny.data(), k), block=1, keep="all", **more
        )

    return Loop({k: Site(make(k), folder / f"site{k}") for k in range(count)})


def server(method: Method, folder: Path, link: Loop, terms: Terms | None = None, **more: Any) -> Federation:
    nobody = FederatedData(
        Arrays({"labels": np.zeros(0)}), [], {"train": Rows(np.zeros(1, np.int64), np.zeros(0, np.int64))}
    )
    terms = terms or Terms(clients=len(link.sites), poll=0.0)
    return tiny.federation(
        method, folder, data=nobody, runtime=lambda f, watch: Remote(f, watch, link, terms, RECIPE), **more
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
                stages = {"lora.A", "lora.B", "common.A", "common.B"} if "slora" in name else set()
                assert {f"{k.adapter}.{k.part}" for k in leaves} <= set(TABLE[name].uploads.split()) | stages
