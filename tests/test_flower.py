"""Real processes over Flower on the loopback, with TLS and node keys: three sites with a CSV file each, and MiniLM."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_deploy import METHOD, lines, state

pytest.importorskip("flwr")

import fedlora.flower  # noqa: F401  (switches Flower's telemetry off)
from fedlora.data.examples import Rows, Tokens
from fedlora.data.federated import FederatedData
from fedlora.deploy import schema
from fedlora.deploy.packets import Packet
from fedlora.deploy.site import Holding
from fedlora.errors import ConfigError
from fedlora.federation.callbacks import Callback
from fedlora.federation.run import Federation
from fedlora.flower import client, keys, records, server, superlink
from fedlora.recipe import Recipe, build
from fedlora.tree import Key

SST2 = Path(os.environ.get("FEDLORA_SHARED", Path(__file__).parents[2] / "shared")) / "data/sst2/train.parquet"
IDS = ("a", "b", "c")
# asyncio's own sockets of connections that were cut, or left open by a client that was killed
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:data.max_length"),  # some sentences are longer
]
needs_text = pytest.mark.skipif(not SST2.exists(), reason="../shared/data/sst2 is not here")
METHODS: dict[str, dict[str, Any]] = {
    "fedsa": {}, "hetlora": {"rank": 8, "rank_min": 2}, "pf2lora": {}, "slora": {"density": 0.1, "sparse_rounds": 1},
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "homlora": {}, "ffa": {}, "share-b": {}, "local": {}, "fedavg-ft": {}, "flexlora": {}, "fedprox": {}, "perfedavg": {},
    "feddpa-f": {}, "feddpa-t": {}, "pf2hetlora": {}, "fft": {}, "sft": {"density": 0.1}, "bitfit": {}, "houlsby": {}, "pfeiffer": {},
    "rolora": {}, "fedsvd": {}, "flora": {}, "fedex": {}, "frlora": {}, "lora-fair": {}, "fedrot": {},
    "florist": {}, "fedsb": {}, "ditto": {}, "fedalt": {}, "fedrep": {"head_steps": 1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def swept() -> Iterator[None]:
    """What a test leaves to the garbage collector is collected with it, not with a later one."""
    yield
    gc.collect()


def recipe_of(method: str, more: Mapping[str, Any], **federation: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "name": "sites",
            "model": {"name": "minilm"},
            "data": {
                "source": "(of the site)",
                "text": "text",
                "label": "label",
                "classes": ["bad", "good"],
                "max_length": 24,
            },
            "partition": {"validation": 0.1, "test": 0.2},
            "method": {"name": method, "rank": 4, **more}
            if method not in ("fft", "sft", "bitfit")
            else {"name": method, **more},
            "train": {"steps": 2, "batch_size": 6, "lr": 1e-3, "dropout": False},
            "federation": {"rounds": 2, **federation},
            "evaluation": {"every": 2, "views": ["personal"]},
            "deployment": {"clients": 3, "deadline": 120},
            "run": {"block": 1, "threads": 1},
        }
    )


@dataclasses.dataclass
class Place:
    """Keys, CSV files, and a port for a federation."""

    root: Path
    port: int

    def serve(
        self, recipe: Recipe, name: str, say: Callable[[str], None] = lambda text: None
    ) -> tuple[Federation, dict[str, Any]]:
        k = self.root / "keys"
        tls, known = server.security(k / "server.pem", k / "server.key", k / "clients", False)
        return server.run(recipe, self.root / name, "127.0.0.1", self.port, tls, known, Callback(), say)

    def site(self, id: str, trouble: str = "", folder: str = "state", keys_of: str = "keys") -> subprocess.Popen[str]:
        script = Path(__file__).with_name("flower_site.py")
        command = [
            sys.executable,
            str(script),
            id,
            str(self.port),
            str(self.root / f"{id}.csv"),
            str(self.root / keys_of),
        ]
        return subprocess.Popen(
            [*command, str(self.root / folder), trouble],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def end(process: subprocess.Popen[str]) -> str:
    """Let a client process stop; returns what it said."""
    try:
        said, _ = process.communicate("", timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
    return said


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("sites")
    keys.make(root / "keys", ["127.0.0.1"], IDS)
    rows = pq.read_table(SST2).slice(0, 120).to_pylist() if SST2.exists() else []
    for i, id in enumerate(IDS):
        columns = ("note", "outcome") if id == "c" else ("text", "label")  # sites call their columns as they like
        with open(root / f"{id}.csv", "w", newline="", encoding="utf-8") as f:
            table = csv.writer(f)
            table.writerow(columns)
            table.writerows((r["sentence"], ("bad", "good")[r["label"]]) for r in rows[i * 30 : (i + 1) * 30 + 5 * i])
    return Place(root, free_port())


@pytest.fixture(scope="module")
def residents(place: Place) -> Iterator[list[subprocess.Popen[str]]]:
    """Three clients that stay while servers come and go."""
    found = [place.site(id) for id in IDS]
    yield found
    for p in found:
        end(p)


def joined(parts: Sequence[FederatedData]) -> FederatedData:
    """The sites' data in one federation, rows and splits as each site has them."""
    tokens = [p.examples for p in parts]
    assert all(isinstance(t, Tokens) for t in tokens)
    shift = np.cumsum([0, *(len(t.flat) for t in tokens)])  # type: ignore[union-attr]
    offsets = np.concatenate([[0], *(t.offsets[1:] + s for t, s in zip(tokens, shift, strict=False))])  # type: ignore[union-attr]
    first = np.cumsum([0, *(len(t) for t in tokens)])
    examples = dataclasses.replace(
        tokens[0], flat=np.concatenate([t.flat for t in tokens]), offsets=offsets.astype(np.int64),  # type: ignore[type-var, union-attr]
        labels=np.concatenate([t.labels for t in tokens]),  # type: ignore[arg-type]
    )  # fmt: skip
    splits = {
        s: Rows(
            np.concatenate([[0], np.cumsum([p.splits[s].sizes[0] for p in parts])]).astype(np.int64),
            np.concatenate([p.splits[s].rows + f for p, f in zip(parts, first, strict=False)]),
        )
        for s in parts[0].splits
    }
    return FederatedData(examples, [p.ids[0] for p in parts], splits, parts[0].label_names)


