# SPDX-License-Identifier: Apache-2.0
"""Encodings against scalar arithmetic written from the formats' definitions."""

import bisect
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvmmoe import numerics

INF, NAN = math.inf, math.nan
U8, E4M3 = torch.uint8, torch.float8_e4m3fn
E8M0 = getattr(torch, "float8_e8m0fnu", None)
VIEWS = [U8, E4M3] + [E8M0] * (E8M0 is not None)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
fuzz = settings(deadline=None, max_examples=60, derandomize=True)


def all_bytes():
    return torch.arange(256, dtype=U8)


def bits(x):
    return x.view(torch.int32)


def same(a, b):
    """Equal dtype, shape and bytes: -0 is not 0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.flatten().view(U8), b.flatten().view(U8))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Scalar definitions: lists of exact values, nearest by Fraction.

E2M1 = [Fraction(v) for v in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]


def e4m3_magnitude(code):
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return Fraction(mantissa, 8) * Fraction(1, 64)
    return (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


E4M3_MAGNITUDES = [e4m3_magnitude(code) for code in range(127)]  # 0x7f is NaN


def nearest_code(x, magnitudes):
    """Index of the nearest magnitude, ties to the even index, saturating; |x|."""
    a = Fraction(abs(x))
    i = bisect.bisect_left(magnitudes, a)
    if i == len(magnitudes):
        return i - 1
    if i == 0:
        return 0
    below, above = a - magnitudes[i - 1], magnitudes[i] - a
    if below == above:
        return i if i % 2 == 0 else i - 1
    return i - 1 if below < above else i


def probes(magnitudes):
    """float32 around every value and every midpoint: the number, its two neighbours, and the negatives."""
    midpoints = [(a + b) / 2 for a, b in zip(magnitudes, magnitudes[1:], strict=False)]
    exact = torch.tensor([float(v) for v in (*magnitudes, *midpoints, 2 * magnitudes[-1], 10**6 * magnitudes[-1])])
    inf = torch.full_like(exact, INF)
    points = torch.cat((exact, torch.nextafter(exact, inf), torch.nextafter(exact, -inf).clamp(min=0)))
    return torch.cat((points, -points))


# e2m1


def test_e2m1_values():
    decoded = numerics.decode_e2m1(torch.arange(16, dtype=U8))
    assert same(decoded, torch.tensor(numerics.E2M1_VALUES))
    for code in range(16):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa * 0.5) * 2.0 ** (exponent - 1)
        assert decoded[code] == (-magnitude if sign else magnitude)
        assert torch.signbit(decoded[code]) == bool(sign)


def test_e2m1_codes_roundtrip():
    codes = torch.arange(16, dtype=U8)
    assert torch.equal(numerics.encode_e2m1(numerics.decode_e2m1(codes)), codes)


def test_decode_e2m1_ignores_upper_bits():
    assert same(numerics.decode_e2m1(all_bytes()), numerics.decode_e2m1(all_bytes() & 15))


@pytest.mark.parametrize(
    "x, value",
    [(0.25, 0), (0.26, 0.5), (0.74, 0.5), (0.75, 1), (1.0, 1), (1.25, 1), (1.26, 1.5), (1.74, 1.5), (1.75, 2), (2.5, 2)]
    + [
        (2.51, 3),
        (3.49, 3),
        (3.5, 4),
        (5.0, 4),
        (5.01, 6),
        (6.0, 6),
        (7.0, 6),
        (1e30, 6),
        (INF, 6),
        (0.0, 0),
        (1e-45, 0),
    ],
)
def test_encode_e2m1_midpoints(x, value):
    up, down = numerics.encode_e2m1(torch.tensor([x, -x])).tolist()
    assert numerics.E2M1_VALUES[up] == value
    assert down == up + 8


def test_encode_e2m1_nearest():
    x = probes(E2M1)
    expected = [nearest_code(v, E2M1) + 8 * (math.copysign(1, v) < 0) for v in x.tolist()]
    assert numerics.encode_e2m1(x).tolist() == expected


def test_encode_e2m1_nan_is_zero():
    assert (numerics.encode_e2m1(torch.tensor([NAN])) & 7).item() == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_encode_e2m1_dtypes(dtype):
    x = torch.linspace(-8, 8, 4097).to(dtype)
    assert torch.equal(numerics.encode_e2m1(x), numerics.encode_e2m1(x.float()))


def test_pack_e2m1_nibbles():
    codes = torch.tensor([[0x1, 0xA, 0xF, 0x0]], dtype=U8)
    assert numerics.pack_e2m1(codes).tolist() == [[0xA1, 0x0F]]
    assert numerics.pack_e2m1(codes + 0x30).tolist() == [[0xA1, 0x0F]]
    assert numerics.unpack_e2m1(torch.tensor([0xA1, 0x0F], dtype=U8)).tolist() == [0x1, 0xA, 0xF, 0x0]


@pytest.mark.parametrize("shape", [(256,), (2, 64, 2), (0, 4)])
def test_pack_e2m1_roundtrip(shape):
    packed = all_bytes()[: math.prod(shape)].view(shape)
    codes = numerics.unpack_e2m1(packed)
    assert codes.shape == (*shape[:-1], 2 * shape[-1])
    assert same(numerics.pack_e2m1(codes), packed)
    assert same(numerics.pack_e2m1(codes.flip(-1)), ((packed << 4) | (packed >> 4)).flip(-1))  # strided views


# e4m3


def test_decode_e4m3_all_bytes():
    decoded = numerics.decode_e4m3(all_bytes())
    for code in range(256):
        value = decoded[code].item()
        if code & 127 == 127:
            assert math.isnan(value)
        else:
            assert abs(Fraction(value)) == E4M3_MAGNITUDES[code & 127]
            assert math.copysign(1, value) == (-1 if code & 128 else 1)
    assert decoded[126] == numerics.E4M3_MAX


def test_e4m3_codes_roundtrip():
    encoded = numerics.encode_e4m3(numerics.decode_e4m3(all_bytes())).view(U8)
    keep = (all_bytes() & 127) != 127
    assert torch.equal(encoded[keep], all_bytes()[keep])
    assert ((encoded[~keep] & 127) == 127).all()


def test_encode_e4m3_nearest():
    x = probes(E4M3_MAGNITUDES)
    expected = [nearest_code(v, E4M3_MAGNITUDES) + 128 * (math.copysign(1, v) < 0) for v in x.tolist()]
    assert numerics.encode_e4m3(x).view(U8).tolist() == expected


def test_encode_e4m3_saturates_and_keeps_nan():
    x = torch.tensor([448, 464, 465, 1e38, INF, -449, -INF, NAN])
    assert numerics.encode_e4m3(x).float().tolist()[:7] == [448, 448, 448, 448, 448, -448, -448]
    assert numerics.encode_e4m3(x)[7].float().isnan()


@pytest.mark.parametrize("dtype", FLOATS)
def test_encode_e4m3_dtypes(dtype):
    x = torch.cat((torch.linspace(-500, 500, 4097), torch.logspace(-4, 0, 1000))).to(dtype)
    assert same(numerics.encode_e4m3(x), numerics.encode_e4m3(x.float()))


# ue8m0


def test_decode_ue8m0_all_bytes():
    decoded = numerics.decode_ue8m0(all_bytes())
    assert decoded[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]  # tolist() is exact, in float64
    assert decoded[255].isnan()
    assert bits(decoded[0]).item() == 1 << 22


@pytest.mark.parametrize("dtype", VIEWS)
def test_decode_views(dtype):
    assert same(numerics.decode_ue8m0(all_bytes().view(dtype)), numerics.decode_ue8m0(all_bytes()))
    assert same(numerics.decode_e4m3(all_bytes().view(dtype)), numerics.decode_e4m3(all_bytes()))


def test_ue8m0_ceil_powers_of_two():
    scale = numerics.decode_ue8m0(all_bytes()[:255])
    assert numerics.ue8m0_ceil(scale).tolist() == list(range(255))
    above = torch.nextafter(scale, torch.full_like(scale, INF))
    assert numerics.ue8m0_ceil(above).tolist() == [*range(1, 255), 254]
    below = torch.nextafter(scale, torch.zeros_like(scale))
    assert numerics.ue8m0_ceil(below).tolist() == list(range(255))


def test_ue8m0_ceil_ends():
    x = torch.tensor([0.0, -0.0, 1e-45, -1.0, -INF, 3.4028234e38, INF, NAN, -NAN])
    assert numerics.ue8m0_ceil(x).tolist() == [0, 0, 0, 0, 0, 254, 254, 255, 255]


@fuzz
@given(st.floats(min_value=0, max_value=2.0**127, width=32))
def test_ue8m0_ceil_smallest(x):
    byte = numerics.ue8m0_ceil(torch.tensor([x])).item()
    assert Fraction(2) ** (byte - 127) >= Fraction(x)
    assert byte == 0 or Fraction(2) ** (byte - 128) < Fraction(x)


# CUDA gives the same bits


@pytest.mark.gpu
def test_encodings_cuda_match_cpu():
    x = torch.cat(
        (
            probes(E4M3_MAGNITUDES),
            probes(E2M1),
            torch.tensor([INF, -INF]),
            torch.ldexp(randn(1000), torch.arange(1000) % 270 - 140),
        )
    )
    for encode in (numerics.encode_e2m1, numerics.encode_e4m3, numerics.ue8m0_ceil):
        assert same(encode(x.cuda()).cpu(), encode(x))
    codes = all_bytes()[:255]
    for decode in (numerics.decode_e2m1, numerics.decode_ue8m0):
        assert same(decode(codes.cuda()).cpu(), decode(codes))
    g = numerics.nvfp4_global_scale(randn(4, 8, 64).cuda(), (-2, -1))
    assert same(g.cpu(), numerics.nvfp4_global_scale(randn(4, 8, 64), (-2, -1)))
