"""A run folder: written atomically, verified when read, resumable after `kill -9` at any moment.

Order of a round: client states, metrics, then the server state, which names how long metrics.jsonl is. Until that last
rename the round has not happened; afterwards it has. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import yaml
from filelock import FileLock, Timeout

from . import wire
from .errors import StateError, UploadError
from .tree import Params

KEPT_SERVERS = 2  # the newest, and the one before in case the newest is damaged on disk
SERVED = "served.deltas"
DIGEST = 32  # bytes at the end of a state file


class Store:
    """The folder `root`. keep: "last" holds what resuming needs, "all" every round's states."""

    def __init__(self, root: str | Path, keep: Literal["last", "all"] = "last"):
        self.root, self.keep = Path(root), keep
        self._unsynced: list[Path] = []

    # whose folder it is -----------------------------------------------------------------------------------------
    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One process at a time writes here; the lock dies with its process. Raises StateError."""
        with self._writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / ".lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise StateError(
                    f"{self.root}: another process is running in this folder; wait for it, or give another output folder"
                ) from None
        try:
            yield
        finally:
            lock.release()

    def claim(self, hash: str, recipe: Mapping[str, Any]) -> None:
        """Make the folder this recipe's, or check that it is. Raises StateError for anybody else's."""
        file = self.root / "recipe.json"
        if file.exists():
            try:
                old = json.loads(file.read_text(encoding="utf-8"))
                theirs, known = old["hash"], old["recipe"]
            except (ValueError, KeyError, TypeError) as e:
                raise StateError(f"{file}: cannot be read ({e}); restore it, or give another output folder") from e
            if theirs != hash:
                raise StateError(
                    f"{self.root}: belongs to recipe {theirs}, not to {hash}{_difference(known, recipe)}; "
                    "give another output folder (run.output or --output), or the recipe it was made with"
                )
            return
        others = [p.name for p in self.root.iterdir() if p.name != ".lock"]
        if others:
            raise StateError(
                f"{self.root}: holds other files ({', '.join(sorted(others)[:3])}) and no run; give a new or empty folder"
            )
        if recipe:
            text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
            self._write(self.root / "recipe.yaml", text.encode())
        self.write_json("recipe.json", {"hash": hash, "recipe": dict(recipe)})

    # clients ----------------------------------------------------------------------------------------------------
    def client_folder(self, id: str) -> Path:
        """Folder of one client: sharded, and safe for any id on any file system."""
        digest = hashlib.blake2b(id.encode(), digest_size=4).hexdigest()
        return self.root / "clients" / digest[:2] / f"{quote(id, safe='')[:80]}-{digest}"

    def save_client(self, id: str, round: int, params: Params) -> None:
        """Personal leaves of a client after training `round` (0-based). A client that keeps nothing gets no file."""
        if not params:
            return
        folder = self.client_folder(id)
        path = folder / f"{round:06d}.safetensors"
        with self._writing(path):
            folder.mkdir(parents=True, exist_ok=True)
        self._write(path, _sealed(params, {"client": id, "round": round}), sync=False)
        self._unsynced.append(path)
        if self.keep == "last":  # the newest before this round stays: this round may yet be dropped
            for old in sorted(p for p in folder.glob("*.safetensors") if p.stem < path.stem)[:-1]:
                old.unlink(missing_ok=True)

    def load_client(self, id: str, before: int) -> Params | None:
        """The leaves of the client's last round before `before`, None if there is none. Raises StateError if damaged."""
        folder = self.client_folder(id)
        names = [n for n in _names(folder) if n.endswith(".safetensors") and int(n.split(".")[0]) < before]
        if not names:
            return None
        path = folder / max(names)
        params, header = _opened(path)
        if header.get("client") != id:
            raise StateError(f"{path}: holds the state of client {header.get('client')!r}, not of {id!r}; restore it")
        return params

    def save_served(self, id: str, params: Params) -> None:
        """At a site: the model-ready deltas that a client serves when a run is done."""
        with self._writing(self.root):
            self.client_folder(id).mkdir(parents=True, exist_ok=True)
        apart = {k: v.clone() for k, v in params.items()}  # VeRA's layers share their matrices
        self._write(self.client_folder(id) / SERVED, _sealed(apart, {"client": id}))

    def load_served(self, id: str) -> Params | None:
        """What save_served wrote, None if it did not."""
        path = self.client_folder(id) / SERVED
        return _opened(path)[0] if path.exists() else None

    def forget(self, id: str, accepted: int | None) -> None:
        """Remove what a site no longer needs of a client: all before its last accepted round but the newest of them, which
        a server with a damaged state goes back to."""
        folder = self.client_folder(id)
        old = sorted(n for n in _names(folder) if n.endswith(".safetensors") and int(n.split(".")[0]) < (accepted or 0))
        for name in old[:-1]:
            (folder / name).unlink(missing_ok=True)

    def sync(self) -> None:
        """Have client states on the disk itself, not only in the system's memory."""
        for path in self._unsynced:
            with self._writing(path):
                _sync(path)
        self._unsynced.clear()

    # server -----------------------------------------------------------------------------------------------------
    def save_server(self, round: int, params: Params, notes: Mapping[str, Any], metrics_bytes: int) -> None:
        """Commit a round: from here on it counts."""
        self.sync()
        folder = self.root / "server"
        with self._writing(folder):
            folder.mkdir(exist_ok=True)
        header = {"round": round, "notes": dict(notes), "metrics_bytes": metrics_bytes}
        self._write(folder / f"{round:06d}.safetensors", _sealed(params, header))
        if self.keep == "last":
            for old in sorted(folder.glob("*.safetensors"))[:-KEPT_SERVERS]:
                old.unlink(missing_ok=True)

    def load_server(self) -> tuple[int, Params, dict[str, Any]] | None:
        """(rounds done, leaves, notes) of the newest committed round, None before the first.

        A newest state that is damaged is passed over with a warning: the round before it is taken up instead and trained
        again, with the same result. Raises StateError if that one is damaged too.
        """
        found = self._newest()
        return None if found is None else (found[1]["round"], found[0], found[1]["notes"])

    def _newest(self) -> tuple[Params, dict[str, Any]] | None:
        paths = sorted((self.root / "server").glob("*.safetensors"), reverse=True)
        damage: StateError | None = None
        for path in paths[:KEPT_SERVERS]:
            try:
                opened = _opened(path)
            except StateError as e:
                damage = damage or e
                continue
            if damage is not None:
                warnings.warn(f"{damage} Going on from round {opened[1]['round']}, the one before.", stacklevel=3)
            return opened
        if damage is not None:
            raise damage
        return None

    def rewind(self) -> None:
        """Cut metrics.jsonl back to the newest committed round: lines of a round that was dropped go."""
        path = self.root / "metrics.jsonl"
        found = self._newest()
        length = found[1]["metrics_bytes"] if found else 0
        have = path.stat().st_size if path.exists() else 0
        if have < length:
            raise StateError(
                f"{path}: has {have} bytes, the committed rounds wrote {length}; it was cut off: restore it, or start again "
                "in another folder"
            )
        if have > length:
            with self._writing(path), open(path, "r+b") as f:
                f.truncate(length)

    # records ----------------------------------------------------------------------------------------------------
    def append_metrics(self, lines: Sequence[Mapping[str, Any]]) -> int:
        """Append lines to metrics.jsonl; returns its length in bytes, for save_server."""
        path = self.root / "metrics.jsonl"
        with self._writing(path), open(path, "ab") as f:
            f.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            f.flush()
            os.fsync(f.fileno())
            return f.tell()

    def append_timing(self, facts: Mapping[str, Any]) -> None:
        """Append a line to timings.jsonl, which differs from machine to machine and is no part of the result."""
        path = self.root / "timings.jsonl"
        with self._writing(path), open(path, "ab") as f:
            f.write(json.dumps(facts).encode() + b"\n")

    def write_json(self, name: str, value: Any) -> None:
        self._write(self.root / name, (json.dumps(value, indent=1) + "\n").encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """What write_json wrote, {} if it did not. Raises StateError if damaged."""
        path = self.root / name
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        except FileNotFoundError:
            return {}
        except ValueError as e:
            raise StateError(f"{path}: cannot be read ({e}); restore it") from e

    # writing ----------------------------------------------------------------------------------------------------
    def _write(self, path: Path, data: bytes, sync: bool = True) -> None:
        """Write a file whole or not at all."""
        temporary = path.with_name(f".{path.name}.tmp")  # one name per file: what a crash leaves is overwritten
        with self._writing(path):
            try:
                with open(temporary, "wb") as f:
                    f.write(data)
                    if sync:
                        f.flush()
                        os.fsync(f.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            if sync:
                _sync(path.parent)

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        """Give a failed write its remedy. Raises StateError."""
        try:
            yield
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                reason, remedy = "the disk is full", "free some space"
            elif e.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
                reason, remedy = "writing is not permitted", "give a folder you may write to"
            else:
                reason, remedy = e.strerror or str(e), "look at the disk"
            raise StateError(
                f"{path}: cannot be written: {reason}; {remedy} and resume: committed rounds are kept in {self.root}"
            ) from e


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()


def _sealed(params: Params, header: Mapping[str, Any]) -> bytes:
    """A state file: safetensors whose header holds the digest of everything else in it."""
    body = wire.encode(params, header)
    return wire.encode(params, {**header, "digest": _digest(body).hex()})


def _opened(path: Path) -> tuple[Params, dict[str, Any]]:
    """Leaves and header of a state file that is what was written. Raises StateError otherwise."""
    try:
        params, header = wire.decode(path.read_bytes())
        digest = header.pop("digest")
        whole = _digest(wire.encode(params, header)).hex() == digest
    except (UploadError, KeyError, AttributeError):
        whole = False
    except OSError as e:
        raise StateError(f"{path}: cannot be read: {e.strerror}; restore it") from e
    if not whole:
        raise StateError(
            f"{path}: its checksum does not match: it was cut off or changed after it was written. Restore this file, or run "
            "the recipe in another folder."
        )
    return params, header


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The fields in which two recipes differ."""

    def flat(x: Any, path: str = "") -> dict[str, Any]:
        if isinstance(x, Mapping):
            return {k2: v2 for k, v in x.items() for k2, v2 in flat(v, f"{path}.{k}" if path else str(k)).items()}
        return {path: x}

    a, b = flat(old), flat(new)
    odd = [
        k
        for k in {**a, **b}
        if (a.get(k) != b.get(k) and k != "name" and not k.startswith("run."))
        or (k == "run.seed" and a.get(k) != b.get(k))
    ]
    shown = ", ".join(f"{k} {a.get(k)!r} there, {b.get(k)!r} here" for k in odd[:3])
    return f" (differs in {shown}{', ...' if len(odd) > 3 else ''})" if odd else ""