def simulated(place: Place, recipe: Recipe, name: str) -> Federation:
    """The same run in this process, on the same files."""
    own = []
    for id in IDS:
        columns = {"text": "note", "label": "outcome"} if id == "c" else {}
        r = Holding(id, str(place.root / f"{id}.csv"), columns).recipe(recipe.resolved())
        own.append(build.data_of(r, build.tokenizer_of(r)))
    fed = build.federation(recipe, place.root / name, lambda r, tokenizer: joined(own))
    fed.run()
    return fed


def same_run(place: Place, method: str, more: Mapping[str, Any]) -> None:
    recipe = recipe_of(method, more)
    there, summary = place.serve(recipe, f"there-{method}")
    here = simulated(place, recipe, f"here-{method}")
    tiny.close(state(here), state(there), tol=0)
    assert [x["kind"] for x in lines(there)] == [x["kind"] for x in lines(here)]
    for a, b in zip(lines(there), lines(here), strict=True):
        if a["kind"] == "handover":
            continue
        for field in (
            ("kind", "round", "losses", "refused", "clients") if a["kind"] == "train" else ("kind", "round", "view")
        ):
            assert a[field] == b[field]
        if a["kind"] == "train":
            assert a["bytes"]["up"] == b["bytes"]["up"]
        else:
            assert a["mean"]["accuracy"] == b["mean"]["accuracy"]
            assert a["mean"]["loss"] == pytest.approx(b["mean"]["loss"], rel=1e-5)
    assert summary["rounds"] == 2


@needs_text
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m in ("fedsa", "pf2lora") else pytest.mark.slow) for m in METHODS]
)
def test_server_equals_simulation(method: str, place: Place, residents: list[subprocess.Popen[str]]) -> None:
    """Bit for bit in fp32, over TLS, with three processes."""
    same_run(place, method, METHODS[method])


@pytest.mark.slow
@needs_text
@pytest.mark.parametrize("method", OTHERS)
def test_every_other_method_too(method: str, place: Place, residents: list[subprocess.Popen[str]]) -> None:
    same_run(place, method, OTHERS[method])


