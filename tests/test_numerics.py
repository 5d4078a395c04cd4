# SPDX-License-Identifier: Apache-2.0
"""Encodings against scalar arithmetic written from the formats' definitions; block formats by bounds and properties."""

import bisect
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvmmoe import numerics

INF, NAN = math.inf, math.nan
U8, F32, E4M3 = torch.uint8, torch.float32, torch.float8_e4m3fn
E8M0 = getattr(torch, "float8_e8m0fnu", None)
VIEWS = [U8, E4M3] + [E8M0] * (E8M0 is not None)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = ["nvfp4", "mxfp4", "mxfp8"]
BLOCK = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}
fuzz = settings(deadline=None, max_examples=60, derandomize=True)


def quantize(name, x):
    return getattr(numerics, f"quantize_{name}")(x)


def dequantize(name, *tensors):
    return getattr(numerics, f"dequantize_{name}")(*tensors)


def all_bytes():
    return torch.arange(256, dtype=U8)


def bits(x):
    return x.view(torch.int32)


def same(a, b):
    """Equal dtype, shape and bytes: -0 is not 0."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.flatten().view(U8), b.flatten().view(U8))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blockwise_exponents(x, block, low=-8, high=8):
    """Every block of a row times another power of two."""
    blocks = x.unflatten(-1, (-1, block))
    exponents = (torch.arange(blocks.shape[:-1].numel()) * 5 % (high - low) + low).view(*blocks.shape[:-1], 1)
    return torch.ldexp(blocks, exponents).flatten(-2)


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


# Block formats: what one block becomes, from the formulas


def scalar_block(name, block, factor=1.0):
    """(codes, scale) of a list of floats by the specification's formulas, each operation rounded to float32."""

    def f32(value):
        return torch.tensor(value, dtype=torch.float64).float().item()

    block = [f32(v * factor) for v in block]
    amax = max(map(abs, block))
    if name == "nvfp4":
        scale = float(E4M3_MAGNITUDES[nearest_code(f32(amax / 6), E4M3_MAGNITUDES)])
    else:
        full = 6 if name == "mxfp4" else 448
        exponent = -127
        while exponent < 127 and Fraction(2) ** exponent < Fraction(f32(amax / full)):
            exponent += 1
        scale = 2.0**exponent
    magnitudes = E4M3_MAGNITUDES if name == "mxfp8" else E2M1
    sign = 128 if name == "mxfp8" else 8
    codes = [
        (nearest_code(f32(v / scale), magnitudes) if scale else 0) + sign * (math.copysign(1, v) < 0) for v in block
    ]
    return codes, scale


@pytest.mark.parametrize("exponent", [-140, -120, -9, -3, 0, 5, 100])
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_matches_scalar(name, exponent):
    x = torch.ldexp(randn(6, 2 * BLOCK[name], seed=exponent + 200), torch.tensor(exponent))
    values, scale = quantize(name, x)
    codes = numerics.unpack_e2m1(values) if values.dtype == U8 else values.view(U8)
    decode = numerics.decode_e4m3 if name == "nvfp4" else numerics.decode_ue8m0
    for row in range(6):
        for b in range(2):
            columns = slice(b * BLOCK[name], (b + 1) * BLOCK[name])
            expected_codes, expected_scale = scalar_block(name, x[row, columns].tolist())
            assert decode(scale)[row, b].item() == expected_scale
            assert codes[row, columns].tolist() == expected_codes


@pytest.mark.parametrize("name", FORMATS)
def test_quantize_scale_is_exact_at_powers_of_two(name):
    """amax = full scale * 2^k: scale 2^k, largest element full scale, no bit lost."""
    full = 448 if name == "mxfp8" else 6
    exponents = torch.arange(-6, 9) if name == "nvfp4" else torch.arange(-127, 119)
    x = torch.zeros(len(exponents), BLOCK[name])
    x[:, 3] = -torch.ldexp(torch.full(exponents.shape, float(full)), exponents)
    values, scale = quantize(name, x)
    decode = numerics.decode_e4m3 if name == "nvfp4" else numerics.decode_ue8m0
    assert torch.equal(decode(scale)[:, 0], torch.ldexp(torch.ones(exponents.shape), exponents))
    assert torch.equal(dequantize(name, values, scale), x)
    if name != "nvfp4":  # one ulp more needs the next power
        values, scale = quantize(name, torch.where(x == 0, x, torch.nextafter(x, torch.full_like(x, -INF)))[5:])
        assert scale[:, 0].tolist() == (exponents[5:] + 128).tolist()


