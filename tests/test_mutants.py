"""The list of planted bugs is sound: each can be planted in exactly one place and names tests that exist."""

from __future__ import annotations

import re

import pytest
from mutants import MUTANTS, ROOT, SOURCE, Mutant


@pytest.mark.parametrize("m", MUTANTS, ids=lambda m: m.why)
def test_can_be_planted(m: Mutant) -> None:
    text = (SOURCE / m.file).read_text(encoding="utf-8")
    assert text.count(m.old) == 1
    if m.file.endswith(".py"):
        compile(text.replace(m.old, m.new), m.file, "exec")
    for path in re.findall(r"tests/\S+\.py", m.tests):
        assert (ROOT / path).exists(), path