@pytest.fixture
def alone(place: Place, tmp_path: Path) -> Place:
    """The same keys and files on a port of its own."""
    return dataclasses.replace(place, port=free_port())


@needs_text
@pytest.mark.parametrize(
    "trouble", ["nan", *(pytest.param(t, marks=pytest.mark.slow) for t in ("half", "die", "slow"))]
)
def test_a_site_in_trouble_does_not_stop_the_others(trouble: str, alone: Place) -> None:
    """The round goes on without it, and says why."""
    recipe = recipe_of("fedsa", {}, min_clients=2).override("evaluation.every=9", "deployment.deadline=8")
    if trouble == "die":
        recipe = recipe.override("deployment.deadline=60")
    processes = [alone.site(id, trouble if id == "b" else "", f"state-{trouble}") for id in IDS]
    heard: list[str] = []
    try:
        there, _ = alone.serve(recipe, f"trouble-{trouble}", heard.append)
    finally:
        for p in processes:
            end(p)
    train = [x for x in lines(there) if x["kind"] == "train"]
    reason = {"nan": "non-finite", "die": "no reply", "half": "late", "slow": "late"}[trouble]
    wrong = [x["refused"] for x in train if x["refused"]]
    assert len(wrong) == 1
    assert list(wrong[0]) == ["b"]
    assert reason in wrong[0]["b"]
    assert [sorted(x["losses"]) for x in train if not x["refused"]] == [["a", "b", "c"]]


@pytest.mark.slow
@needs_text
def test_a_site_that_died_comes_back(alone: Place) -> None:
    """Killed while it trains round 2, started again: it is missing in that round, and trains later ones."""
    recipe = recipe_of("fedsa", {}, min_clients=2).override(
        "federation.rounds=14", "evaluation.every=99", "deployment.deadline=60"
    )
    processes = [alone.site(id, "die" if id == "b" else "", "state-back") for id in IDS]

    class Again(Callback):
        def round_done(self, round: int, facts: dict[str, Any]) -> None:
            if round == 2:
                processes.append(alone.site("b", folder="state-back"))
            time.sleep(1.5)  # a session that ended without a word blocks its key for twenty seconds

    k = alone.root / "keys"
    tls, known = server.security(k / "server.pem", k / "server.key", k / "clients", False)
    try:
        there, _ = server.run(recipe, alone.root / "back", "127.0.0.1", alone.port, tls, known, Again())
    finally:
        for p in processes:
            end(p)
    train = [sorted(x["losses"]) for x in lines(there) if x["kind"] == "train"]
    assert train[0] == ["a", "b", "c"]
    assert train[1] == ["a", "c"]
    assert train[-1] == ["a", "b", "c"]


def test_strangers_are_refused(alone: Place) -> None:
    """A key that nobody knows, an authority that nobody trusts, a clock that is an hour off, no TLS, and foreign requests."""
    import httpx

    keys.make(alone.root / "forged", ["127.0.0.1"], ["a", "d"])
    for f in ("ca.pem",):
        (alone.root / "half" / "clients").mkdir(parents=True, exist_ok=True)
        (alone.root / "half" / f).write_bytes((alone.root / "keys" / f).read_bytes())
    (alone.root / "half" / "clients" / "a.key").write_bytes((alone.root / "forged" / "clients" / "a.key").read_bytes())
    k = alone.root / "keys"
    tls, known = server.security(k / "server.pem", k / "server.key", k / "clients", False)
    heard: list[str] = []
    with superlink.SuperLink("127.0.0.1", alone.port, tls, known, 1000, heard.append) as link:
        said = {
            "unknown key": alone.site("a", keys_of="half"),
            "foreign authority": alone.site("a", keys_of="forged"),
            "clock": alone.site("b", "clock"),
        }
        assert {name: p.wait(60) for name, p in said.items()} == dict.fromkeys(said, 1)
        texts = {name: p.communicate()[0] for name, p in said.items()}
        assert link.online() == {}
        with httpx.Client(verify=ssl.create_default_context(cafile=k / "ca.pem")) as web:
            base = f"https://127.0.0.1:{alone.port}"
            assert web.post(f"{base}/v1/control/start-run", content=b"").status_code == 404
            assert web.post(f"{base}/v1/runtime/acquire-task", content=b"").status_code == 404
            assert web.get(f"{base}/docs").status_code == 404
            assert web.post(f"{base}/v1/fleet/push-object", content=b"x" * 1001).status_code == 413
            assert web.post(f"{base}/v1/fleet/register-node", content=b"").status_code in (400, 401, 415, 422)
            with pytest.raises(httpx.HTTPError):
                httpx.post(f"http://127.0.0.1:{alone.port}/v1/fleet/pull-messages")
        # A key of one's own, which the stranger registers itself, as a client does where no keys are asked for.
        own = client.Uplink(f"127.0.0.1:{alone.port}", ca=k / "ca.pem")
        with pytest.raises(httpx.HTTPStatusError), client._connected(own, heard.append, threading.Event()):
            pass
        assert link.online() == {}
    assert "not in its --clients-keys" in texts["unknown key"]
    assert "certificate is not trusted" in texts["foreign authority"]
    assert "clock" in texts["clock"]
    assert any("unknown key, wrong signature or clock" in text for text in heard)
    assert any("not served here" in text for text in heard)
    assert any("expected at most 1000" in text for text in heard)


