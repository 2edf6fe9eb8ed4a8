"""The example that trains by hand and with fedlora gives the same numbers, and its training is no idle one."""

from __future__ import annotations

import ast
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def example() -> Any:
    spec = spec_from_file_location("fedavg_by_hand", ROOT / "examples/fedavg_by_hand.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_fedavg_by_hand_and_with_fedlora_are_equal(example: Any, tmp_path: Path) -> None:
    mine, losses, furthest = example.compare(tmp_path / "run")
    assert len(mine) == example.ROUNDS
    np.testing.assert_allclose(losses, mine, rtol=1e-5)
    assert furthest < 1e-5
    assert mine[-1] < mine[0] - 0.01


def test_the_clients_of_the_example_differ(example: Any) -> None:
    """In size, so that the weights of the average matter, and in their classes."""
    data = example.some_data()
    assert len(set(data.splits["train"].sizes.tolist())) > 1
    shares = [np.bincount(data.examples.labels[data.splits["train"][k]], minlength=3) for k in range(example.CLIENTS)]
    assert max(s.max() / s.sum() for s in shares) > 0.5


def docs_build() -> Any:
    spec = spec_from_file_location("docs_build", ROOT / "docs/build.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_is_what_its_text_makes() -> None:
    text = (ROOT / "examples/notebook.py").read_text(encoding="utf-8")
    assert docs_build().notebook(text) == (ROOT / "examples/notebook.ipynb").read_text(encoding="utf-8"), "make docs"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell in order, with a small base; what it shows can be shown, and PEFT loads what it exports."""
    pytest.importorskip("plotly")
    from cli import model_folder
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model_folder(tmp_path / "model", bare=True)
    monkeypatch.chdir(tmp_path)
    found = json.loads((ROOT / "examples/notebook.ipynb").read_text(encoding="utf-8"))
    scope: dict[str, Any] = {}
    shown: list[Any] = []
    for cell in found["cells"]:
        if cell["cell_type"] == "code":
            code = ast.parse("".join(cell["source"]).replace('"minilm"', '"./model"'))
            last = code.body.pop() if isinstance(code.body[-1], ast.Expr) else None
            exec(compile(code, "notebook", "exec"), scope)
            if last is not None:
                shown.append(eval(compile(ast.Expression(last.value), "notebook", "eval"), scope))
    notes, check, summary, table, figure, said, files = shown
    assert len(notes) == 5 and "3 clients" in repr(check)
    assert "<table>" in summary._repr_html_()
    assert set(table["method"]) == {"homlora", "fedsa", "local"}
    assert len(figure.data) == 3 and all(len(x.y) == 5 for x in figure.data)  # before training and after four rounds
    assert said[0].answer in ("calm", "urgent")
    assert "adapter_config.json" in files
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model", num_labels=2, ignore_mismatched_sizes=True
    )
    assert PeftModel.from_pretrained(base, scope["exported"]).peft_config
