# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments of tvmmoe.numerics: one line with the argument, what it is and what was expected."""

import pytest
import torch
from test_block_formats import BLOCK, FORMATS, dequantize, quantize

from tvmmoe import numerics
from tvmmoe.errors import ArgumentError, DtypeError, ShapeError, TvmMoeError

U8, E4M3 = torch.uint8, torch.float8_e4m3fn
E8M0 = getattr(torch, "float8_e8m0fnu", None)


def u8(*shape):
    return torch.zeros(shape, dtype=U8)


def f32(*shape):
    return torch.zeros(shape)


ERRORS = {
    "encode_e2m1 int": (lambda: numerics.encode_e2m1(u8(2)), DtypeError, "x: got uint8 [2]"),
    "encode_e2m1 float64": (lambda: numerics.encode_e2m1(f32(2).double()), DtypeError, "x: got float64 [2]"),
    "encode_e4m3 float64": (lambda: numerics.encode_e4m3(f32(2).double()), DtypeError, "x: got float64 [2]"),
    "ue8m0_ceil": (lambda: numerics.ue8m0_ceil(u8(2)), DtypeError, "x: got uint8 [2]"),
    "decode_e2m1": (lambda: numerics.decode_e2m1(f32(2)), DtypeError, "codes: got float32 [2], expected uint8"),
    "decode_e4m3": (lambda: numerics.decode_e4m3(f32(2)), DtypeError, "codes: got float32 [2]"),
    "decode_ue8m0": (lambda: numerics.decode_ue8m0(f32(2)), DtypeError, "codes: got float32 [2]"),
    "pack dtype": (lambda: numerics.pack_e2m1(f32(2)), DtypeError, "codes: got float32 [2]"),
    "pack odd": (lambda: numerics.pack_e2m1(u8(2, 3)), ShapeError, "codes: got uint8 [2, 3], expected a last dim"),
    "pack scalar": (lambda: numerics.pack_e2m1(u8()), ShapeError, "codes: got uint8 []"),
    "unpack dtype": (lambda: numerics.unpack_e2m1(f32(2)), DtypeError, "packed: got float32 [2]"),
    "unpack scalar": (lambda: numerics.unpack_e2m1(u8()), ShapeError, "packed: got uint8 []"),
    "global_scale dtype": (lambda: numerics.nvfp4_global_scale(u8(2)), DtypeError, "x: got uint8 [2]"),
    "list": (
        lambda: numerics.quantize_mxfp4([1.0]),
        DtypeError,
        "x: got list, expected float32 or bfloat16 or float16",
    ),
    "factor dtype": (
        lambda: numerics.quantize_nvfp4(f32(2, 16), f32(1).double()),
        DtypeError,
        "global_scale: got float64 [1], expected float32",
    ),
    "factor shape": (
        lambda: numerics.quantize_nvfp4(f32(3, 2, 16), f32(2)),
        ShapeError,
        "global_scale: got float32 [2], expected one element or leading dimensions of float32 [3, 2, 16]",
    ),
    "factor per column": (lambda: numerics.quantize_nvfp4(f32(2, 16), f32(2, 16)), ShapeError, "global_scale: got"),
    "factor device": (
        lambda: numerics.quantize_nvfp4(f32(2, 16), f32(2).to("meta")),
        ArgumentError,
        "global_scale: got a tensor on meta, expected cpu",
    ),
    "dequantize factor": (
        lambda: numerics.dequantize_nvfp4(u8(3, 2, 8), u8(3, 2, 1), f32(2)),
        ShapeError,
        "global_scale: got float32 [2]",
    ),
    "scale device": (
        lambda: numerics.dequantize_mxfp4(u8(2, 16), u8(2, 1).to("meta")),
        ArgumentError,
        "block_scale: got a tensor on meta, expected cpu",
    ),
    "mxfp8 values": (
        lambda: numerics.dequantize_mxfp8(u8(2, 32), u8(2, 1)),
        DtypeError,
        "values: got uint8 [2, 32], expected float8_e4m3fn",
    ),
    "mxfp8 columns": (
        lambda: numerics.dequantize_mxfp8(u8(2, 48).view(E4M3), u8(2, 1)),
        ShapeError,
        "values: got float8_e4m3fn [2, 48], expected a last dimension that is a multiple of 32",
    ),
}


def check_error(call, kind, text):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(text) and ", expected " in message and "\n" not in message
    assert isinstance(caught.value, TvmMoeError)


@pytest.mark.parametrize("label", ERRORS)
def test_errors(label):
    check_error(*ERRORS[label])


@pytest.mark.parametrize("name", [*FORMATS, "nvfp4_per_token"])
def test_quantize_errors(name):
    block = BLOCK[name.removesuffix("_per_token")]
    multiple = f"expected a last dimension that is a multiple of {block}"
    check_error(lambda: quantize(name, f32(2, 64).double()), DtypeError, "x: got float64 [2, 64]")
    for shape in [(2, block + 8), (2, 0), ()]:
        check_error(
            lambda shape=shape: quantize(name, f32(*shape)), ShapeError, f"x: got float32 {list(shape)}, {multiple}"
        )


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_dequantize_errors(name):
    block = BLOCK[name]
    columns = 64 // block
    check_error(lambda: dequantize(name, f32(2, 32), u8(2, columns)), DtypeError, "values: got float32 [2, 32]")
    check_error(lambda: dequantize(name, u8(2, 32), f32(2, columns)), DtypeError, "block_scale: got float32")
    check_error(lambda: dequantize(name, u8(2, 12), u8(2, 1)), ShapeError, "values: got uint8 [2, 12], expected a last")
    for shape in [(2, columns + 1), (3, columns), (2 * columns,), (1, 2, columns)]:
        text = f"block_scale: got uint8 {list(shape)}, expected [2, {columns}] (values [2, 32], blocks of {block}"
        check_error(lambda shape=shape: dequantize(name, u8(2, 32), u8(*shape)), ShapeError, text)