class Cable:
    """A TCP relay that can be cut."""

    def __init__(self, to: int):
        self.to, self.server = to, socket.create_server(("127.0.0.1", 0))
        self.port = int(self.server.getsockname()[1])
        self.pairs: list[socket.socket] = []
        self.whole = threading.Event()
        self.whole.set()
        self.carried = bytearray()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.server.accept()
            except OSError:
                return
            if not self.whole.is_set():
                near.close()
                continue
            try:
                far = socket.create_connection(("127.0.0.1", self.to))
            except OSError:
                near.close()
                continue
            self.pairs += [near, far]
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(a, b), daemon=True).start()

    def _carry(self, a: socket.socket, b: socket.socket) -> None:
        try:
            while data := a.recv(65536):
                self.carried += data
                b.sendall(data)
        except OSError:
            pass
        for s in (a, b):
            s.close()

    def cut(self, seconds: float) -> None:
        self.whole.clear()
        for s in self.pairs:
            s.close()
        self.pairs.clear()
        time.sleep(seconds)
        self.whole.set()

    def close(self) -> None:
        self.server.close()


@needs_text
# Asyncio's own, of sockets that were cut.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cut_connection_is_taken_up_again(alone: Place) -> None:
    """One site's cable is cut twice while it works: nothing is lost; and what it carries is encrypted."""
    recipe = recipe_of("fedsa", {}).override("federation.rounds=4", "evaluation.every=9", "deployment.deadline=90")
    cable = Cable(alone.port)
    near = dataclasses.replace(alone, port=cable.port)
    processes = [(near if id == "b" else alone).site(id, folder="state-cable") for id in IDS]
    cuts = [2, 3]

    class Cutting(Callback):
        def round_start(self, round: int, clients: int) -> None:
            if round in cuts:
                cable.cut(0.5)

    k = alone.root / "keys"
    tls, known = server.security(k / "server.pem", k / "server.key", k / "clients", False)
    try:
        there, _ = server.run(recipe, alone.root / "cable", "127.0.0.1", alone.port, tls, known, Cutting())
    finally:
        cable.close()
        for p in processes:
            end(p)
    train = [x for x in lines(there) if x["kind"] == "train"]
    assert [x["refused"] for x in train if x["refused"]] == []
    assert [sorted(x["losses"]) for x in train] == [["a", "b", "c"]] * 4
    here = simulated(alone, recipe, "cable-here")
    tiny.close(state(here), state(there), tol=0)
    assert b"bert.encoder" not in cable.carried
    assert b"good" not in cable.carried


