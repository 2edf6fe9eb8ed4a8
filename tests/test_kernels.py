"""Laws of the compiled operators: float64 and PyTorch's own operators say what they must compute."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from fedlora import kernels
from fedlora.federation.summary import operators
from fedlora.files import cache
from fedlora.kernels import attention, deltas, hooks, library, linear, words
from fedlora.kernels.dropout import Drop, dropped
from fedlora.model import adapted
from fedlora.model.adapted import Adapted
from fedlora.model.dropout import ClientDropout, keep_mask
from fedlora.training import batching
from fedlora.training.batching import packed
from fedlora.training.loss import Loss
from fedlora.training.tasks.causal_lm import CausalLM
from fedlora.training.tasks.classification import Classification
from fedlora.tree import Key, Params

needs_kernels = pytest.mark.skipif(kernels.missing() is not None, reason=f"kernels: {kernels.missing()}")
ROUNDING = 4e-3  # of bf16 through one attention, relative in norm; PyTorch's own is at 2 to 5e-3
EXACT = 3e-6  # of fp32
ENGINES = [
    ("amx", torch.bfloat16),
    *((name, d) for name in ("vector", "vector2") for d in (torch.float32, torch.bfloat16)),
]


def away(a: Tensor, b: Tensor) -> float:
    return float(((a.double() - b.double()).norm() / b.double().norm()).detach())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


CASES = {  # rows, heads, heads per key head, queries, keys, width, mask
    "minilm": (3, 4, 1, 64, 64, 32, "lengths"),
    "odd sides": (2, 2, 1, 17, 17, 40, "lengths"),
    "no mask": (2, 2, 1, 33, 33, 64, None),
    "causal, key heads shared": (2, 4, 2, 40, 40, 16, "causal"),
    "longer than a vector of threads": (1, 2, 1, 250, 250, 64, "lengths"),
    "other keys than queries": (2, 2, 1, 20, 45, 32, "lengths"),
}


FEW = {  # so few tokens that only dropout brings them to the kernel
    "two tokens": (9, 4, 1, 2, 2, 16, "lengths"), "six tokens": (2, 12, 1, 6, 6, 32, "lengths"), "five, causal": (9, 4, 2, 5, 5, 32, "causal"),
}  # fmt: skip


def case(name: str) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """Tensors as a model hands them over: heads beside each other in memory, tokens apart."""
    b, h, g, n, m, d, kind = (CASES | FEW)[name]
    q = draw(b, n, h, d).transpose(1, 2).requires_grad_()
    k, v = (draw(b, m, h // g, d, seed=i).transpose(1, 2).requires_grad_() for i in (1, 2))
    said: dict[str, Any] = {"enable_gqa": g > 1, "is_causal": kind == "causal"}
    if kind == "lengths":
        lengths = torch.tensor([m, *(m // 2 + 1,) * (b - 1)])
        said["attn_mask"] = (torch.arange(m)[None] < lengths[:, None])[:, None, None]
    return [q, k, v], said, draw(b, h, n, d, seed=3)


@pytest.fixture(params=ENGINES, ids=lambda e: f"{e[0]}-{str(e[1]).removeprefix('torch.')}")
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.dtype, float]:
    """Every library in turn, whichever would serve here, with a dtype and how near it must come to float64."""
    name, dtype = request.param
    if why := library.unavailable(name):
        pytest.skip(f"{name}: {why}")
    for module in (attention, library):
        monkeypatch.setattr(module, "serving", lambda d: name if d == dtype else None)
    return dtype, ROUNDING if dtype == torch.bfloat16 else EXACT


def of(dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


def in_double(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


@pytest.mark.parametrize("name", CASES)
def test_attention_and_its_derivatives_are_the_formula_in_float64(name: str, engine: tuple[torch.dtype, float]) -> None:
    tensors, said, g = case(name)
    tensors, g = of(engine[0], tensors), g.to(engine[0])
    with kernels.Fused():
        out = F.scaled_dot_product_attention(*tensors, **said)
    assert type(out.grad_fn).__name__ == "AttentionBackward"
    exact = in_double(tensors)
    right = F.scaled_dot_product_attention(*exact, **said)
    found, wanted = grad(out, tensors, g), grad(right, exact, g.double())
    for a, b in zip((out, *found), (right, *wanted), strict=True):
        assert away(a, b) < engine[1]


@pytest.mark.parametrize("name", ["minilm", "odd sides", "causal, key heads shared", *FEW])
def test_attention_with_dropout_is_the_formula_in_float64(name: str, engine: tuple[torch.dtype, float]) -> None:
    """With the masks that eager attention would have."""
    tensors, said, g = case(name)
    tensors, g = of(engine[0], tensors), g.to(engine[0])
    seeds, p = torch.arange(len(g)) * 7919, 0.4
    with ClientDropout(seeds, now=kernels.Now()):
        out = F.scaled_dot_product_attention(*tensors, dropout_p=p, **said)
    exact = in_double(tensors)
    q, k, v = (x.repeat_interleave(g.shape[1] // x.shape[1], 1) for x in exact)
    mask = torch.ones(g.shape[2], k.shape[2], dtype=torch.bool).tril() if said["is_causal"] else said["attn_mask"]
    shares = (q @ k.mT * g.shape[3] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    right = shares * keep_mask(seeds, 1, shares.shape, p) / (1 - p) @ v
    found, wanted = grad(out, tensors, g), grad(right, exact, g.double())
    for a, b in zip((out, *found), (right, *wanted), strict=True):
        assert away(a, b) < engine[1]


@pytest.mark.parametrize("causal", [False, True])
def test_packed_rows_attend_to_themselves_alone(causal: bool, engine: tuple[torch.dtype, float]) -> None:
    """In float64 row by row; tokens that belong to no row are zeros, and so is their gradient."""
    lengths = torch.tensor([[9, 33, 1], [20, 2, 17]])
    packing = kernels.Packing(lengths, 40, causal)
    t = packing.width
    q = draw(2, t, 4, 24).transpose(1, 2)
    k, v = (draw(2, t, 2, 24, seed=i).transpose(1, 2) for i in (1, 2))
    tensors, g = of(engine[0], [q, k, v]), draw(2, 4, t, 24, seed=3).to(engine[0])
    out = attention.attention(*tensors, enable_gqa=True, packing=packing)
    exact, parts = in_double(tensors), []
    for client, mine in enumerate(lengths.tolist()):
        ends = torch.tensor([0, *mine]).cumsum(0).tolist()
        rows = [
            F.scaled_dot_product_attention(*(x[client, :, a:b] for x in exact), is_causal=causal, enable_gqa=True)
            for a, b in itertools.pairwise(ends)
        ]
        parts.append(torch.cat([*rows, torch.zeros(4, t - ends[-1], 24, dtype=torch.float64)], 1))
    right = torch.stack(parts)
    found, wanted = grad(out, tensors, g), grad(right, exact, g.double())
    assert not out[0, :, 43:].any() and not found[1][1, :, 39:].any()
    for a, b in zip((out, *found), (right, *wanted), strict=True):
        assert away(a, b) < engine[1]


@needs_kernels
def test_second_derivatives_of_attention_are_as_good_as_eager_ones() -> None:
    tensors, said, g = case("minilm")
    unseen = torch.where(said["attn_mask"], 0.0, -1e9)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 32**-0.5 + unseen.to(q)).softmax(-1) @ v

    def second(tensors: list[Tensor], g: Tensor, compiled: bool = False) -> Tensor:
        with kernels.Fused():
            out = F.scaled_dot_product_attention(*tensors, **said) if compiled else eager(*tensors)
        first = grad(out, tensors, g, create_graph=True)
        found = grad(sum((x.square().sum() for x in first), torch.zeros(())), tensors)
        return torch.cat([x.flatten() for x in found])

    exact = second(in_double(tensors), g.double())
    assert away(second(tensors, g, compiled=True), exact) < 1.2 * away(second(tensors, g), exact)


@needs_kernels
def test_a_row_that_sees_no_key_is_zero_and_gives_no_gradient() -> None:
    tensors, _, g = case("minilm")
    mask = torch.ones(3, 1, 64, 64, dtype=torch.bool)
    mask[1, 0, 5] = False
    with kernels.Fused():
        out = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    assert not out[1, :, 5].any() and out[1, :, 4].any()
    dq = grad(out, tensors[0], g)[0]
    assert not dq[1, :, 5].any() and dq[1, :, 4].any() and bool(dq.isfinite().all())


@needs_kernels
def test_a_number_that_is_none_stays_visible() -> None:
    tensors, said, _ = case("no mask")
    with torch.no_grad():
        tensors[0][0, 0, 3, 0] = float("nan")
        with kernels.Fused():
            out = F.scaled_dot_product_attention(*tensors, **said)
    assert bool(out[0, 0, 3].isnan().all()) and bool(out[1].isfinite().all())


@needs_kernels
def test_threads_change_no_bit_and_other_products_are_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN leaves the tiles of a thread as it set them, and looks at nothing before its next product."""
    tensors, said, g = case("odd sides")
    a, b = draw(300, 200), draw(200, 100)
    product, found = a @ b, []
    for n in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
        with kernels.Fused():
            out = F.scaled_dot_product_attention(*tensors, **said)
        found.append([out, *grad(out, tensors, g)])
        assert torch.equal(a @ b, product)
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@needs_kernels
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_pytorchs(name: str) -> None:
    """Values and second derivatives to the bit, first ones but for a rounding here and there."""
    f, x, g = ACTIVATIONS[name], (draw(7, 33, 50) * 3).requires_grad_(), draw(7, 33, 50, seed=1)

    def derivatives(y: Tensor) -> list[Tensor]:
        twice = grad(y, x, g, create_graph=True)[0]
        return [grad(twice.square().sum(), x, retain_graph=True)[0], grad(y, x, g)[0]]

    with kernels.Fused():
        y = f(x)
    assert type(y.grad_fn).__name__ == "ActivationBackward" and torch.equal(y, f(x))
    (second, first), (second_of, first_of) = derivatives(y), derivatives(f(x))
    assert torch.equal(second, second_of) and away(first, first_of) < 1e-4


