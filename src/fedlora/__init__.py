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
    "api": "Run adapt load run",
    "data.batches": "Plan",
    "data.examples": "Arrays Rows Tokens",
    "data.federated": "FederatedData assemble from_arrays",
    "engine": "Engine Schedule train_block",
    "channel": "Channel",
    "errors": "ConfigError DataError FedloraError ModelError Problem StateError TrainingError UploadError",
    "federation": "Federation",
    "guards": "GUARDS",
    "guards.guard": "Guard",
    "method": "Client Method Order Scene Server Upload",
    "methods": "METHODS",
    "model": "Adapted matching",
    "optim": "SGD AdamW Optimizer",
    "recipe": "Recipe",
    "setting": "Evaluation Sampling Setting",
    "sgd": "SGDMethod",
    "tasks": "CausalLM Classification Loss Regression Task",
    "tree": "Key Params",
    "watch": "Watch",
}
_WHERE = {name: home for home, names in _HOME.items() for name in names.split()}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(f"fedlora.{_WHERE[name]}"), name)
    elif name[:1].isupper() and name in (classes := _found()):
        value = classes[name]
    else:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    globals()[name] = value
    return value


def _found() -> dict[str, Any]:
    """The classes of methods and guards by their own names: fl.FedSALoRA, fl.Clip."""
    methods, guards = import_module("fedlora.methods").METHODS, import_module("fedlora.guards").GUARDS
    return {cls.__name__: cls for cls in [*methods.values(), *guards.values()]}


def __dir__() -> list[str]:
    return [*__all__, *_found(), "__version__"]


if TYPE_CHECKING:
    from .api import run as run
