"""The user's cache: one place for all of it, private, verified; shown and cleared by `fedlora cache`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cli import fedlora

from fedlora.files import cache


def test_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "own"
    assert {cache.room(kind) for kind in cache.KINDS} == {tmp_path / "own" / kind for kind in cache.KINDS}
    monkeypatch.setenv("FEDLORA_CACHE", "off")
    assert cache.folder() is None and cache.room("tokens") is None
    monkeypatch.delenv("FEDLORA_CACHE")
    assert cache.folder() == tmp_path / "xdg/fedlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache/fedlora"

    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)  # no HOME, and a user that the system does not know
    assert cache.folder() is None


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    place = cache.room("tokens", tmp_path)
    assert place is not None
    file = place / "x"
    for payload in (b"tokens of a private text", b""):
        cache.write(file, payload)
        assert cache.read(file) == payload
        good = file.read_bytes()
        for i in range(len(good)):
            file.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
            assert cache.read(file) is None
            file.write_bytes(good[:i])
            assert cache.read(file) is None
    assert not list(place.glob(".*"))


def test_others_cannot_read_it_and_cannot_write_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    place = cache.room("compiled", tmp_path)
    assert place is not None
    cache.write(place / "x", b"mine")
    assert [p.stat().st_mode & 0o077 for p in (tmp_path, place, place / "x")] == [0, 0, 0]
    (place / "x").chmod(0o620)
    assert cache.read(place / "x") is None
    (place / "x").chmod(0o600)
    (place / "link").symlink_to(place / "x")
    assert cache.read(place / "link") is None
    if hasattr(os, "geteuid"):
        me = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: me + 1)  # as if all of it were somebody else's
        assert cache.read(place / "x") is None
        assert cache.room("compiled", tmp_path) is None
    (tmp_path / "file").write_text("no folder")
    assert cache.room("tokens", tmp_path / "file") is None


def test_it_can_be_seen_and_cleared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    for kind in cache.KINDS:
        place = cache.room(kind)
        assert place is not None
        cache.write(place / f"a-{kind}", b"x" * 100)
    (tmp_path / "amx-0123.so").write_bytes(b"of an earlier version")
    (tmp_path / "notes.txt").write_text("mine")
    said = json.loads(fedlora("cache", "--json").stdout)
    assert sorted((f["kind"], Path(f["file"]).name) for f in said["files"]) == [
        ("compiled", "a-compiled"), ("compiled", "amx-0123.so"), ("tokens", "a-tokens"),
    ]  # fmt: skip
    assert all(f["bytes"] > 0 and 0 <= f["age_seconds"] < 600 for f in said["files"])
    assert "3 files" in fedlora("cache").stdout
    assert "3 files deleted" in fedlora("cache", "--clear").stdout
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["notes.txt"]
    monkeypatch.setenv("FEDLORA_CACHE", "off")
    assert "nothing is kept" in fedlora("cache").stdout
