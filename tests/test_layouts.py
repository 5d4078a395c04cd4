# SPDX-License-Identifier: Apache-2.0
"""Layouts against the specification's index formulas, one element at a time, and each against its inverse."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvmmoe import layouts, numerics
from tvmmoe.errors import ArgumentError, DtypeError, ShapeError, TvmMoeError

U8 = torch.uint8
BYTES = [U8, torch.float8_e4m3fn] + [torch.float8_e8m0fnu] * hasattr(torch, "float8_e8m0fnu")
fuzz = settings(deadline=None, max_examples=40, derandomize=True)


def numbered(*shape, dtype=torch.int32):
    return torch.arange(torch.Size(shape).numel(), dtype=dtype).view(shape)


def random_bytes(*shape, seed=0):
    return torch.randint(256, shape, dtype=U8, generator=torch.Generator().manual_seed(seed))


def round_up(value, multiple):
    return (value + multiple - 1) // multiple * multiple


# The formulas, literally


def offset(r, c, padded_columns):
    return (
        (r // 128) * 128 * padded_columns + (c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + (c % 4)
    )  # fmt: skip


def source_row(n, rows, is_gated, epilogue_tile_m=128):
    if epilogue_tile_m == 128:
        m = 32 * (n // 32) + 4 * (n % 8) + (n % 32) // 8
    else:
        m = 16 * (n // 16) + 2 * (n % 8) + (n % 16) // 8
    return m // 2 + (m % 2) * (rows // 2) if is_gated else m


def swizzle(matrix):
    rows, columns = matrix.shape
    padded_columns = round_up(columns, 4)
    out = [0] * (round_up(rows, 128) * padded_columns)
    for r in range(rows):
        for c in range(columns):
            out[offset(r, c, padded_columns)] = matrix[r, c].item()
    return torch.tensor(out, dtype=matrix.dtype)


# 128x4


@pytest.mark.parametrize("rows, columns", [(1, 1), (128, 4), (96, 6), (130, 3), (256, 8), (384, 13)])
def test_to_128x4_matches_formula(rows, columns):
    matrix = random_bytes(rows, columns)
    swizzled = layouts.to_128x4(matrix)
    assert torch.equal(swizzled, swizzle(matrix))
    assert torch.equal(layouts.from_128x4(swizzle(matrix), rows, columns), matrix)


def test_to_128x4_drawing():
    """The tile in the module's docstring: rows 0, 32, 64, 96 in the first 16 bytes, then rows 1, 33, .."""
    tile = layouts.to_128x4(torch.arange(128, dtype=U8)[:, None].expand(128, 4))
    assert tile[0::4][:5].tolist() == [0, 32, 64, 96, 1]
    assert tile[-4:].tolist() == [127] * 4


def test_to_128x4_per_expert():
    scale = random_bytes(2, 3, 130, 5)
    swizzled = layouts.to_128x4(scale)
    assert swizzled.shape == (2, 3, 256 * 8)
    for i in range(2):
        for j in range(3):
            assert torch.equal(swizzled[i, j], swizzle(scale[i, j]))
    assert torch.equal(layouts.from_128x4(swizzled, 130, 5), scale)


@pytest.mark.parametrize("dtype", BYTES)
def test_128x4_keeps_dtype(dtype):
    scale = random_bytes(2, 40, 6)
    swizzled = layouts.to_128x4(scale.view(dtype))
    assert swizzled.dtype == dtype and torch.equal(swizzled.view(U8), layouts.to_128x4(scale))
    plain = layouts.from_128x4(swizzled, 40, 6)
    assert plain.dtype == dtype and torch.equal(plain.view(U8), scale)


@pytest.mark.parametrize("shape", [(3, 256 * 8), (3, 256, 8), (3, 2, 2, 32, 4, 4), (3, 1, 2048)])
def test_from_128x4_forms(shape):
    scale = random_bytes(3, 200, 7)
    plain = layouts.from_128x4(layouts.to_128x4(scale).view(shape), 200, 7)
    assert torch.equal(plain.view(3, 200, 7), scale)