@needs_kernels
@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_layer_is_the_same_product(dtype: torch.dtype, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By either library of products, whichever is the fast one here."""
    monkeypatch.setattr(linear, "onednn", lambda d: onednn)
    near = ROUNDING if dtype == torch.bfloat16 else EXACT
    x, w, b, g = (v.to(dtype) for v in (draw(3, 5, 40), draw(24, 40), draw(24), draw(3, 5, 24)))
    x.requires_grad_()
    with kernels.Fused():
        y = F.linear(x, w, b)
    exact = F.linear(x.double(), w.double(), b.double())
    assert type(y.grad_fn).__name__ == "LinearBackward"
    assert away(y, exact) < near and away(grad(y, x, g)[0], g.double() @ w.double()) < near


@needs_kernels
def test_what_they_are_not_made_for_is_pytorchs() -> None:
    """Each would be wrong, or a trained layer would get no gradient."""
    (q, k, v), _, g = case("no mask")
    learned = draw(1, 2, 33, 33).requires_grad_()
    trained = draw(24, 64).requires_grad_()
    with kernels.Fused():
        added = F.scaled_dot_product_attention(q, k, v, attn_mask=learned)
        layer = F.linear(q, trained)
        full = F.gelu(q.float())
    right = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v, learned)))
    assert away(added, right) < 2 * ROUNDING
    assert away(grad(added, learned, g)[0], grad(right, learned, g.double())[0]) < 2 * ROUNDING
    assert grad(layer.sum(), trained)[0].any() and type(full.grad_fn).__name__ == "GeluBackward0"


PACKED = {
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "xlm-roberta",
    "llama",
    "qwen2",
    "qwen3",
}  # whose rows do without padding


def encoders() -> dict[str, Any]:
    """Encoders beside those of tiny.families."""
    import transformers as t

    small = {"vocab_size": tiny.VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
             "num_labels": tiny.CLASSES, "pad_token_id": 1, "max_position_embeddings": 64}  # fmt: skip
    return {
        "electra": lambda: t.ElectraForSequenceClassification(t.ElectraConfig(**small, embedding_size=8)),
        "xlm-roberta": lambda: t.XLMRobertaForSequenceClassification(t.XLMRobertaConfig(**small)),
    }


FAMILIES = {
    **{name: (make, False) for name, make in encoders().items()},
    # Which has no sdpa.
    **{name: (make, False) for name, make in tiny.families().items() if not name.startswith("deberta")},
    **{f"causal {name}": (make, True) for name, make in tiny.causal_families().items()},
}


def gradients(
    family: str, dtype: torch.dtype, attention: str, way: str = "", rows: slice = slice(None), **more: Any
) -> Tensor:
    """Of the adapters on padded rows of two clients, of which `rows` are taken. way "twice": the product of the Hessian with a vector;
    "two adapters": two low-rank deltas at each layer; "dropout": at the architecture's own rates, a tenth."""
    make, causal = FAMILIES[family]
    base = tiny.seeded(make).to(dtype)
    base.config._attn_implementation = attention
    ids = torch.randint(3, tiny.VOCABULARY, (2, 3, 32), generator=torch.Generator().manual_seed(5))
    mask = (torch.arange(32) < torch.tensor([[32, 20, 9], [31, 30, 12]])[..., None]).long()
    labels = torch.where(mask > 0, ids, -100) if causal else ids[..., 0] % tiny.CLASSES
    batch = {
        "input_ids": torch.where(mask > 0, ids, base.config.pad_token_id or 0),
        "attention_mask": mask,
        "labels": labels,
    }
    batch = {n: v[rows] for n, v in (batch | {"weight": torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])}).items()}
    batch["seed"], batch["common"] = torch.arange(1, 7).view(2, 3)[rows] * 7919, torch.ones(2, dtype=torch.int64)[rows]
    more = {"dropout": "dropout" in way, "checkpointing": "checkpointing" in way} | more
    model = tiny.adapt(base, "causal-lm" if causal else "classification", **more)
    loss = Loss(model, CausalLM() if causal else Classification(tiny.CLASSES))
    leaves: Params = {}
    for i, s in enumerate(model.groups["target"]):
        for j, name in enumerate(("lora", "own") if way == "two adapters" else ("lora",)):
            for n, (part, shape) in enumerate((("A", (2, 4, s.in_)), ("B", (2, s.out, 4)))):
                leaves[Key(name, s.name, part)] = draw(*shape, seed=4 * i + 2 * j + n)[rows].float() / 4
    if "twice" in way:
        found = loss.hessian_vector(lambda p: p, leaves, {k: torch.ones_like(v) for k, v in leaves.items()}, batch)
    else:
        found = loss.gradient(lambda p: p, leaves, batch)[1]
    return torch.cat([found[k].flatten(1) for k in sorted(found)], 1)


