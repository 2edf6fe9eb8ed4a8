"""Messages: what is counted is what is sent, and nothing else is let in.

Planted bugs these tests kill: framing left out of the count; a head counted as an adapter; a NaN let through.
"""

from __future__ import annotations

import pytest
import torch

from fedlora.errors import UploadError
from fedlora.federation import wire
from fedlora.seeds import rng
from fedlora.tree import Key, Params

A, B, H = Key("lora", "enc.0", "A"), Key("lora", "enc.0", "B"), Key("head", "cls", "weight")


def message() -> Params:
    g = rng("wire")
    return {B: torch.randn(6, 4, generator=g), A: torch.randn(4, 5, generator=g), H: torch.randn(3, 5, generator=g)}


def test_there_and_back() -> None:
    p = message()
    got, header = wire.decode(wire.encode(p, {"round": 3, "who": "ü"}))
    assert header == {"round": 3, "who": "ü"}
    assert list(got) == sorted(p)  # in one order, whatever the reader gives
    assert all(torch.equal(got[k], p[k]) for k in p)


@pytest.mark.parametrize("dtype", wire._DTYPES)
@pytest.mark.parametrize("leaves", [0, 1, 7])
def test_size_is_the_length_of_the_message(dtype: torch.dtype, leaves: int) -> None:
    p: Params = {Key("lora", f"layer.{i}.ä", "AB"[i % 2]): torch.zeros(i, 3).to(dtype) for i in range(leaves)}
    p |= {Key("lora", "", "rank"): torch.tensor(3), H: torch.zeros(2, 2, dtype=torch.float16)}
    header = {"round": 10**leaves, "examples": 12}
    assert wire.size(p, header) == len(wire.encode(p, header))


def test_traffic_adds_up() -> None:
    p = message()
    sent = wire.encode(p, {"round": 1})
    t = wire.measure(p, sent)
    assert (t.adapter, t.head) == (4 * (24 + 20), 4 * 15)
    assert t.total == len(sent)
    assert t.framing == len(sent) - t.adapter - t.head > 0
    assert (t + t).as_dict() == {k: 2 * v for k, v in t.as_dict().items()}


def test_what_is_no_message_is_refused() -> None:
    good = wire.encode(message(), {"round": 1})
    from safetensors.torch import save

    foreign = save({"a": torch.zeros(2)})
    named = save({"only-two/parts": torch.zeros(2)}, {wire.HEADER: "{}"})
    for bad in (b"", b"\x00" * 100, good[:-1], good[:40], good + b"x", foreign, named, b"\xff" * 64):
        with pytest.raises(UploadError, match=rf"message of {len(bad)} bytes cannot be read"):
            wire.decode(bad)


def test_an_upload_must_be_what_was_declared() -> None:
    p = message()
    spec = wire.expect(p)
    wire.validate(p, spec)
    cases = {
        "unexpected \\['lora/enc.1/A'\\]": p | {Key("lora", "enc.1", "A"): torch.zeros(1)},
        "missing \\['lora/enc.0/B'\\]": {A: p[A], H: p[H]},
        r"lora/enc.0/A is \[5, 4\]": p | {A: p[A].mT.contiguous()},
        r"lora/enc.0/A is \[3, 5\]": p | {A: p[A][:3]},
        "torch.float64, expected": p | {A: p[A].double()},
        "1 non-finite values of 20": p | {A: torch.where(torch.arange(20).view(4, 5) == 7, torch.nan, p[A])},
        "15 non-finite values": p | {H: p[H] / 0},
    }  # fmt: skip
    for text, bad in cases.items():
        with pytest.raises(UploadError, match=text):
            wire.validate(bad, spec)


def test_norm_bound() -> None:
    p = {A: torch.full((4, 5), 3.0), H: torch.full((3, 5), 4.0)}
    norm = (20 * 9 + 15 * 16) ** 0.5
    wire.validate(p, wire.expect(p), norm_bound=norm + 1e-6)
    with pytest.raises(UploadError, match=r"norm 20\.5 exceeds the bound 20"):
        wire.validate(p, wire.expect(p), norm_bound=20.0)


def test_ranks_may_shrink_but_not_grow() -> None:
    p = message()
    spec = wire.expect(p)
    wire.validate(p | {A: p[A][:2], B: p[B][:, :2]}, spec, ranks_may_shrink=True)
    with pytest.raises(UploadError, match=r"lora/enc.0/A is \[5, 5\]"):
        wire.validate(p | {A: torch.zeros(5, 5)}, spec, ranks_may_shrink=True)
    with pytest.raises(UploadError, match="head/cls/weight"):
        wire.validate(p | {H: p[H][:2]}, spec, ranks_may_shrink=True)


