"""Laws of an int8 base: what is rounded and by how much, against float64, and what a run on it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cli import fedlora, model_folder, rows, write_csv
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

import fedlora as fl
from fedlora.checkpoints import pretrained
from fedlora.errors import ConfigError
from fedlora.kernels import deltas, int8
from fedlora.kernels.int8 import Int8Linear, quantise, scaled, to_int8
from fedlora.kernels.library import unavailable
from fedlora.tree import Params

FORMS = ("vector", "vector2", None)  # AVX-512, AVX2, and PyTorch's own operators


def form(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    """Quantise by this form, where the processor has it."""
    if name is not None and unavailable(name):  # type: ignore[arg-type]
        pytest.skip(f"needs what {name} needs: {unavailable(name)}")  # type: ignore[arg-type]
    monkeypatch.setattr(int8, "first", lambda *names: name)


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """SwitchBack's row-wise quantisation, written in float64: codes and scales."""
    x = x.double()
    most = x.abs().amax(1)
    return (x / torch.where(most > 0, most, 1.0)[:, None] * 127).round(), most / 127


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("shape", [(5, 7), (33, 384), (1, 16), (64, 100), (3, 1), (0, 8)])
@pytest.mark.parametrize("folded", [False, True])
def test_codes_are_within_half_a_step(
    name: str | None, shape: tuple[int, int], folded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    form(monkeypatch, name)
    g = torch.Generator().manual_seed(shape[0])
    x, fold = torch.randn(shape, generator=g) * 10 ** torch.randn(shape[0], 1, generator=g), None
    if folded:
        fold = torch.rand(shape[1], generator=g) + 0.1
    codes, scale = quantise(x, fold)
    wide = x.double() * (1 if fold is None else fold.double())
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    assert torch.allclose(scale.double(), exact(wide)[1], rtol=1e-6)
    assert ((codes.double() * scale[:, None] - wide).abs() <= scale[:, None] * 0.5001).all()
    if len(x):
        assert (codes.abs().amax(1) == 127).all()
    monkeypatch.setattr(int8, "first", lambda *names: None)
    again, same = quantise(x, fold)
    assert torch.equal(again, codes) and torch.equal(same, scale)  # every form gives the same bits


@pytest.mark.parametrize("name", FORMS)
def test_what_is_not_finite_stays_so(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    form(monkeypatch, name)
    x = torch.ones(5, 40)
    x[1, 3], x[2, 39], x[3, 0] = float("nan"), float("inf"), -float("inf")
    x[4] = 0
    codes, scale = quantise(x)
    assert scale.isnan().tolist() == [False, True, True, True, False] and scale[4] == 0 and not codes[4].any()
    y = scaled(torch.ones(5, 20, dtype=torch.int32), scale, None, None)
    assert y[1:4].isnan().all() and y[0].isfinite().all() and not y[4].any()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("rows", "i", "o", "bias"), [(9, 24, 40, True), (1, 7, 5, True), (64, 128, 33, False)])
def test_a_layer_is_switchback(
    name: str | None, rows: int, i: int, o: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the forward and the input-gradient half of algorithm 1, transcribed in float64, with a scale for each channel."""
    form(monkeypatch, name)
    torch.manual_seed(i)
    plain = nn.Linear(i, o, bias=bias)
    layer = Int8Linear(plain)
    x, g = torch.randn(rows, i, requires_grad=True), torch.randn(rows, o)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, g)
    w, s = exact(plain.weight.detach())
    xq, a = exact(x.detach())
    want = (xq @ w.T) * a[:, None] * s + (plain.bias.detach().double() if bias else 0)
    assert torch.allclose(y.double(), want, rtol=1e-5, atol=1e-6)
    gq, c = exact(g * s)
    assert torch.allclose(dx.double(), (gq @ w) * c[:, None], rtol=1e-5, atol=1e-6)
    # and that is near what the plain layer gives
    plain_y = plain(x)
    (plain_dx,) = torch.autograd.grad(plain_y, x, g)
    assert (y - plain_y).norm() < 0.02 * plain_y.norm() and (dx - plain_dx).norm() < 0.02 * plain_dx.norm()
    assert layer(x.view(1, rows, 1, i)).shape == (1, rows, 1, o)
    with pytest.raises(RuntimeError):
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        first.sum().backward()


def test_which_layers_and_what_they_hold(tmp_path: Path) -> None:
    """A byte a weight; heads, and an output layer that shares the table, stay as they are."""
    model_folder(tmp_path / "m")
    loaded = pretrained.load(str(tmp_path / "m"), dtype="int8", classes=3)
    plain = pretrained.load(str(tmp_path / "m"), dtype="fp32", classes=3)
    modules = dict(plain.base.named_modules())
    turned = {n: m for n, m in loaded.base.named_modules() if isinstance(m, Int8Linear)}
    assert turned.keys() == {n for n, m in modules.items() if isinstance(m, nn.Linear)} - set(loaded.head)
    for n, m in turned.items():
        assert m.codes.element_size() == 1 and m.codes.shape == modules[n].weight.shape
        assert (m.weight - modules[n].weight).abs().max() <= modules[n].weight.abs().max() / 250
        held = sum(v.numel() * v.element_size() for v in (*m.parameters(), *m.buffers()))
        assert held == m.codes.numel() + 4 * m.out_features * (1 + (m.bias is not None))
    assert sum(p.numel() for p in loaded.base.parameters()) == sum(p.numel() for p in plain.base.parameters())
    tied = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9, bias=False))
    tied[1].weight = tied[0].weight  # type: ignore[assignment]
    assert to_int8(tied) == 0


def trained(base: nn.Module | None, folder: Path, block: int, **more: Any) -> Params:
    fed = tiny.federation(fl.HomLoRA(rank=2, optimizer=fl.SGD(0.05)), folder, base, block=block, **more)
    fed.run()
    found = fed.store.load_server()
    assert found is not None
    return found[1]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_block_is_its_clients_one_by_one(family: str, tmp_path: Path) -> None:
    """Rows are quantised each for itself, so nobody's neighbours count. Sums of another order may move a number over the border
    between two codes, which is a hundredth of what the rounding itself changes."""

    def base() -> nn.Module:
        made = tiny.seeded(tiny.families()[family])
        assert to_int8(made, ("classifier", "score")) > 3
        return made

    one, many = trained(base(), tmp_path / "1", 1), trained(base(), tmp_path / "4", 4)
    plain = trained(tiny.seeded(tiny.families()[family]), tmp_path / "fp32", 4)
    gap, rounding = (torch.cat([(one[k] - x[k]).flatten() for k in one]).norm() for x in (many, plain))
    assert gap < 0.05 * rounding, (gap, rounding)
    size = torch.cat([v.flatten() for v in plain.values()]).norm()
    assert rounding < 0.05 * size, (rounding, size)


def test_without_padding_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients' tokens after each other, deltas in the product, against padded rows and deltas by hooks."""
    if unavailable("vector") and unavailable("vector2"):
        pytest.skip("needs compiled operators")

    def model(compiled: bool) -> Any:
        base: Any = tiny.bert()
        base.set_attn_implementation("sdpa")
        to_int8(base, ("classifier",))
        return tiny.adapt(base, compiled=compiled)

    seen: list[bool] = []
    inner = deltas.FlatLowRank.forward
    monkeypatch.setattr(
        deltas.FlatLowRank, "forward", staticmethod(lambda ctx, *a: seen.append(a[6] is not None) or inner(ctx, *a))
    )
    found = [trained(None, tmp_path / str(c), 4, model=model(c)) for c in (True, False)]
    assert seen and all(seen)
    plain = trained(tiny.bert(), tmp_path / "fp32", 4)
    gap, rounding = (torch.cat([(found[0][k] - x[k]).flatten() for k in plain]).norm() for x in (found[1], plain))
    assert gap < 0.05 * rounding, (gap, rounding)


def test_an_export_folds_into_the_original_weights(tmp_path: Path) -> None:
    """Whole: from a recipe; the numbers are said, and the merged folder is the base in fp32 with the trained products."""
    model_folder(tmp_path / "m")
    write_csv(tmp_path / "a.csv", rows(120))
    recipe: dict[str, Any] = {
        "name": "a", "model": {"name": str(tmp_path / "m"), "dtype": "int8"}, "run": {"output": str(tmp_path / "run")},
        "data": {"source": str(tmp_path / "a.csv"), "text": "text", "label": "label", "max_length": 16}, "method": "homlora",
        "partition": {"clients": 3}, "federation": {"rounds": 2}, "train": {"steps": 3, "lr": 0.01},
    }  # fmt: skip
    assert "int8" in fl.check(recipe, measure=False).run.numbers
    fl.run(recipe)
    fedlora("export", tmp_path / "run", "-o", tmp_path / "out", "--merged")
    assert (
        "| trained over | the base in int8, and loaded over its own weights |"
        in (tmp_path / "out/README.md").read_text()
    )
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    whole = pretrained.load(str(tmp_path / "m"), classes=3).base.state_dict()
    found = fl.load(tmp_path / "run").deltas()
    for layer in {k.layer for k in found if k.part == "A"}:
        b, a = (next(v for k, v in found.items() if (k.layer, k.part) == (layer, part)) for part in "BA")
        assert torch.allclose(merged[f"{layer}.weight"], whole[f"{layer}.weight"] + b @ a, atol=1e-6)
    same = {k.layer for k in found}
    assert all(torch.equal(merged[n], v) for n, v in whole.items() if n.rpartition(".")[0] not in same)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "pf2lora"}, "differentiates the model twice and a rounded product has no second derivative"),
        ({"model": {"dtype": "int4"}}, "int8"),
    ],
)
def test_what_it_cannot_serve(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    model_folder(tmp_path / "m")
    write_csv(tmp_path / "a.csv", rows(60))
    raw: dict[str, Any] = {
        "name": "a", "model": {"name": str(tmp_path / "m"), "dtype": "int8"} | change.get("model", {}),
        "data": {"source": str(tmp_path / "a.csv"), "text": "text", "label": "label"},
        "method": change.get("method", "homlora"), "partition": {"clients": 2},
    }  # fmt: skip
    with pytest.raises(ConfigError) as e:
        fl.check(raw, measure=False)
    assert says in str(e.value)