WAYS = [
    ("bert", "twice"),
    ("causal llama", "twice"),
    ("bert", "checkpointing"),
    ("bert", "two adapters"),
    ("gpt2", "two adapters"),
]


@needs_kernels
@pytest.mark.parametrize(("family", "way"), [*((f, "") for f in FAMILIES), *WAYS])
def test_a_bases_gradient_is_as_near_to_fp32_as_without_them(
    family: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the compiled attention is what was called, without padding where the architecture is known to allow it."""
    called: list[bool] = []
    forward = attention.Attention.forward

    def seen(ctx: Any, q: Any, k: Any, v: Any, mask: Any, scale: Any, packing: Any, drop: Any) -> Tensor:
        called.append(packing is not None)
        assert (drop is not None) == ("dropout" in way)
        return forward(ctx, q, k, v, mask, scale, packing, drop)

    monkeypatch.setattr(attention.Attention, "forward", staticmethod(seen))
    exact = gradients(family, torch.float32, "eager", way)
    plain = gradients(family, torch.bfloat16, "eager", way, compiled=False)
    assert not called
    ours = gradients(family, torch.bfloat16, "sdpa", way)
    assert called and set(called) == {family.removeprefix("causal ") in PACKED and "checkpointing" not in way}
    assert away(ours, exact) < 1.5 * away(plain, exact)


FP32 = [("bert", ""), ("roberta", ""), ("distilbert", ""), ("gpt2", ""), ("causal llama", ""), ("bert", "dropout"), ("bert", "twice"),
        ("bert", "two adapters")]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize(("family", "way"), FP32)
def test_in_fp32_they_change_the_last_bits_alone(family: str, way: str) -> None:
    plain = gradients(family, torch.float32, "eager", way, compiled=False)
    assert away(gradients(family, torch.float32, "sdpa", way), plain) < 2e-5


@needs_kernels
@pytest.mark.parametrize(("family", "way"), [("bert", ""), ("gpt2", ""), ("bert", "dropout"), ("gpt2", "dropout")])
def test_a_clients_gradient_is_its_own(family: str, way: str) -> None:
    """In a block as by itself, but for roundings; each has rows of its own lengths."""
    block = gradients(family, torch.bfloat16, "sdpa", way)
    for k in range(2):
        alone = gradients(family, torch.bfloat16, "sdpa", way, rows=slice(k, k + 1))
        assert away(block[k : k + 1], alone) < 5 * ROUNDING


@needs_kernels
@pytest.mark.parametrize("dropout", [False, True])
def test_a_client_may_have_more_tokens_than_a_row(dropout: bool) -> None:
    """What bounds the kernel is the longest row, not all that a client's rows hold."""
    found, n = [], kernels.MOST // 32 + 4
    for dtype, attention_of in ((torch.float32, "eager"), (torch.bfloat16, "sdpa")):
        base = tiny.bert(dropout=0.1).to(dtype)
        base.config._attn_implementation = attention_of
        model = tiny.adapt(base, dropout=dropout)
        ids = torch.randint(3, tiny.VOCABULARY, (1, n, 32), generator=torch.Generator().manual_seed(5))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[..., 0] % tiny.CLASSES}
        batch |= {"weight": torch.ones(1, n), "seed": torch.arange(n)[None], "common": torch.ones(1, dtype=torch.int64)}
        parts = [(s, part, (4, s.in_) if part == "A" else (s.out, 4)) for s in model.groups["target"] for part in "AB"]
        leaves = {
            Key("lora", s.name, part): draw(1, *shape, seed=i).float() / 4 for i, (s, part, shape) in enumerate(parts)
        }
        g = Loss(model, Classification(tiny.CLASSES)).gradient(lambda p: p, leaves, batch)[1]
        found.append(torch.cat([g[k].flatten() for k in sorted(g)]))
    assert away(found[1], found[0]) < 5 * ROUNDING


