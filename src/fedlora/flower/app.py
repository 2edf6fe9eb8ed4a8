"""ServerApp and ClientApp: the project as a plain Flower app, for those who run Flower already (`flwr run`).

Run config: recipe (path at the server), output. Node config of a SuperNode: id, data; and text, label, template, prompt,
completion, encoding, format, delimiter, sheet, query, missing, clients, model, state, block, policy, accept (digests, with
commas between), trust-server, share-histogram, share-scores as `fedlora client` has them. Flower starts a process per message: it imports torch
and loads the model each time; `fedlora client` does not.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from ..deploy.coordinator import coordinator
from ..deploy.packets import Packet
from ..deploy.policy import Policy
from ..deploy.refusal import told
from ..deploy.site import COLUMNS, Holding, Site, guarded, particulars
from ..errors import ConfigError, Problem
from ..federation.callbacks import Callback
from ..recipe import Recipe
from . import records
from .link import GridLink, Session

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the recipe to its end, or on from where its folder stands."""
    said = context.run_config
    if "recipe" not in said:
        raise ConfigError(
            [Problem("run config: recipe", None, "path of a recipe at the server", "--run-config 'recipe=\"r.yaml\"'")]
        )

    def online() -> dict[int, tuple[str | None, Session]]:
        return {n: (None, "") for n in grid.get_node_ids()}

    recipe = Recipe.load(str(said["recipe"]))
    output = str(said["output"]) if said.get("output") else None
    coordinator(recipe, output, lambda: GridLink(grid, online, poll=1.0), print).run(Callback())


@client_app.query("fedlora")
def answer(message: Message, context: Context) -> Message:
    """One order of the server's."""
    try:
        reply = site(tuple(sorted(context.node_config.items()))).answer(records.unpack(message.content))
    except Exception as e:
        print(f"failed: {particulars(e)}")
        reply = Packet("join", {"error": told(e)})
    return Message(records.pack(reply), reply_to=message)


@cache
def site(node_config: tuple[tuple[str, Any], ...]) -> Site:
    """The site that a SuperNode's config describes; one per process. Raises ConfigError."""
    said = dict(node_config)
    if lacking := [k for k in ("id", "data") if k not in said]:
        raise ConfigError(
            [Problem(f"node config: {k}", None, "given", '--node-config \'id="a" data="a.csv"\'') for k in lacking]
        )
    columns = {k: said[k] for k in COLUMNS if k in said}
    for field in ("text", "prompt"):
        if "," in str(columns.get(field, "")):
            columns[field] = [c.strip() for c in str(columns[field]).split(",")]
    policy = None
    if not said.get("trust-server", False):
        policy = Policy.load(str(said["policy"])) if "policy" in said else Policy()
        policy = policy.with_columns(
            columns, said.get("model"), bool(said.get("share-histogram")), bool(said.get("share-scores"))
        )
    folder = Path(str(said.get("state", "fedlora-state"))) / str(said["id"])
    accept = [a.strip() for a in str(said.get("accept", "")).split(",") if a.strip()]
    return guarded(
        Holding(
            str(said["id"]), str(said["data"]), columns, said.get("clients"), said.get("model"), block=said.get("block"),
            policy=policy,
        ),
        folder, accept=accept, say=print, histograms=bool(said.get("share-histogram", False)),
    )  # fmt: skip