def test_no_request_of_ours_is_larger_than_the_server_takes() -> None:
    """The largest site's answer with a large model: Flower cuts leaves into chunks, and what is said of clients is small."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

    ids = [f"a-hospital-of-some-length/ward-{i:05d}" for i in range(schema.MOST_CLIENTS)]
    scores = {c: {"loss": 0.123456789012345, "accuracy": 0.123456789012345, "f1": 0.123456789012345} for c in ids}
    lines = [{"view": v, "split": s, "clients": scores} for v in ("personal", "global") for s in ("validation", "test")]
    small = Packet("evaluate", {"lines": lines}, dict.fromkeys(ids, b"x"))
    large = Packet("train", {}, {"a": bytes(3 * records.LARGEST)})
    for packet in (small, large):
        content = records.pack(packet)
        sizes = [len(x.deflate()) for x in get_all_nested_objects(content).values()]
        assert max(*sizes, get_object_tree(content).ByteSize()) < records.LARGEST
    assert len(sizes) > 3


def test_a_request_that_is_too_large_ends_the_client() -> None:
    """A proxy with a small limit: trying again would never help."""
    import httpx

    response = httpx.Response(413, request=httpx.Request("POST", "https://fl.example.org"))

    def refuse(message: Any) -> None:
        response.raise_for_status()

    node = client._Node.__new__(client._Node)
    node._lost, node.stop, node.say = threading.Event(), threading.Event(), lambda text: None
    with pytest.raises(client.Refused, match="client_max_body_size"):
        node._call(refuse)(None)


def test_keys_are_made_once_and_read_back(tmp_path: Path) -> None:
    written = keys.make(tmp_path, ["fl.example.org", "10.0.0.1"], ["x", "y"])
    before = {p: p.read_bytes() for p in written}
    assert {p.read_bytes() == before[p] for p in keys.make(tmp_path, ["other"], ["x", "y", "z"]) if p in before} == {
        True
    }
    assert sorted(keys.public_keys(tmp_path / "clients")) == ["x", "y", "z"]
    for private in tmp_path.rglob("*.key"):
        assert private.stat().st_mode & 0o077 == 0
    for half in ("clients/x.pub", "server.pem"):  # a crash between the two files of a pair
        (tmp_path / half).unlink()
    keys.make(tmp_path, ["fl.example.org"], ["x"])
    assert (tmp_path / "clients/x.pub").read_bytes() == before[tmp_path / "clients/x.pub"]
    assert (tmp_path / "server.pem").exists()
    (tmp_path / "clients" / "w.pub").write_bytes((tmp_path / "clients" / "x.pub").read_bytes())
    (tmp_path / "clients" / "v.pub").write_text("ssh-rsa nonsense")
    with pytest.raises(ConfigError) as e:
        keys.public_keys(tmp_path / "clients")
    assert [p.got for p in e.value.problems] == ["v.pub", "x.pub"]


def test_security_is_said_or_given(tmp_path: Path) -> None:
    """Neither TLS nor keys is ever left out silently; all that is missing is said at once."""
    with pytest.raises(ConfigError) as e:
        server.security(None, None, None, insecure=False)
    assert [p.field for p in e.value.problems] == ["--tls-cert", "--tls-key", "--clients-keys"]
    with pytest.raises(ConfigError):
        server.security(tmp_path / "x", None, None, insecure=True)
    assert server.security(None, None, None, insecure=True) == (None, None)


def _replies(strategy: Any, round: int, change: dict[int, Any]) -> list[Any]:
    """What four nodes answer without having trained; change: node -> its leaves from what it received."""
    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from fedlora.flower import strategy as s

    class Nodes:
        def get_node_ids(self) -> list[int]:
            return [10, 11, 12, 13]

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    out = []
    for m in strategy.configure_train(round, strategy.initial_arrays(), ConfigRecord(), Nodes()):
        node = m.metadata.dst_node_id
        leaves = s.received_by(strategy.channel, m)
        TaskIdentity.node_id = node
        m.metadata.__dict__["_message_id"] = str(node)
        metrics = MetricRecord({"num-examples": 10, "loss": 1.0})
        changed = change.get(node, lambda p: p)(leaves)
        out.append(Message(RecordDict({"arrays": s.arrays_of(changed), "metrics": metrics}), reply_to=m))
    return out


PRIVATE = Key("lora", "bert.encoder.layer.0.attention.self.query", "B")
FOREIGN = Key("head", "elsewhere", "weight")
A_LEAF = PRIVATE._replace(part="A")
INJECTIONS = {
    "its own B": lambda p: p | {PRIVATE: torch.ones(16, 4)},
    "a foreign head": lambda p: p | {FOREIGN: torch.full((3, 3), 7.0)},
    "another shape": lambda p: p | {A_LEAF: p[A_LEAF].mT.contiguous()},
    "a higher rank": lambda p: p | {A_LEAF: torch.cat([p[A_LEAF]] * 2)},
    "another type": lambda p: p | {A_LEAF: p[A_LEAF].double()},
    "a half": lambda p: p | {A_LEAF: p[A_LEAF].half()},
    "a leaf less": lambda p: {k: v for k, v in p.items() if k != A_LEAF},
    "no number": lambda p: p | {A_LEAF: p[A_LEAF] * float("nan")},
}


@pytest.mark.parametrize("name", INJECTIONS)
def test_strategy_refuses_what_is_not_declared_and_goes_on(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of such a reply reaches the server's state; the others count, and the reason is logged."""
    import logging

    from fedlora.flower import strategy as s

    logging.getLogger("flwr").propagate = True
    fed = tiny.federation(METHOD, tmp_path)
    strategy = s.MethodStrategy(METHOD, fed.context, rounds=3)
    before = dict(strategy.server.params)
    arrays, metrics = strategy.aggregate_train(1, _replies(strategy, 1, {11: INJECTIONS[name]}))
    assert arrays is not None and metrics is not None and metrics["clients"] == 3
    tiny.close(strategy.server.params, before, 1e-6)
    assert any("node 11 refused" in r.getMessage() for r in caplog.records)
    again, _ = strategy.aggregate_train(2, _replies(strategy, 2, {}))
    assert again is not None


