"""PF2LoRA's synthetic example shows what the paper says: one rank is wrong for somebody, a common and a personal one are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from cli import fedlora

from fedlora import examples


def test_the_truth_has_the_stated_ranks_and_common_directions() -> None:
    a, b = examples.truth(3).values()
    assert [np.linalg.matrix_rank(w) for w in (a, b)] == list(examples.RANKS)
    np.testing.assert_allclose(np.linalg.svd(b)[1][:5], examples.SINGULAR)
    assert np.linalg.matrix_rank(b - a) == 2  # they differ by two directions only


def test_personal_ranks_fit_both_clients_and_a_common_rank_does_not() -> None:
    pf2 = examples.course("PF2LoRA, 4 + 1", rounds=400, points=1)
    hom = examples.course("HomLoRA, rank 5", rounds=100, points=1)
    assert max(e[-1] for e in pf2.errors.values()) < 0.02
    assert pf2.ranks == {"a": 3, "b": 5}
    assert min(e[-1] for e in hom.errors.values()) > 0.1
    assert hom.rounds[-1] == 100


def test_the_command_writes_a_page(tmp_path: Path) -> None:
    done = fedlora("example", "--rounds", 3, "--output", tmp_path / "page.html")
    assert "HetLoRA, ranks 3 and 5" in done.stdout
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "true rank 5" in page and "http" not in page.split("</style>")[0].replace("http://www.w3.org", "")
    done = fedlora("example", "--rounds", 2, "--json", "--output", tmp_path / "page.html")
    assert {c["label"] for c in json.loads(done.stdout)} == set(examples.SETTINGS)
    fedlora("example", "--rounds", 0, code=2)
