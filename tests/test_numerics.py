# SPDX-License-Identifier: Apache-2.0
"""Encodings exhaustively, roundings at every midpoint, block formats by their error bounds and round trips."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tvmmoe import DtypeError, ShapeError, numerics

FORMATS = {
    "nvfp4": (numerics.quantize_nvfp4, numerics.dequantize_nvfp4, 16),
    "mxfp4": (numerics.quantize_mxfp4, numerics.dequantize_mxfp4, 32),
    "mxfp8": (numerics.quantize_mxfp8, numerics.dequantize_mxfp8, 32),
}


def test_e2m1_codes_round_trip():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(numerics.encode_e2m1(numerics.decode_e2m1(codes)), codes)


@pytest.mark.parametrize(
    "x, value",
    [(0.25, 0), (0.26, 0.5), (0.74, 0.5), (0.75, 1), (1.25, 1), (1.26, 1.5), (1.75, 2), (2.5, 2), (2.6, 3), (3.5, 4),
     (5.0, 4), (5.1, 6), (1e9, 6)],
)  # fmt: skip
def test_e2m1_rounds_ties_to_even(x, value):
    both = numerics.decode_e2m1(numerics.encode_e2m1(torch.tensor([x, -x])))
    assert both.tolist() == [value, -value]


def test_pack_is_low_nibble_first():
    assert numerics.pack_e2m1(torch.tensor([1, 2], dtype=torch.uint8)).item() == 0x21
    every = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(numerics.pack_e2m1(numerics.unpack_e2m1(every)), every)


def test_ue8m0_of_every_byte():
    byte = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(numerics.decode_ue8m0(byte).double(), 2.0 ** (byte.double() - 127))
    assert torch.equal(numerics.ue8m0_ceil(numerics.decode_ue8m0(byte)), byte)
    assert numerics.decode_ue8m0(torch.tensor([255], dtype=torch.uint8)).isnan().all()


@given(st.floats(2.0**-126, 2.0**126, width=32))
def test_ue8m0_ceil_is_the_smallest_above(x):
    byte = int(numerics.ue8m0_ceil(torch.tensor([x])))
    assert 2.0 ** (byte - 128) < x <= 2.0 ** (byte - 127)


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_values_quantize_to_themselves(name):
    quantize, dequantize, block = FORMATS[name]
    x = torch.randn(8, 4 * block) * 2.0 ** torch.randint(-6, 6, (8, 4 * block // block)).repeat_interleave(block, 1)
    once = dequantize(*quantize(x))
    assert torch.equal(dequantize(*quantize(once)), once)


@pytest.mark.parametrize("name, bound", [("nvfp4", 0.13), ("mxfp4", 0.17), ("mxfp8", 0.04)])
def test_relative_error_is_that_of_the_format(name, bound):
    quantize, dequantize, _ = FORMATS[name]
    x = torch.randn(64, 256) * 8
    assert 1e-3 < ((dequantize(*quantize(x)) - x).norm() / x.norm()) < bound


def test_zero_blocks_stay_zero():
    x = torch.zeros(3, 64)
    for quantize, dequantize, _ in FORMATS.values():
        assert not dequantize(*quantize(x)).any()
    values, scale, per_token = numerics.quantize_nvfp4_per_token(x)
    assert not values.any() and not scale.float().any() and not per_token.any()


def test_global_scale_uses_the_full_range():
    x = torch.randn(3, 8, 64)
    g = numerics.nvfp4_global_scale(x, dim=(-2, -1))
    values, scale = numerics.quantize_nvfp4(x, g)
    assert (scale.float().flatten(1).amax(1) == 448).all()
    assert ((numerics.dequantize_nvfp4(values, scale) / g[:, None, None] - x).norm() / x.norm()) < 0.13


@pytest.mark.parametrize("quantize", [f[0] for f in FORMATS.values()])
def test_refusals_name_the_argument(quantize):
    with pytest.raises(ShapeError, match="x: got shape"):
        quantize(torch.randn(2, 24))
    with pytest.raises(DtypeError, match="x: got torch.int32"):
        quantize(torch.zeros(2, 32, dtype=torch.int32))
