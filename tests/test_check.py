"""`fedlora check`: memory and time as a run then has them, and facts that are readable at any width.

Kills: memory without Python's own, without an evaluation, or of one client where a block is trained; a tried step that
changes the base or leaves files; time of one stage for all.
"""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cli import environment, fedlora, model_folder, rows, write_csv, write_recipe
from rich.console import Console

import fedlora as fl
from fedlora.cli import checks
from fedlora.data.doctor import DataFacts
from fedlora.federation.facts import facts
from fedlora.federation.memory import client_bytes
from fedlora.federation.probe import estimated, probe
from fedlora.federation.setting import Evaluation, Sampling
from fedlora.methods.average import HomLoRA
from fedlora.recipe import expand
from fedlora.recipe.checked import Check, checked

# memory and time --------------------------------------------------------------------------------------------------------

# Each in a process of its own, as users start them. A run says its largest memory; the clock is outside of it. With one thread the
# processor's time is that of an idle machine, however busy this one is.
ALONE = """
import json, sys, time, warnings
time.perf_counter = time.process_time
warnings.simplefilter("ignore")
from fedlora.recipe import Recipe, build
from fedlora.recipe import expand
from fedlora.recipe.checked import checked
recipe = Recipe.load(sys.argv[2])
if sys.argv[1] == "check":
    print(json.dumps(checked(recipe).to_json()["cost"]))
else:
    fed = build.federation(recipe, sys.argv[3])
    start = time.perf_counter()
    peak = fed.run()["peak_memory_bytes"]
    print(json.dumps({"memory": peak, "seconds": time.perf_counter() - start}))
"""


