"""fedlora: federated fine-tuning of foundation models with low-rank adapters.

    import fedlora as fl

    summary = fl.run("recipe.yaml", sets=["method.name=fedsa"])       # everything from a recipe
    fl.Federation(model, task, data, fl.FedSALoRA(rank=8), "runs/x").run()   # or from your own objects

Names are imported on first use, so that `import fedlora` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "adapters": "LoRA VeRA",
    "api": "Run adapt check compare load results run sweep",
    "data.batches": "LocalWork Plan",
    "data.examples": "Arrays Rows Tokens",
    "data.federated": "FederatedData assemble from_arrays",
    "errors": "ConfigError DataError FedloraError ModelError Problem StateError TrainingError UploadError",
    "federation.callbacks": "Callback Watch",
    "federation.channel": "Channel",
    "federation.engine": "Engine Schedule train_block",
    "federation.guards": "GUARDS",
    "federation.guards.guard": "Guard",
    "federation.outcome": "Summary",
    "federation.run": "Federation",
    "federation.setting": "Evaluation Sampling Setting",
    "federation.trackers": "TRACKERS Tracker",
    "methods": "METHODS",
    "methods.contract": "Client Context Method Order RoundInfo Scene Server ServerState Upload",
    "methods.sgd": "SGDMethod",
    "model.adapted": "Adapted",
    "model.targets": "matching",
    "recipe": "Recipe",
    "recipe.checked": "Check",
    "training.loss": "Loss",
    "training.optimizers": "AdamW Optimizer SGD",
    "training.task": "Task",
    "training.tasks.causal_lm": "CausalLM",
    "training.tasks.classification": "Classification",
    "training.tasks.regression": "Regression",
    "tree": "Key Params",
}
# What names of earlier versions are called now.
_NOW = {
    "Order": "RoundInfo",
    "Plan": "LocalWork",
    "Scene": "Context",
    "Server": "ServerState",
    "Watch": "Callback",
}
_WHERE = {name: home for home, names in _HOME.items() for name in names.split()}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(f"fedlora.{_WHERE[name]}"), _NOW.get(name, name))
    elif name[:1].isupper() and name in (classes := _found()):
        value = classes[name]
    else:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    globals()[name] = value
    return value


def _found() -> dict[str, Any]:
    """The classes of methods, guards and tasks by their own names: fl.FedSALoRA, fl.Clip, fl.TokenClassification."""
    every = (import_module("fedlora.methods").METHODS, import_module("fedlora.federation.guards").GUARDS,
             import_module("fedlora.training.tasks").TASKS)  # fmt: skip
    return {cls.__name__: cls for registry in every for cls in registry.values()}


def __dir__() -> list[str]:
    return [*__all__, *_found(), "__version__"]


if TYPE_CHECKING:
    from .api import run as run