def test_nvfp4_scale_is_nearest():
    """amax / 6 at every midpoint of e4m3 and one ulp beside it: a true quotient, rounded once more."""
    amax = 6 * probes(E4M3_MAGNITUDES)
    x = torch.zeros(len(amax), 16)
    x[:, 7] = amax
    _, scale = numerics.quantize_nvfp4(x)
    quotients = (amax.abs() / torch.tensor(6.0)).tolist()
    assert scale.view(U8)[:, 0].tolist() == [nearest_code(v, E4M3_MAGNITUDES) for v in quotients]


@pytest.mark.parametrize("name", FORMATS)
def test_quantize_error_bound(name):
    """Half a step of the element grid plus, for nvfp4, what the rounding of the scale saturates."""
    x = blockwise_exponents(randn(16, 32 * 8), BLOCK[name], *((-3, 3) if name == "nvfp4" else (-60, 60)))
    error = (dequantize(name, *quantize(name, x)) - x).abs()
    amax = x.unflatten(-1, (-1, BLOCK[name])).abs().amax(-1, keepdim=True).expand(-1, -1, BLOCK[name]).flatten(-2)
    bound = {"nvfp4": amax / 6 * (1 + 1 / 16), "mxfp4": amax / 3, "mxfp8": amax / 448 * 2 * 16}[name]
    assert (error <= bound).all()
    rms = (error.square().mean() / x.square().mean()).sqrt().item()
    low, high = {"nvfp4": (0.05, 0.12), "mxfp4": (0.05, 0.16), "mxfp8": (0.01, 0.04)}[name]
    assert low < rms < high


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 5, 96), (0, 32), (2, 0, 32)])
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_shapes_and_dtypes(name, shape, dtype):
    x = randn(*shape).to(dtype)
    values, scale = quantize(name, x)
    columns = shape[-1] // (1 if name == "mxfp8" else 2)
    assert values.shape == (*shape[:-1], columns) and values.dtype == (E4M3 if name == "mxfp8" else U8)
    assert scale.shape == (*shape[:-1], shape[-1] // BLOCK[name]) and scale.dtype == (E4M3 if name == "nvfp4" else U8)
    restored = dequantize(name, values, scale)
    assert restored.shape == shape and restored.dtype == F32
    in_float32 = quantize(name, x.float())
    assert same(values, in_float32[0]) and same(scale, in_float32[1])


@pytest.mark.parametrize("name", FORMATS)
def test_quantize_strided_input(name):
    x = randn(64, 6)
    for view in (x.T, x.T[::2], x.T[:, -32:]):
        expected, actual = quantize(name, view.contiguous()), quantize(name, view)
        assert same(actual[0], expected[0]) and same(actual[1], expected[1])
    values, scale = quantize(name, randn(4, 64))
    assert same(dequantize(name, values[::2], scale[::2]), dequantize(name, values, scale)[::2])
    strided = values.repeat(1, 2)[:, : values.shape[1]], scale.T.contiguous().T
    assert same(dequantize(name, *strided), dequantize(name, values, scale))


@pytest.mark.parametrize("name", [*FORMATS, "nvfp4_per_token"])
def test_quantize_in_parts(name, monkeypatch):
    """Blocks are worked on in parts: the cut must not show."""
    x = blockwise_exponents(randn(7, 160), 32)
    whole = quantize(name, x)
    expected = dequantize(name.removesuffix("_per_token"), *whole[:2])
    monkeypatch.setattr(numerics, "CPU_PART", 96)
    parts = quantize(name, x)
    assert all(same(a, b) for a, b in zip(parts, whole, strict=True))
    assert same(dequantize(name.removesuffix("_per_token"), *parts[:2]), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_quantize_leaves_input_and_graph_alone(name):
    x = torch.nn.Parameter(randn(2, 64))
    before = x.detach().clone()
    values, scale = quantize(name, x)
    assert same(x.detach(), before)
    assert not values.requires_grad and not scale.requires_grad


@pytest.mark.parametrize("name", FORMATS)
def test_quantize_zero_block(name):
    x = torch.zeros(2, 64)
    x[1, 40] = 3.0
    values, scale = quantize(name, x)
    assert values.view(U8)[0].count_nonzero() == 0
    assert scale.view(U8)[0].tolist() == [0] * (64 // BLOCK[name])
    restored = dequantize(name, values, scale)
    assert restored[0].count_nonzero() == 0 and restored[1].count_nonzero() == 1 and restored[1, 40] == 3.0


@pytest.mark.parametrize("name", FORMATS)
def test_quantize_tiny_block(name):
    """Below the smallest scale: flushed or coarse, but finite and not larger than twice the truth."""
    x = torch.full((1, 32), 2.0**-140) * torch.arange(32)
    restored = dequantize(name, *quantize(name, x))
    assert restored.isfinite().all() and (restored <= 2 * x + 2.0**-129).all()


@pytest.mark.parametrize("name", FORMATS)
def test_quantize_nan_and_inf(name):
    x = torch.full((4, 64), 1.5)  # exact in every format
    x[0, 5], x[1, 40], x[2, 0] = NAN, INF, -INF
    restored = dequantize(name, *quantize(name, x))
    bad = slice(0, BLOCK[name])
    assert restored[0, bad].isnan().all() and (restored[0, BLOCK[name] :] == 1.5).all()
    assert restored[1, 40] >= 2688 and restored[2, 0] <= -2688
    assert not restored[1:].isnan().any() and (restored[3] == 1.5).all()


@pytest.mark.parametrize("name", FORMATS)
def test_quantize_distinct_exponents(name):
    """Every block of every row has its own scale, and dequantize finds it."""
    num_blocks = 192 // BLOCK[name]
    exponents = torch.arange(5 * num_blocks).view(5, num_blocks, 1) % 15 - 6
    if name != "nvfp4":
        exponents = torch.arange(5 * num_blocks).view(5, num_blocks, 1) * 7 - 100
    codes = torch.randint(8, (5, num_blocks, BLOCK[name]), generator=torch.Generator().manual_seed(1))
    grid = torch.tensor(numerics.E2M1_VALUES)[codes]
    grid[..., 0] = 448 if name == "mxfp8" else 6
    x = torch.ldexp(grid, exponents).flatten(-2)
    values, scale = quantize(name, x)
    assert torch.equal(dequantize(name, values, scale), x)
    byte = scale.view(U8).int()
    assert torch.equal(byte, (8 * (exponents[..., 0] + 7) if name == "nvfp4" else exponents[..., 0] + 127).int())


@pytest.mark.parametrize("dtype", VIEWS)
@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_scale_views(name, dtype):
    values, scale = quantize(name, blockwise_exponents(randn(3, 64), BLOCK[name]))
    assert same(dequantize(name, values, scale.view(U8).view(dtype)), dequantize(name, values, scale))


@pytest.mark.parametrize("byte", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_dequantize_extreme_bytes(name, byte):
    element = numerics.E2M1_VALUES if name == "mxfp4" else (0.0, 2.0**-9, -1.0, 1.875, 448.0) * 7
    x = torch.tensor((element * 8)[:32])
    values = numerics.pack_e2m1(numerics.encode_e2m1(x)) if name == "mxfp4" else numerics.encode_e4m3(x)
    restored = dequantize(name, values, torch.tensor([byte], dtype=U8))
    if byte == 255:
        assert restored.isnan().all()
    else:
        # In float64, then once to float32, which overflows where it should.
        assert same(restored, (x.double() * 2.0 ** (byte - 127)).float())


@fuzz
@given(st.integers(0, 2**32), st.integers(-100, 100), st.integers(1, 4), st.sampled_from(["mxfp4", "mxfp8"]))
def test_mx_quantize_is_idempotent(seed, exponent, rows, name):
    x = blockwise_exponents(torch.ldexp(randn(rows, 96, seed=seed), torch.tensor(exponent)), 32)
    once = dequantize(name, *quantize(name, x))
    assert same(dequantize(name, *quantize(name, once)), once)


@fuzz
@given(st.integers(0, 2**32), st.integers(-3, 6), st.integers(1, 4), st.booleans())
def test_nvfp4_quantize_is_idempotent(seed, exponent, rows, has_global_scale):
    """While scales are normal e4m3; a subnormal one may be half of what the block needs."""
    x = torch.ldexp(randn(rows, 96, seed=seed), torch.tensor(exponent))
    g = numerics.nvfp4_global_scale(x) if has_global_scale else None
    values, scale = numerics.quantize_nvfp4(x, g)
    once = numerics.dequantize_nvfp4(values, scale, g)
    again = numerics.quantize_nvfp4(once, g)
    assert same(again[0], values) and same(again[1], scale)


@fuzz
@given(st.integers(0, 2**32), st.sampled_from(FORMATS), st.integers(-3, 3))
def test_quantize_commutes_with_powers_of_two(seed, name, shift):
    x = randn(2, 64, seed=seed)
    factor = 2.0**shift
    scaled, plain = (dequantize(name, *quantize(name, v)) for v in (x * factor, x))
    assert same(scaled, plain * factor)


@fuzz
@given(st.integers(0, 2**32), st.sampled_from(FORMATS))
def test_quantize_is_odd(seed, name):
    x = randn(2, 64, seed=seed)
    (values, scale), (negative, same_scale) = quantize(name, x), quantize(name, -x)
    assert same(scale, same_scale)
    assert torch.equal(negative.view(U8), values.view(U8) ^ (0x80 if name == "mxfp8" else 0x88))


# nvfp4 factors


def test_nvfp4_global_scale_fills_the_range():
    x = randn(4, 5, 64) * torch.tensor([1e-6, 1.0, 1e3, 1e30])[:, None, None]
    for g, peak in (
        (numerics.nvfp4_global_scale(x), x.abs().amax()),
        (numerics.nvfp4_global_scale(x, (-2, -1)), x.abs().amax((1, 2))),
        (numerics.nvfp4_global_scale(x, -1), x.abs().amax(-1)),
    ):
        assert g.dtype == F32 and g.shape == peak.shape
        torch.testing.assert_close(g * peak, torch.full_like(g, 2688.0))
    _, scale = numerics.quantize_nvfp4(x, numerics.nvfp4_global_scale(x, (-2, -1)))
    assert torch.equal(scale.float().amax((1, 2)), torch.full((4,), 448.0))


def test_nvfp4_global_scale_degenerate():
    x = torch.stack([torch.full((2, 16), v) for v in (0.0, 1e-45, 1e-38, -3.4e38, -INF, NAN)])
    g = numerics.nvfp4_global_scale(x, (-2, -1))
    assert g[0] == 1 and g[1] == 2.0**126 and g[5].isnan()
    assert (g[:5] > 0).all() and g[:5].isfinite().all() and (1 / g[:5]).isfinite().all()
    assert numerics.nvfp4_global_scale(torch.zeros(3, 16)) == 1
    assert numerics.nvfp4_global_scale(torch.zeros(0, 16)) == 1
    assert numerics.nvfp4_global_scale(torch.zeros(3, 0, 16), (-2, -1)).tolist() == [1, 1, 1]
    values, scale = numerics.quantize_nvfp4(x[:3], g[:3])
    restored = numerics.dequantize_nvfp4(values, scale, g[:3])
    torch.testing.assert_close(restored[2], x[2], rtol=0.01, atol=0)
    assert restored[0].count_nonzero() == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_nvfp4_global_scale_dtypes(dtype):
    x = randn(3, 32).to(dtype)
    assert same(numerics.nvfp4_global_scale(x), numerics.nvfp4_global_scale(x.float()))


def test_nvfp4_global_scale_per_expert_equals_single_experts():
    x = randn(3, 4, 64) * torch.tensor([0.01, 1.0, 50.0])[:, None, None]
    g = numerics.nvfp4_global_scale(x, (-2, -1))
    values, scale = numerics.quantize_nvfp4(x, g)
    restored = numerics.dequantize_nvfp4(values, scale, g)
    for e in range(3):
        for single in (g[e], g[e : e + 1], g[e].item()):
            one = numerics.quantize_nvfp4(x[e], single)
            assert same(values[e], one[0]) and same(scale[e], one[1])
            assert same(numerics.dequantize_nvfp4(*one, single), restored[e])
    assert ((restored - x).square().mean((1, 2)) / x.square().mean((1, 2))).sqrt().max() < 0.12


def test_nvfp4_global_scale_per_row():
    x = randn(2, 3, 32)
    g = numerics.nvfp4_global_scale(x, -1)
    values, scale = numerics.quantize_nvfp4(x, g)
    one = numerics.quantize_nvfp4(x[1, 2], g[1, 2])
    assert same(values[1, 2], one[0]) and same(scale[1, 2], one[1])


def test_nvfp4_matches_scalar_with_global_scale():
    x, g = randn(4, 16), 37.25
    values, scale = numerics.quantize_nvfp4(x, g)
    for row in range(4):
        codes, expected = scalar_block("nvfp4", x[row].tolist(), g)
        assert scale[row].item() == expected
        assert numerics.unpack_e2m1(values[row]).tolist() == codes
    expected = numerics.decode_e2m1(numerics.unpack_e2m1(values)) * scale.float() / g
    assert same(numerics.dequantize_nvfp4(values, scale, g), expected)


def test_nvfp4_saturates():
    """Without a factor 6 * 448 is the largest value."""
    x = torch.full((1, 16), -1e6)
    values, scale = numerics.quantize_nvfp4(x)
    assert scale.item() == 448 and (numerics.dequantize_nvfp4(values, scale) == -2688).all()


def test_quantize_nvfp4_per_token():
    x = blockwise_exponents(randn(6, 64), 16, -3, 3) * torch.tensor([1e-30, 1e-3, 1, 50, 1e20, 0])[:, None]
    values, scale, per_token = numerics.quantize_nvfp4_per_token(x)
    assert values.shape == (6, 32) and scale.shape == (6, 4) and per_token.shape == (6,) and per_token.dtype == F32
    assert same(per_token, x.abs().amax(-1) / torch.tensor(2688.0))
    p = per_token[:5, None, None]
    blocks = x[:5].unflatten(-1, (4, 16))
    s = numerics.encode_e4m3(blocks.abs().amax(-1, keepdim=True) / torch.tensor(6.0) / p).float()
    assert same(scale[:5].float(), s[..., 0]) and torch.equal(s.amax((1, 2)), torch.full((5,), 448.0))
    assert same(numerics.unpack_e2m1(values[:5]), numerics.encode_e2m1(blocks / (s * p)).flatten(1))
    restored = numerics.dequantize_nvfp4(values, scale) * per_token[:, None]
    error = (restored - x)[:5].double().norm(dim=-1) / x[:5].double().norm(dim=-1)
    assert (error < 0.12).all() and (error > 0.03).all()


def test_quantize_nvfp4_per_token_scale_is_a_true_quotient():
    """Not amax times a rounded 1 / 2688, which is an ulp off for many."""
    x = randn(1000, 16)
    expected = [amax / 2688 for amax in x.abs().amax(-1).tolist()]  # in float64; rounding twice never shows here
    assert same(numerics.quantize_nvfp4_per_token(x)[2], torch.tensor(expected))


def test_quantize_nvfp4_per_token_zero_row():
    x = randn(3, 32)
    x[1] = 0
    values, scale, per_token = numerics.quantize_nvfp4_per_token(x)
    assert values[1].count_nonzero() == scale[1].view(U8).count_nonzero() == per_token[1].count_nonzero() == 0
    tiny = numerics.quantize_nvfp4_per_token(torch.full((1, 16), 1e-45))
    assert (numerics.dequantize_nvfp4(*tiny[:2]) * tiny[2]).tolist() == [[0.0] * 16]


def test_quantize_nvfp4_per_token_shapes():
    for shape in [(16,), (2, 3, 32), (0, 32)]:
        values, scale, per_token = numerics.quantize_nvfp4_per_token(randn(*shape).bfloat16())
        assert values.shape == (*shape[:-1], shape[-1] // 2) and per_token.shape == shape[:-1]
        assert scale.shape == (*shape[:-1], shape[-1] // 16)


@fuzz
@given(st.integers(0, 2**32), st.integers(-60, 60))
def test_quantize_nvfp4_per_token_is_idempotent(seed, exponent):
    x = torch.ldexp(randn(3, 64, seed=seed), torch.tensor(exponent))
    values, scale, per_token = numerics.quantize_nvfp4_per_token(x)
    again = numerics.quantize_nvfp4_per_token(numerics.dequantize_nvfp4(values, scale) * per_token[:, None])
    assert same(again[0], values) and same(again[1], scale)
    torch.testing.assert_close(again[2], per_token, rtol=3e-7, atol=0)  # 2688 p / 2688 may be an ulp off p


# CUDA gives the same bits


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [*FORMATS, "nvfp4_per_token"])
def test_quantize_cuda_matches_cpu(name, dtype, monkeypatch):
    monkeypatch.setattr(numerics, "CUDA_PART", 1 << 16)
    x = blockwise_exponents(randn(512, 1024), 32, -12, 4).to(dtype)
    on_cpu, on_cuda = quantize(name, x), quantize(name, x.cuda())
    assert all(same(a.cpu(), b) for a, b in zip(on_cuda, on_cpu, strict=True))
    name = name.removesuffix("_per_token")
    assert same(dequantize(name, *on_cuda[:2]).cpu(), dequantize(name, *on_cpu[:2]))


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
