"""Every method on every kind of model: a block trains as one by one, a crash changes nothing, exports compute the same.

`make test` gives each method one architecture in turn, `make slow` all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_contract import SLOW, TABLE, state
from test_export import refusals

from fedlora.checkpoints.merge import merge
from fedlora.checkpoints.peft import export
from fedlora.errors import FedloraError
from fedlora.federation.callbacks import Callback
from fedlora.federation.views import served
from fedlora.methods.contract import ServerState
from fedlora.tree import stack

FAMILIES = ("roberta", "gpt2", "llama")
REFUSED = {("bitfit", "llama"): "BitFit: LlamaForSequenceClassification has no biases to train"}
# Singular vectors of close singular values turn with the last bits: factors differ by more. Where a leaf's gradient is nearly 0,
# AdamW's first steps follow its last bits.
TURNED = dict.fromkeys(("flexlora", "fedsvd", "florist", "frlora", "fedrot"), 1e-3) | dict.fromkeys(
    ("ditto", "scaffold"), 5e-4
)
CASES = [
    pytest.param(name, family, marks=() if FAMILIES[i % 3] == family and name not in SLOW else pytest.mark.slow)
    for i, name in enumerate(TABLE)
    for family in FAMILIES
    if (name, family) not in REFUSED
]


def base(family: str) -> Any:
    return tiny.seeded(tiny.families()[family])


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_block_is_one_by_one_and_a_crash_changes_nothing(name: str, family: str, tmp_path: Path) -> None:
    method = TABLE[name].method
    alone = tiny.federation(method, tmp_path / "1", base(family), block=1)
    alone.run()
    broken = tiny.federation(method, tmp_path / "2", base(family), block=2)
    with pytest.raises(KeyboardInterrupt):
        broken.run(tiny.Crash(broken))
    broken = tiny.federation(method, tmp_path / "2", base(family), block=2)
    broken.run()
    whole = tiny.federation(method, tmp_path / "3", base(family), block=2)
    whole.run()
    for other, tol in ((broken, 0.0), (alone, TURNED.get(name, 5e-5))):
        (a, kept_a, _), (b, kept_b, _) = state(whole), state(other)
        tiny.close(a, b, tol)
        for id in kept_a:
            tiny.close(kept_a[id], kept_b[id], tol)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_exports_compute_the_same(name: str, family: str, tmp_path: Path) -> None:
    """Plain transformers (merged) and plain PEFT (folder) give the logits of the adapted model."""
    f = tiny.federation(TABLE[name].method, tmp_path / "run", base(family))
    f.run()
    [deltas] = served(f, f.engine(Callback()), ServerState(*f.store.load_server()), [1], "personal")
    batch = f.data.examples.collate(np.arange(6))
    inputs = {n: v for n, v in batch.items() if n != "labels"}
    with torch.no_grad():
        want = f.model.forward(stack([deltas]), {n: v[None] for n, v in batch.items()})[0]
        start = base(family).eval()(**inputs).logits
    assert float((want - start).abs().max()) > 1e-3
    head = [s.name for s in f.model.groups["head"]]

    def folder() -> Any:
        from peft import PeftModel

        export(lambda: base(family), head, deltas, "classification", "somewhere", tmp_path / "out")
        return PeftModel.from_pretrained(base(family), tmp_path / "out")

    for why, make in zip(refusals(deltas), (lambda: merge(base(family), deltas), folder), strict=True):
        if why:
            with pytest.raises(FedloraError, match="cannot"):
                make()
            continue
        with torch.no_grad():
            torch.testing.assert_close(make().eval()(**inputs).logits, want, rtol=3e-4, atol=3e-5)


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_what_a_model_cannot_serve_is_refused(name: str, family: str, tmp_path: Path) -> None:
    with pytest.raises(FedloraError, match=REFUSED[name, family]):
        tiny.federation(TABLE[name].method, tmp_path, base(family))