@pytest.mark.parametrize("shape", [(7, 33), (5,), (2, 3, 4)])
def test_int8_is_within_half_a_step_of_each_row(shape: tuple[int, ...]) -> None:
    """|x - x'| <= max|row| / 254, row by row; zero rows stay zero; what is no float32 passes through."""
    g = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=g) * torch.logspace(-6, 3, shape[0])[(...,) + (None,) * (len(shape) - 1)]
    v[0] = 0.0
    p = {Key("lora", "s", "A"): v, Key("lora", "", "rank"): torch.tensor(3), Key("lora", "s", "t"): torch.tensor(1.5)}
    sent = wire.pack(p, "int8")
    assert sent[Key("lora", "s", "A")].dtype == torch.int8
    back = wire.unpack(wire.decode(wire.encode(sent))[0])
    assert back.keys() == p.keys()
    error = (back[Key("lora", "s", "A")] - v).abs()
    assert (error <= v.abs().amax(-1, keepdim=True) / 254 * 1.001).all()
    assert torch.equal(back[Key("lora", "", "rank")], p[Key("lora", "", "rank")])
    assert torch.equal(back[Key("lora", "s", "t")], p[Key("lora", "s", "t")])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_what_is_not_finite_stays_so(bad: float, precision: wire.Precision) -> None:
    v = torch.ones(3, 4)
    v[1, 2] = bad
    back = wire.unpack(wire.pack({Key("lora", "s", "A"): v}, precision))[Key("lora", "s", "A")]
    assert not torch.isfinite(back[1]).all()
    assert torch.isfinite(back[0]).all()


def test_scales_that_do_not_fit_are_refused() -> None:
    p = wire.pack({Key("lora", "s", "A"): torch.ones(3, 4)}, "int8")
    scale = Key("lora", "s", "A~scale")
    with pytest.raises(UploadError, match="do not fit"):
        wire.unpack(p | {scale: torch.ones(2, 1)})
    with pytest.raises(UploadError, match="do not fit"):
        wire.unpack(p | {Key("lora", "s", "A"): torch.ones(3, 4)})


def test_no_rank_is_below_one() -> None:
    p = message()
    spec = wire.expect(p)
    with pytest.raises(UploadError, match=r"is \[(0, 5|6, 0)\]"):
        wire.validate(p | {A: p[A][:0], B: p[B][:, :0]}, spec, ranks_may_shrink=True)
    stated = {**p, Key("lora", "", "rank"): torch.tensor(4)}
    wire.validate(stated, wire.expect(stated), ranks_may_shrink=True)
    for r in (0, -3):
        wrong = {**stated, Key("lora", "", "rank"): torch.tensor(r)}
        with pytest.raises(UploadError, match=rf"rank is {r}, expected 1 or more"):
            wire.validate(wrong, wire.expect(wrong), ranks_may_shrink=True)


def test_stated_norms_can_be_norms() -> None:
    """Not negative, and over the whole model what they are over its layers together."""

    def stating(**norms: float) -> Params:
        return {Key("lora", "" if s == "whole" else s, "norm"): torch.tensor(v) for s, v in norms.items()}

    for good in (stating(whole=5.0), stating(whole=5.0, a=3.0, b=4.0), stating(whole=0.0, a=0.0)):
        wire.validate(good, wire.expect(good))
    for bad, why in ((stating(whole=-1.0), "never negative"), (stating(whole=1e30, a=3.0, b=4.0), "expected 5"),
                     (stating(whole=float("nan")), "non-finite")):  # fmt: skip
        with pytest.raises(UploadError, match=why):
            wire.validate(bad, wire.expect(bad))


def test_a_state_is_finite_and_within_its_bound() -> None:
    p = message()
    assert wire.finite_state(p, bound=wire.magnitude(p)) is None
    assert wire.finite_state({A: torch.full((2, 2), 3e38)}) is None  # its square is more than float32 can hold
    assert wire.magnitude({A: torch.full((2, 2), 3e38)}) == pytest.approx(6e38)
    for bad in (float("inf"), float("nan")):
        why = wire.finite_state(p | {A: p[A] * bad})
        assert why is not None and "lora/enc.0/A" in why
    why = wire.finite_state(p, bound=wire.magnitude(p) / 2)
    assert why is not None and "exceeds" in why


def test_a_header_is_fields_and_no_depth_ends_the_reader() -> None:
    from safetensors.torch import save

    for header in ("[1]", "7", "[" * 100_000, '{"a":' * 100_000, "1" * 10_000):
        with pytest.raises(UploadError, match="cannot be read"):
            wire.decode(save({"a/b/c": torch.zeros(1)}, {wire.HEADER: header}))
    for text in ("[" * 100_000, "{}", "[]", "7"):
        with pytest.raises(UploadError, match="cannot be read"):
            wire.decode(len(text).to_bytes(8, "little") + text.encode())
