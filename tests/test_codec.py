"""The 8-bit code, against the published construction rebuilt here in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from qadam import _core

pytestmark = pytest.mark.cpu_only

BLOCK = 256
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
TIE = 2.0**-23
"""Inputs this near to a midpoint, relative, may go either way."""


def published(signed: bool) -> np.ndarray:
    """0, 1, and in each decade the middles of equal cells: 2^i a sign, or 2^(i+1) without one."""
    values = [np.array([0.0, 1.0])]
    for i in range(7):
        cells = 2**i if signed else 2 ** (i + 1)
        edges = np.linspace(0.1, 1.0, cells + 1) * 10.0 ** (i - 6)
        middles = (edges[:-1] + edges[1:]) / 2
        values += [middles, -middles] if signed else [middles]
    return np.sort(np.concatenate(values))


def values_of(signed: bool) -> np.ndarray:
    """The map as the package has it: exact in float64."""
    return np.array(_core.dynamic_map(signed), dtype=np.float64)


@contextmanager
def flushing(flush: bool) -> Iterator[None]:
    """``torch.set_flush_denormal``, but not for the test's own arithmetic."""
    torch.set_flush_denormal(flush)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def encode(values: Tensor, signed: bool, flush: bool = False) -> tuple[Tensor, Tensor]:
    codes = torch.full((len(values),), 99, dtype=torch.uint8)
    scales = torch.full((-(-len(values) // BLOCK),), torch.nan)
    with flushing(flush):
        _core.encode_blocks(values, codes, scales, signed)
    return codes, scales


def encode_whole(values: Tensor, signed: bool, flush: bool = False) -> tuple[Tensor, Tensor]:
    """With one scale for all of them."""
    codes = torch.full((len(values),), 99, dtype=torch.uint8)
    scales = torch.full((min(len(values), 1),), torch.nan)
    with flushing(flush):
        _core.encode_tensor(values, codes, scales, signed)
    return codes, scales


def decode(codes: Tensor, scales: Tensor, signed: bool, flush: bool = False) -> Tensor:
    values = torch.full((len(codes),), torch.nan)
    with flushing(flush):
        _core.decode_blocks(codes, scales, values, signed)
    return values


def encode_unscaled(x: np.ndarray, signed: bool) -> np.ndarray:
    """Codes of numbers in [-1, 1]: each block gets a 1, which makes its scale 1."""
    padded = np.zeros(-(-len(x) // 255) * 255, dtype=np.float32)
    padded[: len(x)] = x
    rows = np.ones((len(padded) // 255, BLOCK), dtype=np.float32)
    rows[:, 1:] = padded.reshape(-1, 255)
    codes, scales = encode(torch.from_numpy(rows).view(-1), signed)
    assert (scales == 1).all()
    return codes.view(-1, BLOCK)[:, 1:].flatten()[: len(x)].numpy()


def assert_nearest(x: np.ndarray, codes: np.ndarray, signed: bool, tie: float = TIE) -> None:
    """``codes`` are those of the nearest values, but for ties and the zero of second moments."""
    x = x.astype(np.float64)
    values = values_of(signed)
    middles = (values[:-1] + values[1:]) / 2
    slack = tie * np.abs(x)
    lowest = np.searchsorted(middles, x - slack, side="left")
    highest = np.searchsorted(middles, x + slack, side="right")
    if not signed:
        positive = x > 0
        lowest[positive] = np.maximum(lowest[positive], 1)
        highest[positive] = np.maximum(highest[positive], 1)
    wrong = (codes < lowest) | (codes > highest)
    if wrong.any():
        i = wrong.argmax()
        near = f"nearest is {lowest[i]} to {highest[i]}"
        pytest.fail(f"{wrong.sum()} of {len(x)} wrong: {x[i]!r} has code {codes[i]}, {near}")


@SIGNED
def test_all_values_equal_the_published_construction(signed):
    ours, theirs = values_of(signed), published(signed)
    assert len(ours) == len(theirs) == 256
    assert (np.diff(ours) > 0).all()
    error = np.abs(ours - theirs) / np.where(theirs == 0, 1, np.abs(theirs))
    assert error.max() <= 1.5e-7, (error.argmax(), error.max())
    assert ours[255] == 1
    assert ours[127 if signed else 0] == 0


@SIGNED
def test_encode_is_nearest_for_ten_million_random_inputs(signed):
    random = np.random.default_rng(7)
    for part in range(5):
        x = random.random(2_000_000, dtype=np.float32)
        if part % 2:  # over nine decades instead
            x = 10 ** (-9 * x)
        if signed:
            x *= random.choice(np.array([-1, 1], dtype=np.float32), len(x))
        assert_nearest(x, encode_unscaled(x, signed), signed)


@SIGNED
def test_encode_is_nearest_around_every_midpoint_and_value(signed):
    values = values_of(signed)
    centres = np.concatenate([values, (values[:-1] + values[1:]) / 2]).astype(np.float32)
    bits = np.abs(centres).view(np.int32)[:, None] + np.arange(-40, 41, dtype=np.int32)
    x = np.maximum(bits, 0).view(np.float32)
    x = np.where(np.signbit(centres)[:, None], -x, x).flatten()
    x = x[np.abs(x) <= 1]
    assert_nearest(x, encode_unscaled(x, signed), signed)


@SIGNED
def test_encode_inverts_decode(signed):
    codes = torch.arange(256, dtype=torch.uint8)
    for scale in (2.0**-60, 1e-9, 0.3, 1.0, 7.7, 1e30, torch.finfo(torch.float32).max):
        scales = torch.tensor([scale])
        again, new_scales = encode(decode(codes, scales, signed), signed)
        assert torch.equal(again, codes), scale
        assert torch.equal(new_scales, scales)


@SIGNED
@pytest.mark.parametrize("length", [0, 1, 2, 255, 256, 257, 511, 512, 513, 10_001])
def test_each_block_and_the_tail_has_its_own_scale(length, signed):
    values = torch.randn(length, generator=torch.Generator().manual_seed(length))
    values *= 10.0 ** (torch.arange(length) // BLOCK % 7)
    values = values if signed else values.abs()
    codes, scales = encode(values, signed)
    blocks = values.split(BLOCK) if length else []
    assert torch.equal(scales, torch.tensor([block.abs().max() for block in blocks]))
    each = [encode(block, signed)[0] for block in blocks]
    assert torch.equal(codes, torch.cat(each) if each else codes)
    decoded = decode(codes, scales, signed)
    expected = torch.tensor(_core.dynamic_map(signed))[codes.long()]
    expected *= scales.repeat_interleave(BLOCK)[:length]
    assert torch.equal(decoded, expected)


@SIGNED
@pytest.mark.parametrize("fill", [0.0, -0.0, torch.nan, torch.inf, -torch.inf])
def test_a_block_of_nothing_has_scale_0_and_decodes_to_zeros(fill, signed):
    codes, scales = encode(torch.full((300,), fill), signed)
    assert (codes == (127 if signed else 0)).all()
    assert scales.tolist() == [0.0, 0.0]
    assert torch.equal(decode(codes, scales, signed), torch.zeros(300))


@SIGNED
def test_what_is_not_finite_counts_as_zero_and_does_not_spoil_its_block(signed):
    values = torch.rand(256, generator=torch.Generator().manual_seed(0)) + 0.1
    expected, expected_scales = encode(values, signed)
    for position, bad in ((3, torch.nan), (77, torch.inf), (250, -torch.inf)):
        values[position] = bad
        expected[position] = 127 if signed else 0
    codes, scales = encode(values, signed)
    assert scales == values[values.isfinite()].max()
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes, expected)


FLUSH = pytest.mark.parametrize("flush", [False, True], ids=["ieee", "flush_denormal"])
EXTREME_SCALES = [
    1.4e-45,
    7e-45,
    1e-41,
    1.17e-38,
    1.2e-38,
    1e-30,
    8e-25,
    9e-25,
    1e24,
    1.3e24,
    3.4e38,
]


@SIGNED
@FLUSH
@pytest.mark.parametrize("scale", EXTREME_SCALES)
def test_subnormal_and_huge_scales(scale, signed, flush):
    random = np.random.default_rng(1)
    scale = np.float32(scale)
    x = (random.random(20_000) * 10 ** (-8 * random.random(20_000)) * float(scale)).astype("f4")
    if signed:
        x *= random.choice(np.array([-1, 1], dtype=np.float32), len(x))
    x[::BLOCK] = scale
    codes, scales = encode(torch.from_numpy(x), signed, flush)
    assert set(scales.view(torch.int32).tolist()) == {int(scale.view(np.int32))}
    # dividing by the scale costs two more roundings
    assert_nearest(x.astype(np.float64) / float(scale), codes.numpy(), signed, tie=3 * TIE)

    expected = (values_of(signed)[codes.numpy()] * float(scale)).astype(np.float32)
    decoded = decode(codes, scales, signed, flush).numpy()
    assert np.array_equal(np.abs(decoded).view(np.int32), np.abs(expected).view(np.int32))


@FLUSH
def test_a_positive_second_moment_never_takes_the_code_of_zero(flush):
    values = torch.tensor([1.0, 1e-3, 3e-7, 1.6e-7, 1e-8, 1e-30, 1e-38, 1e-40, 1.4e-45, 0.0, -0.0])
    for scale in (1.0, 1e-2, 1e30):
        x = torch.cat([values[1:], torch.tensor([scale])])
        codes, _ = encode(x, False, flush)
        assert (codes[:-3] >= 1).all(), codes
        assert codes[-3:].tolist() == [0, 0, 255]


# One scale for all values.


@SIGNED
@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 10_001])
def test_one_scale_is_the_largest_magnitude_of_all_values(length, signed):
    """Beside a value as large in every block, the codes are those of blocks."""
    values = torch.randn(length, generator=torch.Generator().manual_seed(length))
    values *= 10.0 ** -(torch.arange(length) // BLOCK % 7)
    values = values if signed else values.abs()
    codes, scales = encode_whole(values, signed)
    assert torch.equal(scales, values.abs().max().reshape(1) if length else torch.empty(0))
    for block, its_codes in zip(values.split(255), codes.split(255), strict=True):
        expected, its_scale = encode(torch.cat([block, scales]), signed)
        assert torch.equal(its_codes, expected[: len(block)])
        assert torch.equal(its_scale, scales)


@SIGNED
@FLUSH
@pytest.mark.parametrize("scale", EXTREME_SCALES)
def test_one_subnormal_or_huge_scale(scale, signed, flush):
    random = np.random.default_rng(2)
    scale = np.float32(scale)
    x = (random.random(20_000) * 10 ** (-8 * random.random(20_000)) * float(scale)).astype("f4")
    if signed:
        x *= random.choice(np.array([-1, 1], dtype=np.float32), len(x))
    x[12_345] = scale
    codes, scales = encode_whole(torch.from_numpy(x), signed, flush)
    assert scales.view(torch.int32).tolist() == [int(scale.view(np.int32))]
    assert_nearest(x.astype(np.float64) / float(scale), codes.numpy(), signed, tie=3 * TIE)


@SIGNED
def test_what_is_not_finite_does_not_spoil_the_one_scale(signed):
    values = torch.rand(700, generator=torch.Generator().manual_seed(0)) + 0.1
    expected, expected_scales = encode_whole(values, signed)
    for position, bad in ((3, torch.nan), (277, torch.inf), (650, -torch.inf)):
        values[position] = bad
        expected[position] = 127 if signed else 0
    codes, scales = encode_whole(values, signed)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(codes, expected)
    codes, scales = encode_whole(torch.full((300,), torch.nan), signed)
    assert (codes == (127 if signed else 0)).all()
    assert scales.tolist() == [0.0]


def test_with_one_scale_a_positive_second_moment_never_takes_the_code_of_zero():
    values = torch.full((5000,), 1e-30)
    values[4000], values[4999] = 1.0, 0.0
    codes, _ = encode_whole(values, False)
    assert (codes[4000], codes[4999]) == (255, 0)
    assert codes[:4000].unique().tolist() == [1]


# What is refused.

FUNCTIONS = {
    "encode_blocks": (("values", "codes", "scales"), 2),
    "encode_tensor": (("values", "codes", "scales"), 1),
    "decode_blocks": (("codes", "scales", "values"), 2),
}
"""By name: the order of the arguments, and how many scales there are for 300 values."""


def good(function: str) -> dict[str, Tensor]:
    return {
        "values": torch.rand(300),
        "codes": torch.zeros(300, dtype=torch.uint8),
        "scales": torch.ones(FUNCTIONS[function][1]),
    }


WRONG = {
    "float64": ("values", torch.rand(300, dtype=torch.float64)),
    "bfloat16": ("values", torch.rand(300, dtype=torch.bfloat16)),
    "strided values": ("values", torch.rand(600)[::2]),
    "two dimensions": ("values", torch.rand(3, 100)),
    "no dimensions": ("values", torch.tensor(1.0)),
    "sparse": ("values", torch.rand(300).to_sparse()),
    "meta": ("values", torch.rand(300, device="meta")),
    "array": ("values", np.zeros(300, dtype=np.float32)),
    "int8": ("codes", torch.zeros(300, dtype=torch.int8)),
    "short": ("codes", torch.zeros(299, dtype=torch.uint8)),
    "long": ("codes", torch.zeros(301, dtype=torch.uint8)),
    "strided codes": ("codes", torch.zeros(600, dtype=torch.uint8)[::2]),
    "expanded": ("codes", torch.zeros(1, dtype=torch.uint8).expand(300)),
    "float16": ("scales", torch.ones(2, dtype=torch.float16)),
    "no scales": ("scales", torch.ones(0)),
    "three scales": ("scales", torch.ones(3)),
    "as many scales as the other has": ("scales", {1: torch.ones(2), 2: torch.ones(1)}),
    "strided scales": ("scales", torch.ones(4)[::2]),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("case", WRONG)
def test_wrong_dtypes_lengths_and_layouts_are_refused(case, function):
    name, wrong = WRONG[case]
    order, count = FUNCTIONS[function]
    arguments = good(function)
    arguments[name] = wrong[count] if isinstance(wrong, dict) else wrong
    before = {key: x.clone() if isinstance(x, Tensor) else x for key, x in arguments.items()}
    named = rf"\A{name} "
    if case in ("short", "long") and function == "decode_blocks":
        named = r"\A(values|codes) has \d+ elements, \d+ are needed"
    with pytest.raises((TypeError, ValueError), match=named):
        getattr(_core, function)(*(arguments[key] for key in order), True)
    for key in {"values", "codes", "scales"} - {name}:
        assert torch.equal(arguments[key], before[key])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_not_a_tensor_is_refused_by_name(function):
    order, _ = FUNCTIONS[function]
    for name in order:
        arguments = {**good(function), name: [0.0, 1.0]}
        with pytest.raises(TypeError, match=rf"\A{name} "):
            getattr(_core, function)(*(arguments[key] for key in order), True)


@pytest.mark.parametrize("function", ["encode_blocks", "encode_tensor"])
def test_arguments_that_share_memory_are_refused(function):
    arguments = good(function)
    values, count = arguments["values"], len(arguments["scales"])
    shared = {"codes": values.view(torch.uint8)[:300], "scales": values[-count:]}
    for name, tensor in shared.items():
        before = values.clone()
        with pytest.raises(ValueError, match="share memory"):
            getattr(_core, function)(*{**arguments, name: tensor}.values(), True)
        assert torch.equal(values, before)
