"""What a recipe would do, without doing it: the facts of its run, and what it takes by a few steps that are tried.

check = checked(recipe)
check.run.parameters, check.cost.memory, check.cost.seconds
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..checkpoints import peft
from ..data.doctor import DataFacts, Doctor
from ..data.federated import FederatedData
from ..errors import ModelError
from ..federation.facts import RunFacts, facts
from ..federation.memory import resident
from ..federation.probe import Cost, estimated, probe
from ..federation.run import Federation
from ..units import seconds, size
from . import build
from .core import Recipe

UNUSED = "unused"  # the run folder of a federation that is only looked at; nothing is written there


@dataclass(frozen=True, repr=False)
class Check:
    """A recipe that is valid, the facts of its run, and what it takes."""

    recipe: Recipe
    data: DataFacts
    run: RunFacts
    cost: Cost

    def __repr__(self) -> str:
        time = f", about {seconds(self.cost.seconds)}" if self.cost.tried else ""
        n = len(self.data.findings)
        odd = f"{n} thing{'s' * (n != 1)} odd in the data" if n else "nothing odd in the data"
        return f"Check({self.recipe.name}: {self.run.clients} clients, {size(self.cost.memory)} of memory{time}; {odd})"

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        cost = asdict(self.cost) | {"memory": self.cost.memory}
        names = {"name": self.recipe.name, "hash": self.recipe.hash}
        return {**names, **asdict(self.run), "memory_bytes": self.cost.memory, "cost": cost, "data": asdict(self.data)}


def checked(r: Recipe, measure: bool = True, known: Cost | None = None) -> Check:
    """Build what the recipe describes and look at it. measure: try a few steps; without it memory is estimated. known: what a run of
    the same cost takes.

    Raises ConfigError with all problems.
    """
    program = _program()
    doctor, read = Doctor(), list[Any]()

    def source(recipe: Recipe, tokenizer: Any) -> FederatedData:
        read[:] = [tokenizer]
        return build.data_of(recipe, tokenizer, look=doctor)

    fed = build.federation(r, UNUSED, source)
    seen = doctor.facts(read[0], r.data.model_dump(), r.partition.model_dump(), fed.data)
    block = fed.block_size()
    cost = known or (probe(fed, block, program) if measure else estimated(fed, block, program))
    run = facts(fed, block)
    return Check(r, seen, replace(run, attention=_attention(r, fed, run.attention)), cost)


def alike(r: Recipe) -> str:
    """Equal for recipes whose runs take the same time and memory: all but the seed and the names."""
    facts_ = r.resolved() | {"name": ""}
    return json.dumps(facts_ | {"run": facts_["run"] | {"seed": 0, "output": ""}}, sort_keys=True)


def _attention(r: Recipe, f: Federation, chosen: str) -> str:
    """Which attention the base computes with, and why (build.attention_of)."""
    if not chosen:
        return ""
    if r.model.attention != "auto":
        why = "the recipe says so"
    elif chosen != "eager":
        why = "compiled operators answer it" if f.model.compiled else "the model has it"
    elif f.method.second_order:
        why = f"{f.method.title} differentiates the model twice"
    elif f.model.device.type == "cpu":
        why = "fused attention is not faster on this processor"
    else:
        why = "its dropout masks follow the rows"
    return f"{chosen}, because {why}"


def _program() -> int:
    """Resident bytes of Python with the libraries that every run needs."""
    import transformers

    assert transformers
    with contextlib.suppress(ModelError):
        peft.default_targets("")  # imports PEFT
    return resident()