def test_from_128x4_strided():
    scale = random_bytes(4, 128, 4)
    swizzled = layouts.to_128x4(scale).repeat(1, 2)[::2, :512]
    assert torch.equal(layouts.from_128x4(swizzled, 128, 4), scale[::2])
    assert torch.equal(layouts.to_128x4(scale.transpose(1, 2)), layouts.to_128x4(scale.transpose(1, 2).contiguous()))


def test_128x4_no_experts():
    assert layouts.to_128x4(random_bytes(0, 5, 3)).shape == (0, 512)
    assert layouts.from_128x4(random_bytes(0, 512), 5, 3).shape == (0, 5, 3)


@fuzz
@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 3))
def test_128x4_roundtrip(rows, columns, experts):
    scale = random_bytes(experts, rows, columns, seed=rows * columns)
    swizzled = layouts.to_128x4(scale)
    assert torch.equal(layouts.from_128x4(swizzled, rows, columns), scale)
    padding = swizzled.numel() - scale.numel()
    ones = layouts.to_128x4(torch.ones_like(scale))
    assert (ones == 0).sum() == padding  # every byte once, zeros elsewhere


# FlashInfer's rows


@pytest.mark.parametrize("epilogue_tile_m", [64, 128])
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("rows", [32, 64, 96, 512, 5376])
def test_flashinfer_row_permutation_matches_formula(rows, is_gated, epilogue_tile_m):
    src = layouts.flashinfer_row_permutation(rows, is_gated, epilogue_tile_m)
    assert src.tolist() == [source_row(n, rows, is_gated, epilogue_tile_m) for n in range(rows)]
    assert sorted(src.tolist()) == list(range(rows))


