"""What stands where no token is: a block of ragged clients is one client at a time, and each row is what transformers
computes of it alone. For every family that reads a sentence at a place which padding decides, in fp32 and bf16.

Kills: another padding id than the model's; rows of weight 0 cut into something that is no input; label vectors cut like tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional

from fedlora.data.examples import Tokens
from fedlora.evaluation.predictions import predict
from fedlora.model.adapted import Adapted
from fedlora.model.targets import matching
from fedlora.seeds import np_rng
from fedlora.training import batching
from fedlora.training.batching import fitted, pieces, row_lengths, stack_batches
from fedlora.training.loss import Loss
from fedlora.training.tasks.classification import Classification
from fedlora.tree import Key

FAMILIES = ("gpt2-eos", "llama-5", "qwen2-49", "roberta-1", "bart-1", "t5-0")
# Rows of four clients; the last has the longest alone.
HELD = (
    [0, 1, 2, 3, 4, 5, 6],
    [7, 8],
    [9, 10, 11, 12, 13],
    [14],
)
TARGETS = {"gpt2": "c_attn", "bart": "q_proj", "t5": "q", "roberta": "query"}


def tokens(pad_id: int = 0) -> Tokens:
    """Ragged rows that end with the end-of-sequence token 2 and have no other; the tokenizer's padding id may be any."""
    g = np_rng("padding")
    lengths = np.array([3, 12, 5, 9, 4, 7, 11, 3, 6, 10, 4, 8, 5, 3, 14])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = g.integers(4, tiny.VOCABULARY, offsets[-1]).astype(np.int32)
    flat[offsets[1:] - 1] = 2
    flat[offsets[1:] - 2] = 5  # a real token that is some model's padding
    return Tokens(flat, offsets, labels=g.integers(0, tiny.CLASSES, len(lengths)).astype(np.int64), pad_id=pad_id)


def model(family: str, dtype: torch.dtype = torch.float32) -> Adapted:
    base: Any = tiny.seeded(tiny.padded_families()[family]).to(dtype)
    for name, p in base.named_parameters():  # far apart, so that reading at another place shows
        if p.ndim > 1:
            p.data *= 6 if "bart" not in family or "embed" not in name else 3
    inside = matching(base, [TARGETS.get(family.split("-")[0], "q_proj")])
    return Adapted(base, {"target": inside})