@needs_kernels
def test_a_layer_of_another_dtype_gets_its_delta_from_the_hook() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.Linear(16, 16).bfloat16(), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.high(self.low(x.bfloat16()).float())
            return y

    model = Adapted(tiny.seeded(Mixed), {"target": ["low", "high"]})
    a, b = torch.ones(2, 4, 16), torch.ones(2, 16, 4)
    p = {Key("lora", layer, part): v for layer in ("low", "high") for part, v in (("A", a), ("B", b))}
    x = draw(2, 3, 16).float()
    found = model.forward(p, {"x": x})
    model.bind({})
    h = model.base.low(x.bfloat16()).float() + 4 * x.bfloat16().float().sum(-1, keepdim=True)
    assert away(found, model.base.high(h) + 4 * h.sum(-1, keepdim=True)) < 5 * ROUNDING


def test_rows_lie_behind_each_other_and_come_back() -> None:
    lengths = torch.tensor([[5, 2, 1], [3, 3, 3], [20, 1, 1]])
    packing = kernels.Packing(lengths, longest=20)
    assert packing.width == 32 and kernels.Packing(lengths[:2], 9).width == 16
    x = torch.arange(1.0, 9 * 20 * 2 + 1).view(9, 20, 2)
    real = torch.arange(20) < lengths.flatten()[:, None]
    x = torch.where(real[..., None], x, 0).requires_grad_()
    rows = packing.pack(x)
    assert rows.shape == (3, 32, 2) and torch.equal(rows[1, 3:6], x[4, :3]) and not rows[1, 9:].any()
    assert torch.equal(packing.unpack(rows), x)
    g = draw(3, 32, 2).float().requires_grad_()
    [found] = grad(rows, x, g, create_graph=True)
    assert torch.equal(found, packing.unpack(g)) and torch.equal(grad(found.sum(), g)[0][1, :9], torch.ones(9, 2))
    starts = {(int(r), int(s)): int(n) for r, s, n in packing.places}
    assert starts == {(0, 0): 5, (0, 5): 2, (0, 7): 1, (0, 8): -24, (1, 0): 3, (1, 3): 3, (1, 6): 3, (1, 9): -23,
                      (2, 0): 20, (2, 20): 1, (2, 21): 1, (2, 22): -10}  # fmt: skip


