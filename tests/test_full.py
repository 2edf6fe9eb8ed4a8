"""Full fine-tuning where tables are read by their weight, scaled, shifted or shared: DeBERTa, BART and T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from fedlora.checkpoints.merge import merge
from fedlora.errors import ModelError
from fedlora.federation.engine import Schedule, train_block
from fedlora.methods import METHODS
from fedlora.methods.contract import RoundInfo
from fedlora.model.adapted import Adapted
from fedlora.training.optimizers import SGD
from fedlora.tree import Key, Params, stack

FAMILIES = tiny.seq2seq() | {n: tiny.families()[n] for n in ("deberta-v2", "deberta-v3")}


def base(family: str) -> Any:
    return tiny.seeded(FAMILIES[family]).eval()


def data(family: str) -> Any:
    found = tiny.data()
    if family in tiny.seq2seq():
        found.examples.flat[found.examples.offsets[1:] - 1] = 1
    return found


def part_of(parameters: dict[str, Tensor], k: Key) -> Tensor:
    """The base's own parameter behind a leaf, as torch names it."""
    return parameters[f"{k.layer}.{'bias' if k.part == 'bias' else 'weight'}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_is_torchs(family: str, tmp_path: Path) -> None:
    """Every parameter has one delta; SGD on them is torch.optim.SGD on the model's own parameters; merged and saved: the same logits."""
    m = METHODS["fft"](optimizer=SGD(0.1))
    model = tiny.adapt(base(family), needs=m.groups, dropout=False)
    f = tiny.federation(m, tmp_path / "run", model=model, data=data(family), block=1)
    client, info = f.client(2), RoundInfo(0, 1)
    batches = f.batches(client, info, 1)
    down = m.broadcast(f.context, m.init(f.context), client)
    [done] = train_block(m, f.context, f.loss, info, [down], [{}], [batches], Schedule())

    theirs, fresh = base(family), base(family)
    own = dict(theirs.named_parameters())  # a shared parameter comes once
    assert {id(part_of(own, k)) for k in done.upload} == {id(p) for p in own.values()}
    assert len(done.upload) == len(own)
    optimizer = torch.optim.SGD(list(own.values()), 0.1)
    for batch in batches:
        optimizer.zero_grad()
        y = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        nn.functional.cross_entropy(y, batch["labels"]).backward()
        optimizer.step()
    start = dict(fresh.named_parameters())
    for k, v in done.upload.items():
        change = (part_of(own, k) - part_of(start, k)).detach()
        torch.testing.assert_close(v, change, rtol=1e-3, atol=2e-6, msg=lambda said, k=k: f"{k}: {said}")

    g = torch.Generator().manual_seed(0)
    deltas: Params = {k: 0.3 * torch.randn(v.shape, generator=g) for k, v in done.upload.items()}
    rows = f.data.examples.collate(np.arange(6))
    inputs = {n: v for n, v in rows.items() if n != "labels"}
    with torch.no_grad():
        want = model.forward(stack([deltas]), {n: v[None] for n, v in rows.items()})[0]
        merged = merge(base(family), deltas)
        torch.testing.assert_close(merged(**inputs).logits, want, rtol=2e-4, atol=2e-5)
        merged.save_pretrained(tmp_path / "out")
        again = type(fresh).from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
        torch.testing.assert_close(again(**inputs).logits, want, rtol=2e-4, atol=2e-5)
        model.close()
        torch.testing.assert_close(model.base(**inputs).logits, fresh(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_such_tables_take_one_client_at_a_time(family: str, tmp_path: Path) -> None:
    alone = tiny.federation(
        METHODS["fft"](optimizer=SGD(0.1)), tmp_path / "a", base(family), data=data(family), block="auto"
    )
    assert alone.block_size() == 1
    alone.run()
    pair = tiny.federation(METHODS["fft"](optimizer=SGD(0.1)), tmp_path / "b", base(family), data=data(family), block=4)
    with pytest.raises(ModelError, match=r"set run\.block to 1"):
        pair.run()


def test_one_parameter_has_one_delta() -> None:
    with pytest.raises(
        ModelError, match=r"'transformer.encoder.embed_tokens' and 'transformer.shared' are one parameter"
    ):
        Adapted(base("t5"), {"all": ["transformer.shared", "transformer.encoder.embed_tokens"]})


def test_a_parameter_that_no_layer_holds_is_named(tmp_path: Path) -> None:
    """DeBERTa's first version has biases of its own beside its layers."""
    import transformers as t

    config = t.DebertaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                             relative_attention=True, pos_att_type=["p2c", "c2p"], max_relative_positions=16, num_labels=3)  # fmt: skip
    odd = tiny.seeded(lambda: t.DebertaForSequenceClassification(config))
    with pytest.raises(ModelError, match=r"full: 'deberta\.\S+' \(\d+ such parameters\) .* belongs to no layer"):
        tiny.adapt(odd, needs=("all",))