def alone(what: str, recipe: Path, folder: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", ALONE, what, str(recipe), str(folder)], env=environment(), capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def wide(folder: Path, kind: str) -> Path:
    """A model of a few million weights with the word tokenizer of the small one; a step of it takes much more than Python does."""
    import transformers as t

    model_folder(folder, causal=kind == "llama")
    words = {"vocab_size": 4096, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    make = {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(
            **words, hidden_size=256, num_hidden_layers=6, num_attention_heads=8, intermediate_size=1024, num_labels=3)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(
            **words | {"vocab_size": 16384}, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)),
        "gpt2": lambda: t.GPT2ForSequenceClassification(t.GPT2Config(
            **words, n_embd=256, n_layer=4, n_head=4, num_labels=3)),
    }  # fmt: skip
    tiny.seeded(make[kind]).save_pretrained(folder)
    return folder


def heavy(folder: Path, kind: str) -> Path:
    """A recipe whose steps take hundreds of megabytes."""
    texts = write_csv(folder / "long.csv", [(" ".join([t] * 12), label, who) for t, label, who in rows(240)])
    lm = {"task": "causal-lm"} if kind == "llama" else {}
    data = {"source": str(texts), "max_length": 64} | ({"label": None} if lm else {})
    return write_recipe(
        folder, model={"name": str(wide(folder / "wide", kind)), "dtype": "fp32", **lm}, data=data, federation={"rounds": 2},
        train={"batch_size": 16, "steps": 3}, partition={"kind": "iid", "clients": 6},
        method={"name": "pf2lora" if kind == "gpt2" else "fedsa", "rank": 4},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_run_takes_the_memory_and_the_time_that_were_announced(kind: str, tmp_path: Path) -> None:
    """Within 25 % of what comes on top of Python and its libraries, which is stricter than of all; time within 50 %."""
    (tmp_path / "x").mkdir()
    recipe = heavy(tmp_path / "x", kind)
    said = alone("check", recipe, tmp_path)
    real = [
        alone("run", recipe, tmp_path / f"run{i}") for i in range(2)
    ]  # two, since the allocator is not the same twice
    assert said["tried"]
    own = said["program"]
    memory, seconds = (sum(x[k] for x in real) / 2 for k in ("memory", "seconds"))
    assert said["memory"] - own == pytest.approx(memory - own, rel=0.25), (said, real)
    assert said["seconds"] == pytest.approx(seconds, rel=0.5), (said, real)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_what_a_step_takes_is_measured(tmp_path: Path) -> None:
    """Bounds on bytes: a layer that makes 8 MB for each of 2 clients at once is seen, and what stays after it is not counted twice."""

    class Large(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.out = torch.nn.Linear(8, 4), torch.nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inside(x)
            big = h[:, :, None].expand(-1, -1, 50_000).tanh()  # 8 rows of 4 x 50,000 numbers: 6.4 MB a client
            return self.out(h + big.mean(-1))

    r = np.random.default_rng(0)
    data = fl.from_arrays(
        {"x": r.normal(size=(400, 8)).astype("float32"), "labels": r.integers(0, 2, 400)}, clients=4, kind="iid"
    )
    model = fl.adapt(Large(), targets=["inside"], head=["out"], call=lambda m, b: m(b["x"]))
    f = fl.Federation(model, fl.Classification(2), data, HomLoRA(rank=2), tmp_path / "r", plan=fl.LocalWork(steps=2, batch_size=8),
                      sampling=Sampling(rounds=1), evaluation=Evaluation(batch_size=8))  # fmt: skip
    one, four = probe(f, 1), probe(f, 4)
    assert one.tried and four.block == 4
    assert 6e6 < one.training < 60e6
    assert one.training + 3 * 5e6 < four.training < one.training + 3 * 40e6
    assert not (tmp_path / "r").exists()
    assert four.seconds >= four.round > 0


def test_a_probe_changes_nothing(tmp_path: Path) -> None:
    """A run after a probe is the run without one, bit for bit."""
    plain = tiny.federation(HomLoRA(rank=2), tmp_path / "a")
    plain.run()
    tried = tiny.federation(HomLoRA(rank=2), tmp_path / "b")
    before = {k: v.clone() for k, v in tried.model.base.state_dict().items()}
    probe(tried, 4)
    assert all(torch.equal(v, before[k]) for k, v in tried.model.base.state_dict().items())
    assert not (tmp_path / "b").exists()
    tried.run()
    assert (tmp_path / "a/metrics.jsonl").read_text() == (tmp_path / "b/metrics.jsonl").read_text()


def test_a_block_that_surely_does_not_fit_is_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    f = tiny.federation(HomLoRA(rank=2), tmp_path)
    monkeypatch.setattr("fedlora.federation.probe.free_bytes", lambda device: 10)
    found = probe(f, 4)
    assert not found.tried and "are free" in found.why and found.seconds == 0
    assert found.training == estimated(f, 4).training == 4 * client_bytes(f)


# what is shown ----------------------------------------------------------------------------------------------------------


def shown(c: Check, width: int = 80) -> str:
    out = Console(width=width, record=True, file=io.StringIO())
    checks.one(out, c)
    return out.export_text()


@pytest.mark.parametrize(("classes", "clients"), [(2, 3), (120, 3), (2, 1000), (120, 1000)])
def test_it_is_readable_at_80_columns(classes: int, clients: int, tmp_path: Path) -> None:
    """No line is longer, none is cut inside a name or a number, and there are few."""
    r = np.random.default_rng(0)
    n = 6 * clients + 40 * classes
    data = fl.from_arrays(
        {"x": r.normal(size=(n, 8)).astype("float32"), "labels": np.arange(n) % classes}, kind="quantity", clients=clients,
        min_size=4, label_names=[f"a class with the name {i}" for i in range(classes)],
    )  # fmt: skip
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, classes))
    model = fl.adapt(net, targets=["0"], head=["2"], call=lambda net, b: net(b["x"]))
    f = fl.Federation(
        model, fl.Classification(classes), data, HomLoRA(rank=2), tmp_path / "r", sampling=Sampling(rounds=2)
    )
    recipe = fl.Recipe.from_dict({"data": {"source": "demo"}, "method": "homlora"})
    text = shown(Check(recipe, DataFacts({}, None, ()), facts(f, 4), estimated(f, 4)))
    lines = [x.rstrip() for x in text.splitlines()]
    assert max(map(len, lines)) <= 80
    assert len(lines) < 75
    sizes = data.splits["train"].sizes
    if clients > checks.MOST_CLIENTS:
        assert f"{clients:,} clients: {sizes.min():,} to {sizes.max():,}" in text
    else:
        assert all(any(x.split()[:1] == [f"c{k}"] and f"{sizes[k]:,}" in x for x in lines) for k in range(clients))
    assert classes < checks.MOST_CLASSES or f"training rows of {classes} classes" in text
    run, held = facts(f, 4), data.histogram("train")
    assert list(run.class_rows) == [int(held[:, i].sum()) for i in range(classes)]
    assert list(run.class_clients) == [sum(n > 0 for n in held[:, i]) for i in range(classes)]
    assert list(run.classes_held) == [sum(n > 0 for n in row) for row in held]


def test_bins_hold_every_client_once() -> None:
    for sizes in ([5], [1, 2, 3], [4] * 10, [1, 1000], list(range(7, 300, 3))):
        found = checks.bins(sizes)
        assert sum(n for *_, n in found) == len(sizes)
        assert found[0][0] == min(sizes) and found[-1][1] == max(sizes) and len(found) <= checks.BARS
        assert all(n == sum(a <= s <= b for s in sizes) for a, b, n in found)
        assert all(b + 1 == a for (_, b, _), (a, _, _) in itertools.pairwise(found))


def test_a_sweep_is_one_table(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, sweep={"method.name": ["homlora", "fedsa"]})
    said = fedlora("check", recipe).stdout
    lines = [x.split() for x in said.splitlines() if x.strip().startswith(("small-", "all"))]
    assert len(lines) == 3 and "2 runs are valid" in said and "training rows" not in said
    each = [json.loads(x) for x in fedlora("check", recipe, "--json", "--no-measure").stdout.splitlines()]
    total = sum(sum(x["bytes"].values()) for x in each) / 1e3
    assert f"{total:.1f} kB" in " ".join(lines[-1])


def test_runs_that_differ_in_their_seed_are_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, sweep={"method.name": ["homlora", "fedsa"], "run.seed": [0, 1, 2]})
    tried: list[str] = []

    def once(f: Any, block: int, program: int) -> Any:
        tried.append(f.method.name)
        return estimated(f, block, program)

    monkeypatch.setattr("fedlora.recipe.checked.probe", once)
    checks.check(expand(recipe), True, True, Console(file=io.StringIO()), Console(file=io.StringIO()))
    assert tried == ["homlora", "fedsa"]


def test_layers_are_named(tmp_path: Path) -> None:
    c = checked(fl.Recipe.load(write_recipe(tmp_path)), measure=False)
    assert {n for n, *_ in c.run.layers["target"]} == {
        f"bert.encoder.layer.*.attention.self.{x}" for x in ("query", "value")
    }
    assert sum(n for _, n, _ in c.run.layers["target"]) == c.run.sites == 4
    assert len(repr(c)) < 120 and "small" in repr(c)
    assert c.run.attention.startswith(("eager, because ", "sdpa, because "))