def test_packed_groups_hold_every_row_once() -> None:
    lengths = torch.tensor([[9, 8, 7, 4, 3], [9, 9, 2, 2, 0]])  # the last only pads
    ids = torch.arange(1, 11).view(2, 5, 1).expand(2, 5, 9) * (torch.arange(9) < lengths[..., None])
    batch = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": torch.arange(10).view(2, 5),
        "weight": (lengths > 0).float(),
    }
    pieces = packed(batch, lengths, 2)
    assert [p["lengths"].tolist() for p in pieces] == [[[9, 7, 3], [9, 2, 1]], [[8, 4], [9, 2]]]
    assert torch.equal(torch.cat([p["labels"] for p in pieces], 1).sort(1).values, batch["labels"])
    assert len(packed(batch, lengths * torch.tensor([1, 1, 1, 1, 0]), 5)) == 4
    assert [p["input_ids"].shape[2] for p in pieces] == [9, 9] and pieces[0]["weight"][1].tolist() == [1, 1, 0]


@pytest.mark.parametrize("rank", [3, 8, 20])
def test_each_clients_deltas_meet_its_own_tokens(
    rank: int, engine: tuple[torch.dtype, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, client by client; tokens that belong to nobody get the base's product alone."""
    dtype, near = engine
    name = attention.serving(dtype)
    if name == "amx":
        pytest.skip("the kernel is one of vectors")
    monkeypatch.setattr(deltas, "first", lambda *names: name)
    ends = torch.tensor([0, 70, 71, 200])
    x, w, bias = (draw(*n, seed=i).to(dtype) for i, n in enumerate([(1, 208, 48), (32, 48), (32,)]))
    a, b, g = draw(3, rank, 48, seed=3).float(), draw(3, 32, rank, seed=4).float(), draw(1, 208, 32, seed=5).to(dtype)
    leaves = [x.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    y = deltas.FlatLowRank.apply(x, w, bias, a, b, ends)
    exact = in_double(leaves)
    parts = [
        exact[0][:, i:j] @ exact[1][k].mT @ exact[2][k].mT for k, (i, j) in enumerate(itertools.pairwise(ends.tolist()))
    ]
    right = F.linear(exact[0], w.double(), bias.double()) + F.pad(torch.cat(parts, 1), (0, 0, 0, 8))
    wanted = grad(right, exact, g.double())
    with torch.enable_grad():
        twice = grad(y, leaves, g, create_graph=True)
    for found in ((y, *grad(y, leaves, g, retain_graph=True)), (y, *twice)):
        for one, other in zip(found, (right, *wanted), strict=True):
            assert away(one, other) < 2 * near


LENGTHS = {"small": (32, 4), "middle": (16, 8), "large": (8, 16), "two clients": (2, 4)}


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", LENGTHS)
def test_no_more_than_a_twentieth_is_computed_beside_the_real_tokens(
    regime: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 43 +- 17 tokens, at most 64."""
    k, b = LENGTHS[regime]
    lengths = torch.normal(43.0, 17.0, (k, b), generator=torch.Generator().manual_seed(2)).round().long().clamp(4, 64)
    mask = (torch.arange(64) < lengths[..., None]).long()
    batch = {"input_ids": mask * 5, "attention_mask": mask, "labels": torch.zeros(k, b, dtype=torch.int64)}
    base = tiny.bert().to(dtype)
    base.config._attn_implementation = "sdpa"
    model, computed = tiny.adapt(base), []
    within = next(m for n, m in base.named_modules() if n.endswith("layer.0.intermediate.dense"))
    within.register_forward_hook(lambda m, args, y: computed.append(y.numel() // y.shape[-1]))
    leaves = {}
    for s in model.groups["target"]:
        leaves[Key("lora", s.name, "A")] = draw(k, 2, s.in_).float()
        leaves[Key("lora", s.name, "B")] = draw(k, s.out, 2, seed=1).float()
    Loss(model, Classification(tiny.CLASSES)).gradient(lambda p: p, leaves, batch | {"weight": torch.ones(k, b)})
    assert int(lengths.sum()) <= sum(computed) <= 1.05 * int(lengths.sum())


@needs_kernels
@pytest.mark.parametrize("way", ["", "dropout"])
@pytest.mark.parametrize("change", ["clients apart", "all that the last layer has", "small groups"])
def test_how_tokens_are_grouped_changes_nothing(change: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether clients follow each other, whether a classifier's last layer computes what nobody reads, how many tokens are a group."""
    usual = gradients("bert", torch.float32, "sdpa", way)
    if change == "clients apart":
        monkeypatch.setattr(Adapted, "_flows", lambda *_: False)
    elif change == "small groups":
        monkeypatch.setattr(batching, "COMPILED", 40)
    else:
        monkeypatch.setattr(hooks, "reader_of", lambda *_: None)
    assert away(gradients("bert", torch.float32, "sdpa", way), usual) < 1e-6


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_words_are_those_of_all_scores(
    dtype: torch.dtype, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with first and second derivatives, whatever the pieces are."""
    monkeypatch.setattr(linear, "onednn", lambda d: onednn)
    monkeypatch.setattr(words, "ENTRIES", 1)
    monkeypatch.setattr(words, "FEWEST", 7)
    near = 2 * ROUNDING if dtype == torch.bfloat16 else EXACT
    h, w, bias, g = (draw(*n, seed=i).to(dtype) for i, n in enumerate([(17, 24), (50, 24), (50,), (17,)]))
    own, h = torch.arange(17) * 2 % 50, h.requires_grad_()
    out = words.WordLosses.apply(h, w, bias, own)
    exact = in_double([h])[0]
    right = F.cross_entropy(F.linear(exact, w.double(), bias.double()), own, reduction="none")
    first, wanted = (grad(y, x, g.to(y), create_graph=True)[0] for y, x in ((out, h), (right, exact)))
    assert away(out, right) < near and away(grad(out, h, g.float(), retain_graph=True)[0], wanted) < near
    assert away(grad(first.square().sum(), h)[0], grad(wanted.square().sum(), exact)[0]) < 2 * near


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_are_not_scored_reach_no_vocabulary(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels of completions alone; a row without any has no loss, and the leaves are those of all scores."""

    def leaves_of(scoring: frozenset[str]) -> tuple[Tensor, Tensor, int]:
        monkeypatch.setattr(adapted, "SCORING", scoring)
        base = tiny.seeded(tiny.causal_families()["llama"]).to(dtype)
        model, seen = tiny.adapt(base, "causal-lm"), []
        base.get_output_embeddings().register_forward_hook(lambda m, args, y: seen.append(y[..., 0].numel()))
        ids = torch.randint(3, tiny.VOCABULARY, (2, 3, 20), generator=torch.Generator().manual_seed(5))
        labels = ids.masked_fill(torch.arange(20) < 14, -100)
        labels[1, 2] = -100
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "weight": torch.ones(2, 3)}
        p = {}
        for s in model.groups["target"]:
            p[Key("lora", s.name, "A")] = draw(2, 2, s.in_).float()
            p[Key("lora", s.name, "B")] = draw(2, s.out, 2, seed=1).float()
        value, g = Loss(model, CausalLM()).gradient(lambda q: q, p, batch)
        return value, torch.cat([g[k].flatten() for k in sorted(g)]), sum(seen)

    ours = adapted.SCORING
    usual, few = leaves_of(frozenset()), leaves_of(ours)
    near = 5 * ROUNDING if dtype == torch.bfloat16 else 2e-6
    assert usual[2] >= 120 and few[2] == 0
    assert away(few[0], usual[0]) < near and away(few[1], usual[1]) < near


needs_dropout = pytest.mark.skipif(
    kernels.unavailable("dropout") is not None, reason=f"kernels: {kernels.unavailable('dropout')}"
)


@needs_dropout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 30), (6, 7, 33), (6, 3, 5, 5), (6, 12, 17, 64), (6, 2, 9001)])
def test_dropout_is_the_plain_one_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Two calls in a row with rates of their own, and the gradient; how a tensor lies in memory does not matter."""
    seeds = torch.randint(0, 2**62, (6,), generator=torch.Generator().manual_seed(0))
    x, g, found = draw(*shape).to(dtype).requires_grad_(), draw(*shape, seed=1).to(dtype), []
    for now in (kernels.Now(), None):
        with ClientDropout(seeds, now=now):
            first = F.dropout(x, 0.1, training=True)
            y = F.dropout(first, 0.37, training=True)
        assert (type(first.grad_fn).__name__ == "DropoutBackward") == (now is not None)
        found.append((y, *grad(y, x, g)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][0].any()
    turned, ways = draw(*reversed(shape)).to(dtype).permute(*reversed(range(len(shape)))), []
    for z in (turned, turned.contiguous()):
        with ClientDropout(seeds, now=kernels.Now()):
            ways.append(F.dropout(z, 0.3, training=True))
    assert torch.equal(*ways)


@needs_dropout
def test_packed_rows_drop_what_padded_ones_drop() -> None:
    packing = kernels.Packing(torch.tensor([[5, 2, 1], [3, 3, 3]]), longest=6)
    x, drop = packing.unpack(draw(2, 16, 33)), Drop(torch.arange(6) * 12345, -20000, 1.25)
    assert torch.equal(packing.pack(dropped(x, drop)), dropped(packing.pack(x), drop, packing))


@needs_dropout
def test_dropout_can_be_differentiated_twice() -> None:
    x = draw(4, 5, 8).float().requires_grad_()
    with ClientDropout(torch.arange(4), now=kernels.Now()):
        y = F.dropout(x, 0.5, training=True)
    first = grad(y.square().sum(), x, create_graph=True)[0]
    assert torch.equal(grad(first.sum(), x)[0], 8.0 * (y != 0))


@pytest.fixture
def fresh() -> Iterator[None]:
    """As in a process that has asked for no kernel yet."""
    library._loaded.cache_clear()
    yield
    library._loaded.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_or_the_cpu_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    able = dict.fromkeys(library.SOURCES["amx"].needs, True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able | {"amx_bf16": False})
    assert library.unavailable() == "the CPU has no amx_bf16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    assert kernels.missing() == "the CPU has no avx2" and not kernels.useful(torch.device("cpu"), torch.bfloat16)
    library._loaded.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
    monkeypatch.setattr(library, "openmp", lambda: "libgomp.so.1")
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    assert library.unavailable() == "there is no C compiler (cc, or the one that CC names)"
    library._loaded.cache_clear()
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'cc: error: unrecognized option -mamx-bf16' >&2\nexit 1\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert library.unavailable() == "cc cannot compile it: cc: error: unrecognized option -mamx-bf16"
    assert list((tmp_path / "cache/fedlora/compiled").iterdir()) == []


@pytest.mark.skipif(
    shutil.which("cc") is None or library.openmp() is None, reason="needs a C compiler and GNU's OpenMP"
)
def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library that was cut off, changed or planted is compiled again and never loaded; one that is whole is kept.

    Loading needs no CPU that could run it."""
    compiler, threads, loaded = shutil.which("cc") or "", library.openmp() or "", []
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: loaded.append(Path(path).read_bytes()))
    place = cache.room("compiled", tmp_path)
    assert place is not None
    file = place / "x.so"
    library._compiled("dropout", compiler, threads, place, "x.so")
    made, good = file.stat().st_mtime_ns, file.read_bytes()
    library._compiled("dropout", compiler, threads, place, "x.so")
    assert file.stat().st_mtime_ns == made
    for bad in (good[: len(good) // 2], b"", b"\x7fELF planted", good[:-1] + bytes([good[-1] ^ 1])):
        file.write_bytes(bad)
        library._compiled("dropout", compiler, threads, place, "x.so")
    file.chmod(0o666)  # anybody may have written into it
    library._compiled("dropout", compiler, threads, place, "x.so")
    assert file.stat().st_mode & 0o077 == 0
    library._compiled("dropout", compiler, threads, None, "x.so")  # without a cache: for this process alone
    assert len(loaded) == 8
    assert all(whole.startswith(b"\x7fELF") and len(whole) > 4096 for whole in loaded)


@needs_kernels
@pytest.mark.usefixtures("fresh")
def test_it_is_kept_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    assert library.unavailable("vector2") is None
    assert len(list((tmp_path / "compiled").iterdir())) == 1
    library._loaded.cache_clear()
    monkeypatch.setenv("FEDLORA_CACHE", "off")
    assert library.unavailable("vector2") is None


def test_a_report_says_whose_operators_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators(tiny.adapt(tiny.bert().double())) == "PyTorch's"
    if kernels.missing() is None:
        assert operators(tiny.adapt(tiny.bert())) in ("compiled for AVX-512", "compiled for AVX2")
    monkeypatch.setattr(kernels, "missing", lambda: "the CPU has no avx2")
    assert operators(tiny.adapt(tiny.bert(), compiled=False)) == "PyTorch's, because the CPU has no avx2"
