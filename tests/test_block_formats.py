# SPDX-License-Identifier: Apache-2.0
"""Block formats against scalar arithmetic written from their formulas, and by bounds and properties."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_numerics import E2M1, E4M3_MAGNITUDES, FLOATS, INF, NAN, VIEWS, fuzz, nearest_code, probes, randn, same

from tvmmoe import numerics

U8, F32, E4M3 = torch.uint8, torch.float32, torch.float8_e4m3fn
FORMATS = ["nvfp4", "mxfp4", "mxfp8"]
BLOCK = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}


def quantize(name, x):
    return getattr(numerics, f"quantize_{name}")(x)


def dequantize(name, *tensors):
    return getattr(numerics, f"dequantize_{name}")(*tensors)


def blockwise_exponents(x, block, low=-8, high=8):
    """Every block of a row times another power of two."""
    blocks = x.unflatten(-1, (-1, block))
    exponents = (torch.arange(blocks.shape[:-1].numel()) * 5 % (high - low) + low).view(*blocks.shape[:-1], 1)
    return torch.ldexp(blocks, exponents).flatten(-2)


# What one block becomes, from the formulas


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