def test_strategy_counts_a_node_once_and_only_if_asked(tmp_path: Path) -> None:
    from fedlora.flower import strategy as s

    fed = tiny.federation(METHOD, tmp_path)
    strategy = s.MethodStrategy(METHOD, fed.context, rounds=3, min_nodes=2)
    replies = _replies(strategy, 1, {})
    _, metrics = strategy.aggregate_train(1, [*replies, replies[0]])
    assert metrics is not None and metrics["clients"] == 4
    assert strategy.aggregate_train(2, replies) == (None, None)  # of the round before


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_strategy_with_guards_equals_engine(precision: Any, tmp_path: Path) -> None:
    """Clients answer through the same channel, and keep what its guards give them."""
    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from fedlora.federation.engine import train_block
    from fedlora.federation.guards import GUARDS
    from fedlora.federation.setting import Sampling
    from fedlora.flower import strategy as s

    guards = (GUARDS["clip"](norm=0.1), GUARDS["feedback"](form="int4"), GUARDS["trimmed"](share=0.25))
    sampling = Sampling(rounds=2, precision=precision, guards=guards)
    here = tiny.federation(METHOD, tmp_path / "here", block=1, sampling=sampling)
    here.run()
    fed = tiny.federation(METHOD, tmp_path / "fed", block=1, sampling=sampling)
    engine, channel = fed.engine(Callback()), sampling.channel
    kept = {k: METHOD.keep(fed.context, fed.client(k)) for k in range(4)}
    remembered: dict[int, Any] = {k: {} for k in range(4)}
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    class Nodes:
        def get_node_ids(self) -> list[int]:
            return [10, 11, 12, 13]

    strategy = s.MethodStrategy(METHOD, fed.context, rounds=2, channel=channel)
    strategy.examples = {10 + k: fed.client(k).examples for k in range(4)}
    for round in (1, 2):
        replies = []
        for m in strategy.configure_train(round, strategy.initial_arrays(), ConfigRecord(), Nodes()):  # type: ignore[arg-type]
            k = m.metadata.dst_node_id - 10
            order, client, down = s.order_of(m), fed.client(k), s.received_by(channel, m)
            batches = fed.batches(client, order, METHOD.draws)
            (done,) = train_block(METHOD, fed.context, fed.loss, order, [down], [kept[k]], [batches], engine.pace)
            kept[k] = done.kept
            arrays, remembered[k] = s.reply_by(channel, done.upload, down, remembered[k], order, client)
            metrics = MetricRecord({"num-examples": client.examples, "loss": done.metrics["loss"]})
            TaskIdentity.node_id = m.metadata.dst_node_id
            m.metadata.__dict__["_message_id"] = str(k)
            replies.append(Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=m))
        new, _ = strategy.aggregate_train(round, replies)
        assert new is not None
    tiny.close(strategy.server.params, state(here), tol=0)