def deltas(m: Adapted, clients: int) -> dict[Key, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    out = {}
    for s in m.groups["target"]:
        out[Key("lora", s.name, "A")] = torch.randn(1, 2, s.in_, generator=g).repeat(clients, 1, 1) * 0.3
        out[Key("lora", s.name, "B")] = torch.randn(1, s.out, 2, generator=g).repeat(clients, 1, 1) * 0.3
    return out


def alone(m: Adapted, rows: list[int]) -> float:
    """The mean loss of rows that transformers computes one at a time, without any padding."""
    out = []
    t = tokens()
    m.bind({k: v for k, v in deltas(m, 1).items()})
    m._clients, m._all_rows = 1, 1
    for r in rows:
        ids = torch.from_numpy(t.flat[t.offsets[r] : t.offsets[r + 1]].astype(np.int64))[None]
        with torch.no_grad():
            y = m.base(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert t.labels is not None
        out.append(float(functional.cross_entropy(y.float(), torch.from_numpy(t.labels[[r]]))))
    return float(np.mean(out))


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_each_row_alone(
    family: str, dtype: torch.dtype, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "OVERHEAD", {"cpu": 3})  # cut wherever tokens are saved
    m = model(family, dtype)
    want = [alone(m, rows) for rows in HELD]
    loss = Loss(m, Classification(tiny.CLASSES), accumulation)
    t = tokens(pad_id=7)  # a tokenizer that pads with something else
    batches = [t.collate(np.array(rows)) for rows in HELD]
    block, together = loss.gradient(lambda q: q, deltas(m, 4), stack_batches(batches))
    tol = 1e-4 if dtype == torch.float32 else 0.03
    assert block.tolist() == pytest.approx(want, rel=tol, abs=tol)
    for k, batch in enumerate(batches):
        value, own = loss.gradient(lambda q: q, deltas(m, 1), stack_batches([batch]))
        assert float(value) == pytest.approx(want[k], rel=tol, abs=tol)
        if dtype == torch.float32:
            tiny.close({n: v[0] for n, v in own.items()}, {n: v[k] for n, v in together.items()}, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_is_each_row_alone(family: str) -> None:
    m = model(family)
    data = tiny.data()
    data = dataclasses.replace(
        data, examples=tokens(7), ids=list("abcd"), splits={"train": tiny.rows([np.array(r) for r in HELD])}
    )
    p = {k: v[0] for k, v in deltas(m, 1).items()}
    found = predict(
        m, Classification(tiny.CLASSES), data, [p, dict(p), dict(p), dict(p)], range(4), [np.array(r) for r in HELD], 5
    )
    assert [float(x.losses.mean()) for x in found] == pytest.approx([alone(m, r) for r in HELD], rel=1e-4)


def test_left_padding_is_read_as_it_is() -> None:
    """A user's own rows, padded on the left: the last token is the last, and nothing is cut."""
    m = model("llama-5")
    t = tokens(pad_id=7)
    right = t.collate(np.array([0, 1, 2]))
    left = {n: torch.zeros_like(v) if v.ndim > 1 else v for n, v in right.items()}
    for i, n in enumerate(right["attention_mask"].sum(1).tolist()):
        for name in ("input_ids", "attention_mask"):
            left[name][i, right[name].shape[1] - n :] = right[name][i, :n]
    mask = left["attention_mask"]
    left["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    loss = Loss(m, Classification(tiny.CLASSES), 2)
    a, _ = loss.gradient(lambda q: q, deltas(m, 1), stack_batches([right]))
    b, _ = loss.gradient(lambda q: q, deltas(m, 1), stack_batches([left]))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    wide = stack_batches(
        [left, {n: v for n, v in t.collate(np.array([14])).items()} | {"position_ids": torch.arange(14)[None]}]
    )
    c, _ = loss.gradient(lambda q: q, deltas(m, 2), wide)
    torch.testing.assert_close(c[:1], a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_rows_of_weight_0_are_rows(accumulation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a piece holds ends as a row of the data ends, also where it has no weight."""
    monkeypatch.setattr(batching, "OVERHEAD", {"cpu": 0})
    t = tokens()
    block = stack_batches([t.collate(np.array(rows)) for rows in HELD])
    for piece in pieces(model("bart-1"), block, accumulation):
        ids, mask = piece["input_ids"].flatten(0, 1), piece["attention_mask"].flatten(0, 1)
        last = ids[torch.arange(len(ids)), mask.sum(1) - 1]
        assert bool((last == 2).all())


def test_lengths_counted_on_the_host_cut_the_same_pieces() -> None:
    """A batch on an accelerator brings the lengths of its rows along; it is cut as if they were counted from its mask."""
    block = stack_batches([tiny.tokens(seed=i).collate(np.arange(i, i + 5 - i)) for i in range(3)])
    lengths = row_lengths(block)
    assert lengths is not None and int((lengths == 0).sum()) == 3  # what fills up the smaller clients
    here, there = pieces(model("llama-5"), block, 2), pieces(model("llama-5"), block | {"tokens": lengths}, 2)
    assert len(here) == len(there) > 1
    for a, b in zip(here, there, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_row_without_tokens_can_be_read() -> None:
    """An empty text of a tokenizer without special tokens: one padding token, alike alone and in a block."""
    offsets = np.array([0, 0, 4, 4])
    t = Tokens(np.arange(6, 10).astype(np.int32), offsets, labels=np.array([0, 1, 2]))
    m = model("llama-5")
    loss = Loss(m, Classification(tiny.CLASSES))
    batches = [t.collate(np.array([0, 1])), t.collate(np.array([2]))]
    block, _ = loss.gradient(lambda q: q, deltas(m, 2), stack_batches(batches))
    for k, b in enumerate(batches):
        value, _ = loss.gradient(lambda q: q, deltas(m, 1), stack_batches([b]))
        assert float(value) == pytest.approx(float(block[k]), rel=1e-5)


def test_a_vector_of_labels_is_not_cut() -> None:
    """As many labels as the longest row has tokens: only what has an entry for each token is cut."""
    t = dataclasses.replace(tokens(), labels=np.ones((15, 14), np.float32))
    block = stack_batches([t.collate(np.array([0, 14]))])
    assert fitted(block, 4, batching.TOKENWISE - {"labels"})["labels"].shape == (1, 2, 14)
    assert fitted(block, 4, batching.TOKENWISE - {"labels"})["input_ids"].shape == (1, 2, 4)