def test_flashinfer_row_permutation_drawing():
    """Numbers of the specification, not of its formula: S and S^-1 by hand, G's even rows up and odd rows gate."""
    plain = layouts.flashinfer_row_permutation(64, False)
    assert plain[:10].tolist() == [0, 4, 8, 12, 16, 20, 24, 28, 1, 5]
    assert plain[30:34].tolist() == [27, 31, 32, 36]
    inverse = torch.argsort(plain)
    assert inverse.tolist() == [32 * (m // 32) + 8 * (m % 4) + (m % 32) // 4 for m in range(64)]
    gated = layouts.flashinfer_row_permutation(64, True)
    assert gated[:9].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 32]


@pytest.mark.parametrize("dtype", [U8, *BYTES[1:], torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_gated", [False, True])
def test_shuffle_rows_matches_formula(is_gated, dtype):
    x = random_bytes(2, 64, 12).view(dtype)
    shuffled = layouts.shuffle_rows(x, is_gated)
    assert shuffled.dtype == dtype and shuffled.shape == x.shape
    for n in range(64):
        assert torch.equal(shuffled[:, n].view(U8), x[:, source_row(n, 64, is_gated)].view(U8))
    assert torch.equal(layouts.unshuffle_rows(shuffled, is_gated).view(U8), x.view(U8))


@fuzz
@given(st.integers(1, 20), st.booleans(), st.sampled_from([64, 128]), st.sampled_from([0, 1, -1]))
def test_shuffle_rows_inverse(blocks, is_gated, epilogue_tile_m, dim):
    rows = blocks * epilogue_tile_m // 4
    shape = [3, 3, 3]
    shape[dim] = rows
    x = numbered(*shape)
    shuffled = layouts.shuffle_rows(x, is_gated, dim, epilogue_tile_m)
    assert rows == 16 or not torch.equal(shuffled, x)  # 16 gated rows: S undoes G
    assert torch.equal(layouts.unshuffle_rows(shuffled, is_gated, dim, epilogue_tile_m), x)


def flashinfer_literal(weights, scale, bias, is_gated):
    """The specification's converter, run backwards one element at a time."""
    experts, rows, columns = scale.shape
    w, s, b = torch.empty_like(weights), torch.empty_like(scale), torch.empty_like(bias)
    for e in range(experts):
        for n in range(rows):
            src = source_row(n, rows, is_gated)
            w[e, n], b[e, n] = weights[e, src], bias[e, src]
            for c in range(columns):
                s[e].view(-1)[offset(n, c, columns)] = scale[e, src, c]
    return w, s, b


@pytest.mark.parametrize("is_gated", [False, True])
def test_flashinfer_conversion_matches_formula(is_gated):
    plain = random_bytes(2, 256, 64), random_bytes(2, 256, 8, seed=1), numbered(2, 256, dtype=torch.float32)
    expected = flashinfer_literal(*plain, is_gated)
    actual = layouts.to_flashinfer(*plain, is_gated=is_gated)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    restored = layouts.from_flashinfer(*expected, is_gated=is_gated)
    assert all(torch.equal(a, b) for a, b in zip(restored, plain, strict=True))


@pytest.mark.parametrize("dtype", BYTES)
def test_flashinfer_conversion_keeps_dtype_and_none(dtype):
    weights, scale = random_bytes(1, 128, 64), random_bytes(1, 128, 4).view(dtype)
    shuffled = layouts.to_flashinfer(weights, scale, is_gated=True)
    assert shuffled[1].dtype == dtype and shuffled[1].shape == scale.shape and shuffled[2] is None
    restored = layouts.from_flashinfer(*shuffled, is_gated=True)
    assert (
        torch.equal(restored[0], weights) and torch.equal(restored[1].view(U8), scale.view(U8)) and restored[2] is None
    )


@fuzz
@given(st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_flashinfer_conversion_roundtrip(experts, row_tiles, column_tiles, is_gated):
    rows, columns = 128 * row_tiles, 4 * column_tiles
    plain = random_bytes(experts, rows, 8 * columns), random_bytes(experts, rows, columns), numbered(experts, rows)
    there = layouts.to_flashinfer(*plain, is_gated=is_gated)
    back = layouts.from_flashinfer(*there, is_gated=is_gated)
    assert all(torch.equal(a, b) for a, b in zip(back, plain, strict=True))


def test_flashinfer_conversion_keeps_values():
    """Scales stay with their blocks: the weight that a shuffled row dequantises to is the source row's."""
    x = torch.randn(1, 128, 128, generator=torch.Generator().manual_seed(0))
    x = torch.ldexp(x.unflatten(-1, (4, 32)), torch.arange(512).view(1, 128, 4, 1) % 60 - 30).flatten(-2)
    plain = numerics.quantize_mxfp4(x)
    weights, swizzled, _ = layouts.to_flashinfer(*plain, is_gated=True)
    shuffled = numerics.dequantize_mxfp4(weights, layouts.from_128x4(swizzled, 128, 4))
    src = layouts.flashinfer_row_permutation(128, True)
    assert torch.equal(shuffled, numerics.dequantize_mxfp4(*plain)[:, src])


# gate and up


@pytest.mark.parametrize("tail", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [U8, *BYTES[1:], torch.float32])
def test_gate_up_orders(dtype, tail):
    half = 5
    x = random_bytes(2, 2 * half, *tail, 4).view(dtype) if tail else random_bytes(2, 8 * half).view(dtype)
    if not tail and dtype != torch.float32:
        x = x[:, : 2 * half]
    up, gate = x[:, :half], x[:, half:]
    gate_up = torch.cat((gate.view(U8), up.view(U8)), 1).view(dtype) if tail else torch.cat((gate, up), 1)
    given = {} if tail or dtype == torch.float32 else dict(dim=1)  # rows of one expert otherwise
    swapped = layouts.swap_gate_up(x, **given)
    assert swapped.dtype == dtype and torch.equal(swapped.view(U8), gate_up.view(U8))
    assert torch.equal(layouts.swap_gate_up(swapped, **given).view(U8), x.view(U8))
    mixed = layouts.interleave_gate_up(x, **given)
    assert mixed.dtype == dtype and mixed.shape == x.shape
    for i in range(half):
        assert torch.equal(mixed[:, 2 * i].contiguous().view(U8), gate[:, i].contiguous().view(U8))
        assert torch.equal(mixed[:, 2 * i + 1].contiguous().view(U8), up[:, i].contiguous().view(U8))
    assert torch.equal(layouts.deinterleave_gate_up(mixed, **given).view(U8), x.view(U8))


def test_gate_up_orders_by_number():
    x = torch.tensor([10, 11, 12, 20, 21, 22])  # up 10 .., gate 20 ..
    assert layouts.swap_gate_up(x, 0).tolist() == [20, 21, 22, 10, 11, 12]
    assert layouts.interleave_gate_up(x, 0).tolist() == [20, 10, 21, 11, 22, 12]
    assert layouts.deinterleave_gate_up(torch.tensor([20, 10, 21, 11, 22, 12]), 0).tolist() == x.tolist()


@fuzz
@given(st.integers(1, 40), st.sampled_from([0, 1, 2, -1]))
def test_gate_up_inverse(half, dim):
    shape = [3, 3, 3]
    shape[dim] = 2 * half
    x = numbered(*shape)
    assert torch.equal(layouts.swap_gate_up(layouts.swap_gate_up(x, dim), dim), x)
    assert torch.equal(layouts.deinterleave_gate_up(layouts.interleave_gate_up(x, dim), dim), x)
    assert torch.equal(layouts.interleave_gate_up(layouts.deinterleave_gate_up(x, dim), dim), x)
    assert not torch.equal(layouts.swap_gate_up(x, dim), x)


def test_results_do_not_alias():
    x = random_bytes(1, 128, 4)
    before = x.clone()
    results = [layouts.to_128x4(x), layouts.from_128x4(x, 128, 4), layouts.swap_gate_up(x)]
    results += [layouts.shuffle_rows(x, True), *layouts.to_flashinfer(x, x, is_gated=True)[:2]]
    for result in results:
        result.fill_(7)
    assert torch.equal(x, before)


# Errors


W, S, B = random_bytes(2, 128, 64), random_bytes(2, 128, 8), torch.zeros(2, 128)

ERRORS = {
    "to dtype": (lambda: layouts.to_128x4(B), DtypeError, "block_scale: got float32 [2, 128], expected uint8"),
    "to list": (lambda: layouts.to_128x4([1]), DtypeError, "block_scale: got list"),
    "to 1-D": (lambda: layouts.to_128x4(S[0, 0]), ShapeError, "block_scale: got uint8 [8], expected [..., rows, col"),
    "to no rows": (lambda: layouts.to_128x4(S[:, :0]), ShapeError, "block_scale: got uint8 [2, 0, 8], expected"),
    "from dtype": (lambda: layouts.from_128x4(B, 128, 4), DtypeError, "swizzled: got float32 [2, 128]"),
    "from rows": (lambda: layouts.from_128x4(S, 0, 4), ArgumentError, "rows: got 0, expected at least 1"),
    "from columns": (lambda: layouts.from_128x4(S, 1, -4), ArgumentError, "columns: got -4, expected at least 1"),
    "from size": (
        lambda: layouts.from_128x4(S, 130, 5),
        ShapeError,
        "swizzled: got uint8 [2, 128, 8], expected [..., 2048] or [..., 256, 8] (padded rows=130, columns=5)",
    ),
    "from unpadded": (lambda: layouts.from_128x4(S[:, :100], 100, 8), ShapeError, "swizzled: got uint8 [2, 100, 8]"),
    "rows": (
        lambda: layouts.flashinfer_row_permutation(48, False),
        ArgumentError,
        "rows: got 48, expected a multiple of 32 for epilogue_tile_m=128",
    ),
    "rows 0": (lambda: layouts.flashinfer_row_permutation(0, False), ArgumentError, "rows: got 0"),
    "tile": (
        lambda: layouts.flashinfer_row_permutation(64, False, 32),
        ArgumentError,
        "epilogue_tile_m: got 32, expected 64 or 128",
    ),
    "shuffle tile": (lambda: layouts.shuffle_rows(W, True, 1, 96), ArgumentError, "epilogue_tile_m: got 96"),
    "shuffle rows": (
        lambda: layouts.shuffle_rows(W[:, :40], True),
        ShapeError,
        "x: got uint8 [2, 40, 64], expected a multiple of 32 rows in dimension 1",
    ),
    "unshuffle rows": (lambda: layouts.unshuffle_rows(W[:, :40], False), ShapeError, "x: got uint8 [2, 40, 64]"),
    "shuffle list": (lambda: layouts.shuffle_rows([1], True), DtypeError, "x: got list, expected a tensor"),
    "dimension": (lambda: layouts.swap_gate_up(B[0]), ShapeError, "x: got float32 [128], expected rows in dimension 1"),
    "swap one expert": (
        lambda: layouts.swap_gate_up(W[0]),
        ShapeError,
        "x: got uint8 [128, 64], expected [local_num_experts, rows, columns], or dim=0 for the rows of one expert",
    ),
    "interleave one expert": (lambda: layouts.interleave_gate_up(S[0]), ShapeError, "x: got uint8 [128, 8], expected [local"),
    "deinterleave one": (lambda: layouts.deinterleave_gate_up(W[0]), ShapeError, "x: got uint8 [128, 64], expected [local"),
    "swap odd": (
        lambda: layouts.swap_gate_up(B[:, :5]),
        ShapeError,
        "x: got float32 [2, 5], expected a multiple of 2 rows in dimension 1",
    ),
    "interleave odd": (lambda: layouts.interleave_gate_up(B[:, :5]), ShapeError, "x: got float32 [2, 5]"),
    "deinterleave odd": (lambda: layouts.deinterleave_gate_up(B[:, :5]), ShapeError, "x: got float32 [2, 5]"),
    "no rows": (lambda: layouts.swap_gate_up(B[:, :0]), ShapeError, "x: got float32 [2, 0]"),
    "weights list": (lambda: layouts.to_flashinfer([1], S, is_gated=True), DtypeError, "weights: got list"),
    "weights 2-D": (
        lambda: layouts.to_flashinfer(W[0], S[0], is_gated=True),
        ShapeError,
        "weights: got uint8 [128, 64], expected [local_num_experts, rows, columns/2]",
    ),
    "weights rows": (
        lambda: layouts.to_flashinfer(W[:, :96], S[:, :96], is_gated=True),
        ShapeError,
        "weights: got uint8 [2, 96, 64], expected a multiple of 128 rows",
    ),
    "scale dtype": (lambda: layouts.to_flashinfer(W, S.float(), is_gated=True), DtypeError, "block_scale: got float32"),
    "scale rows": (
        lambda: layouts.from_flashinfer(W, S[:, :64], is_gated=True),
        ShapeError,
        "block_scale: got uint8 [2, 64, 8], expected [2, 128, a multiple of 4]",
    ),
    "scale columns": (
        lambda: layouts.to_flashinfer(W, S[..., :6], is_gated=True),
        ShapeError,
        "block_scale: got uint8",
    ),
    "scale flat": (
        lambda: layouts.from_flashinfer(W, S.flatten(1), is_gated=True),
        ShapeError,
        "block_scale: got uint8",
    ),
    "bias list": (lambda: layouts.to_flashinfer(W, S, [1], is_gated=True), DtypeError, "bias: got list"),
    "bias shape": (
        lambda: layouts.from_flashinfer(W, S, B[:, :64], is_gated=True),
        ShapeError,
        "bias: got float32 [2, 64], expected [2, 128]",
    ),
}


@pytest.mark.parametrize("label", ERRORS)
def test_errors(label):
    call, kind, text = ERRORS[label]
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(text) and ", expected " in message and "\n" not in message
    assert isinstance(caught.value, TvmMoeError)


@pytest.mark.gpu
def test_layouts_cuda_match_cpu():
    plain = random_bytes(2, 256, 64), random_bytes(2, 256, 8), numbered(2, 256, dtype=torch.float32)
    expected = layouts.to_flashinfer(*plain, is_gated=True)
    there = layouts.to_flashinfer(*(t.cuda() for t in plain), is_gated=True)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(there, expected, strict=True))
    back = layouts.from_flashinfer(*there, is_gated=True)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(back, plain, strict=True))
    for convert in (layouts.swap_gate_up, layouts.interleave_gate_up, layouts.deinterleave_gate_up):
        assert all(torch.equal(convert(t.cuda()).cpu(), convert(t)) for t in plain)