def test_strategy_equals_engine(tmp_path: Path) -> None:
    """The method as a Flower Strategy, with clients that train by the engine's own step."""
    from flwr.app import Message, MetricRecord, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    from fedlora.federation.engine import train_block
    from fedlora.flower import strategy as s

    here = tiny.federation(METHOD, tmp_path / "here", block=1)
    here.run()
    fed = tiny.federation(METHOD, tmp_path / "fed", block=1)
    engine = fed.engine(Callback())
    kept = {k: METHOD.keep(fed.context, fed.client(k)) for k in range(4)}
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    class Nodes:
        def get_node_ids(self) -> list[int]:
            return [10, 11, 12, 13]

    sent = s.MethodStrategy(METHOD, fed.context, rounds=3)
    arrays = sent.initial_arrays()
    sent.examples = {10 + k: fed.client(k).examples for k in range(4)}
    from flwr.app import ConfigRecord

    for round in (1, 2, 3):
        replies = []
        for m in sent.configure_train(round, arrays, ConfigRecord(), Nodes()):  # type: ignore[arg-type]
            k = m.metadata.dst_node_id - 10
            order = s.order_of(m)
            (found,) = m.content.array_records.values()
            batches = fed.batches(fed.client(k), order, METHOD.draws)
            (done,) = train_block(
                METHOD, fed.context, fed.loss, order, [s.params_of(found)], [kept[k]], [batches], engine.pace
            )
            kept[k] = done.kept
            metrics = MetricRecord({"num-examples": fed.client(k).examples, "loss": done.metrics["loss"]})
            TaskIdentity.node_id = m.metadata.dst_node_id
            m.metadata.__dict__["_message_id"] = str(k)
            replies.append(Message(RecordDict({"arrays": s.arrays_of(done.upload), "metrics": metrics}), reply_to=m))
        new, _ = sent.aggregate_train(round, replies)
        assert new is not None
        arrays = new
    tiny.close(sent.server.params, state(here), tol=0)


def test_status_is_what_the_server_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_deploy import server as loop_server
    from test_deploy import sites

    from fedlora.cli import main

    there = loop_server(METHOD, tmp_path / "run", sites(METHOD, tmp_path))
    there.run()
    assert main(["status", str(tmp_path / "run"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["state"], said["done"], said["rounds"]) == ("done", 3, 3)
    assert said["bytes"]["up"] == sum(sum(x["bytes"]["up"].values()) for x in lines(there) if x["kind"] == "train")
    assert main(["status", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert all(c in shown for c in ("c0", "c1", "c2", "c3", "round 3 of 3"))
    assert main(["status", str(tmp_path)]) == 1


def test_client_and_server_say_all_that_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fedlora.cli import main

    r = tmp_path / "r.yaml"
    r.write_text(
        "model: {name: minilm}\ndata: {source: x.csv, text: text, label: label}\nmethod: centralized\nevaluation: {views: [cross]}\n"
    )
    assert main(["server", str(r), "--listen", "nowhere"]) == 2
    said = capsys.readouterr().err
    for field in (
        "data.classes",
        "method.name",
        "evaluation.views",
        "--listen",
        "--tls-cert",
        "--tls-key",
        "--clients-keys",
    ):
        assert field in said
    assert main(["client", "--id", "a", "--server", "host", "--data", "none.csv", "--ca", "none.pem"]) == 2
    said = capsys.readouterr().err
    for field in ("--key", "--ca", "--data", "--server"):
        assert field in said
    assert main(["client", "--id", "../a", "--server", "h:1", "--data", "x.csv"]) == 2
    assert "--id" in capsys.readouterr().err
    assert client.Uplink("x:1").ca is None
