"""The benchmark does the same work everywhere, and a block does not do more than one client: counts, not seconds."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cli import fedlora, model_folder
from torch.utils._python_dispatch import TorchDispatchMode

from fedlora import kernels
from fedlora.bench.run import Measured, measure, ratios
from fedlora.bench.work import REGIMES, Regime, Work, tokens
from fedlora.methods import METHODS
from fedlora.methods.contract import RoundInfo
from fedlora.training.batching import CACHED, cut, stack_batches
from fedlora.training.loss import Loss
from fedlora.training.tasks.classification import Classification
from fedlora.tree import stack

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("bench") / "m")


def on_gpu(out: Path, *more: str) -> dict[str, Any]:
    """bench/gpu.py with tiny shapes on the CPU: its figures, once its page is written."""
    script = [sys.executable, str(ROOT / "bench/gpu.py"), "--quick", "--device", "cpu", "--output", str(out), *more]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Clients from one to many" in (out / "gpu.html").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    return found


def agree(found: dict[str, Any], dtype: str, most: float) -> None:
    """An encoder and a language model: blocks train what single clients do, and PEFT's layers with torch's AdamW."""
    mine = [m for m in found["measured"] if m["dtype"] == dtype]
    assert len(mine) == 2 and not found["not_measured"]
    for m in mine:
        assert m["block_difference"] < most and m["loop_difference"] < most, m
        assert set(m["k"]) == {"1", "2", "4"}


def test_gpu_benchmark_takes_its_whole_path_on_a_cpu(tmp_path: Path) -> None:
    agree(on_gpu(tmp_path, "--dtype", "fp32"), "fp32", 1e-5)


@pytest.mark.slow
def test_gpu_benchmark_in_half_precision_on_a_cpu(tmp_path: Path) -> None:
    found = on_gpu(tmp_path)
    agree(found, "fp32", 1e-5)
    # Compiled operators and PyTorch's round to bf16 at other places. Where a gradient is nearly zero, that turns one of AdamW's
    # first steps around.
    agree(found, "bf16", 0.15)


def test_systems_agree(folder: Path) -> None:
    """One round of every fp32 system from one start gives the averaged leaves of the PEFT loop with torch's AdamW."""
    work = Work(str(folder), max_length=16, regime=Regime("tiny", 3, 2, 4), threads=1)
    found = {m.system: m for m in measure(work, ["peft", "one", "blocks"], 1)}
    for m in found.values():
        assert not m.failed, m.failed
        assert m.difference is not None and m.difference < 2e-5
        assert m.tokens == found["peft"].tokens and m.seconds[0] > 0 and m.startup > 0 and m.memory > 10_000_000


def test_pfl_agrees(folder: Path) -> None:
    pytest.importorskip("pfl", reason="pfl is not installed; see src/fedlora/bench/pfl_sim.py")
    work = Work(str(folder), max_length=16, regime=Regime("tiny", 3, 2, 4), threads=1)
    for m in measure(work, ["peft", "pfl"], 1):
        assert not m.failed, m.failed
        assert m.difference is not None and m.difference < 2e-6


@pytest.mark.slow
def test_systems_agree_on_a_language_model(tmp_path: Path) -> None:
    work = Work(
        str(model_folder(tmp_path / "m", causal=True)),
        "causal-lm",
        max_length=16,
        regime=Regime("tiny", 3, 2, 4),
        threads=1,
    )
    for m in measure(work, ["peft", "blocks"], 1):
        assert not m.failed, m.failed
        assert m.difference is not None and m.difference < 2e-5


