"""What leaves for other software computes what we compute: merged models and PEFT folders, for every method."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from test_contract import TABLE

from fedlora.adapters import at_layers, form_of
from fedlora.checkpoints.merge import merge
from fedlora.checkpoints.peft import export
from fedlora.errors import ModelError
from fedlora.federation.callbacks import Callback
from fedlora.federation.views import served
from fedlora.methods import METHODS
from fedlora.tree import Params, stack, unstack


def refusals(deltas: Params) -> tuple[str, str]:
    """(why the deltas cannot be merged, why PEFT cannot hold them), as their forms say; "" where they can."""
    adapters = [(a, parts) for each in at_layers(deltas).values() for a, parts in each.items()]
    forms = sorted({form_of(parts) for a, parts in adapters if a != "head"}, key=lambda f: f.__name__)
    peft = next((f.no_peft for f in forms if f.no_peft), "" if len(forms) == 1 else "cannot hold two")
    return next((f.no_merge for f in forms if f.no_merge), ""), peft


def trained(name: str, folder: Path, base: Any = None) -> tuple[Any, Params, Any]:
    """(federation, client 1's deltas after training, its logits on six rows)."""
    f = tiny.federation(TABLE[name].method, folder, base)
    f.run()
    loaded = f.store.load_server()
    assert loaded is not None
    from fedlora.methods.contract import ServerState

    [deltas] = served(f, f.engine(Callback()), ServerState(*loaded), [1], "personal")
    batch = f.data.examples.collate(np.arange(6))
    with torch.no_grad():
        logits = f.model.forward(stack([deltas]), {n: v[None] for n, v in batch.items()})[0]
    return f, deltas, logits


def plain(model: Any) -> Any:
    with torch.no_grad():
        batch = tiny.tokens().collate(np.arange(6))
        return model.eval()(**{n: v for n, v in batch.items() if n != "labels"}).logits


@pytest.mark.parametrize("name", TABLE)
def test_a_merged_model_is_the_adapted_one(name: str, tmp_path: Path) -> None:
    """Every row of the contract: its form can be merged, or says why not."""
    _, deltas, logits = trained(name, tmp_path)
    if why := refusals(deltas)[0]:
        with pytest.raises(ModelError, match=re.escape(why)):
            merge(tiny.bert(), deltas)
        return
    torch.testing.assert_close(plain(merge(tiny.bert(), deltas)), logits, rtol=2e-4, atol=2e-5)
    assert float((plain(tiny.bert()) - logits).abs().max()) > 1e-3


@pytest.mark.parametrize("name", TABLE)
def test_a_peft_folder_is_the_adapted_model(name: str, tmp_path: Path) -> None:
    """Written by us, loaded by plain PEFT around a fresh base; or the form says why not."""
    from peft import PeftModel

    f, deltas, logits = trained(name, tmp_path / "run")
    head = [s.name for s in f.model.groups["head"]]
    if why := refusals(deltas)[1]:
        with pytest.raises(ModelError, match=re.escape(why)):
            export(tiny.bert, head, deltas, "classification", "somewhere", tmp_path / "out")
        return
    export(tiny.bert, head, deltas, "classification", "somewhere", tmp_path / "out")
    theirs = PeftModel.from_pretrained(tiny.bert(), tmp_path / "out")
    torch.testing.assert_close(plain(theirs), logits, rtol=2e-4, atol=2e-5)


def test_conv1d_and_tied_tables(tmp_path: Path) -> None:
    """GPT-2: weights stand the other way round; full fine-tuning of a tied table moves the input side only."""
    base = lambda: tiny.seeded(tiny.causal_families()["gpt2"])  # noqa: E731
    for name in ("homlora", "fft", "sft", "bitfit"):
        method = METHODS[name]() if name != "homlora" else METHODS[name](rank=4)
        f = tiny.federation(method, tmp_path / name, base(), causal=True)
        f.run()
        loaded = f.store.load_server()
        assert loaded is not None
        [deltas] = unstack(method.personal(f.context, stack([loaded[1]]), {}), 1)
        batch = tiny.tokens(labels=False).collate(np.arange(4))
        with torch.no_grad():
            want = f.model.forward(stack([deltas]), {n: v[None] for n, v in batch.items()})[0]
            merged = merge(base(), deltas).eval()
            got = merged(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            merged.save_pretrained(tmp_path / name / "merged")  # tables that were tied and no longer are stay apart
            back = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / name / "merged", attn_implementation="eager")
            again = back.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(again, want, rtol=2e-4, atol=2e-5)
        # Other readers of the folder, such as vLLM, tie tables by this word alone.
        assert back.config.tie_word_embeddings == (name != "fft")


def test_what_cannot_be_held_is_refused(tmp_path: Path) -> None:
    _, deltas, _ = trained("houlsby", tmp_path / "a")
    with pytest.raises(ModelError, match="is a layer of its own and cannot be merged"):
        merge(tiny.bert(), deltas)
    _, deltas, _ = trained("fft", tmp_path / "b")
    with pytest.raises(ModelError, match=r"PEFT's LoRA cannot hold it; use --merged"):
        export(tiny.bert, ["classifier"], deltas, "classification", "x", tmp_path / "out")
