"""The command that serves the exported adapters of many clients over one base: vLLM or SGLang."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ..errors import ConfigError, Problem
from ..training.tasks import TASKS

Server = Literal["vllm", "sglang"]
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
FILE = "serve.sh"


def check(server: str, task: str, merged: bool) -> None:
    """Raise ConfigError for what these servers cannot take."""
    bad = []
    if not TASKS[task].over_vocabulary:
        bad.append(Problem("--serve", server, f"a language model; this run's task is {task}", "leave it out"))
    if merged:
        bad.append(
            Problem(
                "--merged",
                True,
                "adapters beside --serve",
                "a merged model is served by its own folder: leave --serve out",
            )
        )
    if bad:
        raise ConfigError(bad)


def command(server: Server, base: str, folders: Mapping[str, Path]) -> str:
    """The command line. folders: the name under which each adapter is asked for -> its PEFT folder. Raises ConfigError for a rank
    that the server does not take."""
    rank = max(_rank(f) for f in folders.values())
    if server == "sglang":
        paths = [f"{name}={path}" for name, path in folders.items()]
        words = [
            "python",
            "-m",
            "sglang.launch_server",
            "--model-path",
            base,
            "--enable-lora",
            "--max-lora-rank",
            str(rank),
            "--lora-paths",
            *paths,
        ]
        return shlex.join(words)
    allowed = next((r for r in RANKS if r >= rank), None)
    if allowed is None:
        raise ConfigError(
            [
                Problem(
                    "--serve", f"rank {rank}", f"at most {RANKS[-1]} for vllm", "use --serve sglang, or export --merged"
                )
            ]
        )
    modules = [json.dumps({"name": name, "path": str(path), "base_model_name": base}) for name, path in folders.items()]
    return shlex.join(
        ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(allowed), "--lora-modules", *modules]
    )


def write(out: Path, server: Server, base: str, folders: Mapping[str, Path]) -> Path:
    """The command as a script in `out`."""
    path = out / FILE
    path.write_text(
        f"#!/bin/sh\n{command(server, base, {n: f.absolute() for n, f in folders.items()})}\n", encoding="utf-8"
    )
    return path


def _rank(folder: Path) -> int:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            [
                Problem(
                    "--serve",
                    str(config.get("peft_type")),
                    "LoRA adapters",
                    "use export --merged, and serve its folder",
                )
            ]
        )
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])