@pytest.mark.parametrize(
    "method", ["hetlora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("pf2lora", "slora"))]
)
def test_blocks_do_what_one_client_after_another_does(method: str, folder: Path) -> None:
    """Methods without a peer: the first system is the reference."""
    work = Work(str(folder), method_name=method, max_length=16, regime=Regime("tiny", 3, 1, 4), threads=1)
    one, blocks = measure(work, ["one", "blocks"], 1)
    assert not one.failed and not blocks.failed, one.failed + blocks.failed
    assert one.difference == 0.0
    assert blocks.difference is not None and blocks.difference < 2e-5


def test_a_system_that_fails_is_named(folder: Path) -> None:
    work = Work(str(folder / "nowhere"), threads=1)
    [m] = measure(work, ["blocks"], 1)
    assert "does not exist" in m.failed and not m.seconds


@pytest.mark.parametrize("system, package", [("flower", "ray"), ("pfl", "pfl")])
def test_a_missing_peer_is_named(system: str, package: str, folder: Path) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    [m] = measure(Work(str(folder), threads=1), [system], 1)
    assert m.failed == f"{package} is not installed; docs/performance.md says how a peer is"


def test_work_is_the_same_for_everybody(folder: Path) -> None:
    a, b = Work(str(folder), threads=1), Work.from_json(json.loads(json.dumps(Work(str(folder), threads=1).to_json())))
    assert a == b
    x, y, z = a.batches(1), b.batches(1), a.batches(2)
    assert all(
        torch.equal(p["input_ids"], q["input_ids"])
        for m, n in zip(x, y, strict=True)
        for p, q in zip(m, n, strict=True)
    )
    assert tokens(x) != tokens(z)
    assert [len(x), len(x[0]), len(x[0][0]["labels"])] == [16, 4, 8]


def test_ratios_pair_rounds() -> None:
    assert ratios(Measured("a", "", seconds=[1.0, 2.0]), Measured("b", "", seconds=[3.0, 8.0])) == [3.0, 4.0]


@pytest.mark.slow
def test_the_command(folder: Path, tmp_path: Path) -> None:
    done = fedlora("bench", "--model", folder, "--regime", "small", "--system", "peft", "--system", "blocks", "--rounds", 1,
                   "--threads", 1, "-o", tmp_path)  # fmt: skip
    assert "fedlora blocks" in done.stdout
    [path] = tmp_path.glob("*.json")
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert result["environment"]["versions"]["torch"] == torch.__version__
    assert {m["system"] for m in result["regimes"][0]["systems"]} == {"peft", "blocks"}


def test_the_command_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    done = fedlora("bench", "--regime", "huge", code=2)
    assert all(r in done.stderr for r in REGIMES)
    fedlora("bench", "--system", "magic", code=2)
    done = fedlora("bench", "--system", "flower", "--method", "pf2lora", "--regime", "huge", code=2)
    assert "a system that does pf2lora" in done.stderr and "--regime" in done.stderr
    assert "--method" in fedlora("bench", "--method", "pf3lora", code=2).stderr
    assert "--device: got 'gpu'" in fedlora("bench", "--device", "gpu", code=2).stderr
    if not torch.cuda.is_available():
        done = fedlora("bench", "--device", "cuda", "--system", "flower", code=2)
        assert "--device: got 'cuda', expected a device of this machine (cpu" in done.stderr
        assert "a system that does homlora on cuda" in done.stderr
    (tmp_path / "n.csv").write_text("note\na\n")
    done = fedlora("bench", "--model", folder, "--source", tmp_path / "n.csv", code=1)
    assert "no column 'text' among the columns ['note']" in done.stderr


def script(name: str, *arguments: Any) -> str:
    """What a script of bench/ prints, in a process of its own as users start it."""
    command = [sys.executable, f"bench/{name}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_profile(folder: Path) -> None:
    """Shares of everything that a round does: they sum to one, and products have theirs."""
    lines = script("block_profile", "demo", "small", "fp32", folder).splitlines()
    shares = {x[8:]: float(x[:6]) for line in lines if (x := line.replace("%", " "))[:1] == " "}
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    assert shares["products of the base"] > 1 and shares["the rest"] < 60


@pytest.mark.slow
@pytest.mark.skipif(kernels.missing() is not None, reason=f"kernels: {kernels.missing()}")
def test_what_kernels_bring(folder: Path) -> None:
    lines = script("kernels", "demo", "small", 1, folder).splitlines()
    assert [line[:18].strip() for line in lines] == ["PyTorch's", "compiled, padded", "compiled"]
    assert "1.00 (1.00-1.00) x the first" in lines[0] and all(" 0 tokens/s" not in line for line in lines)


@pytest.mark.slow
def test_systems_in_pairs(folder: Path) -> None:
    lines = script("paired", "demo", 2, 2, 1, folder).splitlines()
    assert [line[:20].strip() for line in lines][::2] == ["PEFT loop, fp32", "blocks, fp32", "blocks, bf16"]
    assert "1.00 (1.00-1.00) x the first" in lines[0]


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the picture needs the extra 'report'")
    results = sorted((ROOT / "bench/results").glob("*-minilm-*.json"))
    script("plot", *results[:2], tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    for m in json.loads(results[0].read_text())["regimes"][0]["systems"]:
        assert m["title"] in page


@pytest.mark.slow
def test_the_machinery_at_scale(tmp_path: Path) -> None:
    """bench/scale.py as shipped, a million clients: what bench/NOTES.md says of memory, which is no matter of speed."""
    script("scale", tmp_path / "scale.json")
    found = json.loads((tmp_path / "scale.json").read_text(encoding="utf-8"))
    assert found["registered"]["clients"][-1] == 1_000_000
    assert found["registered"]["bytes_per_client"] < 200
    assert found["registered"]["files"] < 20  # none for clients without private state
    assert found["server"]["flexlora"]["relative_difference"] < 1e-4


class Count(TorchDispatchMode):
    """Counts operators as they reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


def operators(clients: int) -> int:
    """Operators of one step of a block."""
    f = tiny.federation(METHODS["homlora"](rank=2), Path("unused"))
    start = stack([f.method.init(f.context).params] * clients)
    batch = stack_batches([tiny.tokens().collate(torch.arange(4).numpy()) for _ in range(clients)])
    work = f.method.begin(f.context, RoundInfo(0, 1), start, {})
    loss = Loss(f.model, Classification(tiny.CLASSES))
    with Count() as count:
        f.method.step(work, loss, torch.ones(clients, dtype=torch.float64), batch)
    return count.n


def test_a_block_launches_no_more_than_one_client() -> None:
    assert operators(8) <= operators(1) * 1.02


def test_pieces_fit_the_caches() -> None:
    """A piece of several rows has no more padded tokens than caches hold; single rows always pass."""
    cuts = cut([64] * 8, 16, 128, 8, tokens=2048)
    assert cuts == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert cut([64] * 2, 64, 128, 2, tokens=2048) == [(0, 1), (1, 2)]
    assert CACHED[torch.float32] < CACHED[torch.bfloat16]
