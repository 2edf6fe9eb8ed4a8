"""Names of other tools, epochs instead of steps, and layers that a model does not have."""

from __future__ import annotations

import pytest
import tiny

from fedlora.checkpoints.peft import default_targets
from fedlora.errors import ConfigError, ModelError, Problem
from fedlora.model.targets import counted, matching
from fedlora.recipe import Recipe, hints, overrides

RAW = {"data": {"source": "rows.csv", "text": "text", "label": "label"}, "method": "homlora", "train": {"steps": 3}}


def test_every_hint_names_a_field_that_can_be_set() -> None:
    known = {*overrides.paths(), "method.rank", "method.alpha"}
    assert set(hints.MEANT.values()) <= known
    own = {p.rpartition(".")[2] for p in known}
    assert not own & set(hints.NONE)
    # Where a field of ours has the other tool's name, no other field is meant by it.
    assert all(hints.MEANT[n].endswith(f".{n}") for n in own & set(hints.MEANT))


def test_each_problem_is_said_once() -> None:
    e = ConfigError([Problem("a", 1, "b"), Problem("a", 1, "b"), Problem("a", 2, "b")])
    assert len(e.problems) == 2 and str(e).startswith("2 problems")


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"train": {"learning_rate": 1e-3}}, "train.learning_rate: .*the field is train.lr"),
        ({"train": {"num_train_epochs": 3}}, "the field is train.epochs"),
        ({"train": {"per_device_train_batch_size": 3}}, "the field is train.batch_size"),
        ({"method": {"name": "homlora", "lora_alpha": 3}}, "the field is method.alpha"),
        ({"method": {"name": "homlora", "r": 3}}, "the field is method.rank"),
        ({"method": {"name": "homlora", "target_modules": ["q"]}}, "the field is model.targets"),
        ({"evaluation": {"metric_for_best_model": "f1"}}, "the task's metric"),
        ({"learning_rate": 1e-3}, "learning_rate: .*the field is train.lr"),
    ],
)
def test_other_tools_names_lead_to_the_field(raw: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Recipe.from_dict({**RAW, **raw})


@pytest.mark.parametrize("path", ["learning_rate", "train.learning_rate", "per-device-train-batch-size"])
def test_a_set_of_another_tools_name_leads_to_the_field(path: str) -> None:
    with pytest.raises(ConfigError, match=r"the field is train\.(lr|batch_size)"):
        Recipe.from_dict(RAW, [f"{path}=1"])


def test_epochs_that_are_set_take_the_place_of_steps() -> None:
    r = Recipe.from_dict(RAW, ["train.epochs=1"])
    assert (r.train.epochs, r.train.steps) == (1.0, None)
    back = r.override("train.steps=7")
    assert (back.train.epochs, back.train.steps) == (None, 7)
    assert Recipe.from_dict(RAW, ["train.epochs=null"]).train.steps == 3
    with pytest.raises(ConfigError, match="exactly one of steps and epochs"):
        Recipe.from_dict(RAW, ["train.epochs=1", "train.steps=2"])


def test_unknown_targets_list_the_models_own_layers() -> None:
    base = tiny.bert()
    every = "query (2), key (2), value (2), dense (7), classifier (1)"
    assert counted(base) == every
    with pytest.raises(ModelError) as e:
        matching(base, ["q_proj", "quary", "value"])
    assert "'q_proj' and 'quary' match no layer" in str(e.value) and every in str(e.value)
    with pytest.raises(ModelError) as e:
        matching(base, "quer")
    assert every in str(e.value) and "whole name" in str(e.value)


def test_no_other_architecture_is_proposed_for_a_model_at_hand() -> None:
    with pytest.raises(ModelError) as e:
        default_targets("berd")
    assert "did you mean" not in str(e.value)
