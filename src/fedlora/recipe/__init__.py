"""Recipes: a YAML file that describes a run whole.

recipe = Recipe.load("sst2.yaml", sets=["train.lr=1e-3"])
recipe.hash, recipe.to_yaml(), recipe.method_object()
for recipe in expand("sweep.yaml"): ...
"""

from __future__ import annotations

from .core import Recipe
from .hyperparameters import MethodSection
from .schema import schema
from .sections import Data, Evaluation, Federation, Model, Partition, Run, Train
from .sweep import expand, expand_dict, folders

__all__ = [
    "Data",
    "Evaluation",
    "Federation",
    "MethodSection",
    "Model",
    "Partition",
    "Recipe",
    "Run",
    "Train",
    "expand",
    "expand_dict",
    "folders",
    "schema",
]
