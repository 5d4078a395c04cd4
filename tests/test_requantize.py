# SPDX-License-Identifier: Apache-2.0
"""Hopper's requantise kernel, its generated code run on a CPU, beside the reference: bit for bit, over all of bfloat16."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tvmmoe import abi, numerics
from tvmmoe.config import ActivationFormat, WeightFormat
from tvmmoe.kernels.sm90a import layout
from tvmmoe.kernels.sm120a import layout as blackwell
from tvmmoe.reference import requantize_ref

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="needs tvm to build kernels")

SYMBOL, TILE_M = "requantize_moe_m8", 8
SIZES = dict(num_tokens=64, top_k=1, hidden_size=128, intermediate_size=1120, local_num_experts=4)
ALL_LOCAL = dict(num_experts=SIZES["local_num_experts"])
ROWS = torch.tensor([8, 8, 3, 1, 8, 5, 8])  # of each live tile; the list has room for more
MXFP8, NVFP4 = ActivationFormat.mxfp8, ActivationFormat.nvfp4
MODES = {"mxfp8": (MXFP8, False), "nvfp4": (NVFP4, False), "nvfp4_per_token": (NVFP4, True)}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("simulated_requantize")


def kernel_alone(symbol: str, emit: Callable[[Any], None], path: Path) -> Callable[..., None]:
    """What ``emit`` emits as a packed function by the operator's calling convention, compiled for this CPU."""
    import tvm_ffi

    from tvmmoe.kernels.sm90a import build, simulate
    from tvmmoe.kernels.sm90a.call import Arguments, host_function
    from tvmmoe.kernels.sm90a.operator import LAUNCH_PARAMS
    from tvmmoe.kernels.sm120a.simulate import compile_so

    make = {symbol: lambda: host_function(symbol, LAUNCH_PARAMS, lambda: Arguments(TILE_M, layout.slices), emit)}
    compile_so(simulate.host_source(build.packed_source(make)), path)
    return tvm_ffi.load_module(str(path))[symbol]


@functools.cache
def simulated(mode: str, folder):
    from tvmmoe.kernels.sm90a.requantize import requantize

    return kernel_alone(SYMBOL, lambda a: requantize(a, *MODES[mode], TILE_M), folder / f"{mode}.so")


def in_column_order(rows: torch.Tensor) -> torch.Tensor:
    """Rows of whole K blocks, which kernels store in K order."""
    positions = torch.tensor([layout.k_of_position(i) for i in range(layout.K_BLOCK)]).argsort()
    return rows.unflatten(1, (-1, layout.K_BLOCK))[..., positions].flatten(1)


def with_tiles(slices, num_bytes: int) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
    """A poisoned workspace whose list of tiles is ROWS, and ``piece(name, dtype)`` of it."""
    workspace = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)

    def piece(name, dtype):
        offset, count = slices[name]
        return workspace[offset : offset + count].view(dtype)

    piece("num_tiles", torch.int32).fill_(len(ROWS))
    piece("tile_rows", torch.int32)[: len(ROWS)] = ROWS
    return workspace, piece


def run(mode: str, z: torch.Tensor, folder) -> tuple[torch.Tensor, torch.Tensor]:
    """(values, row_scale) of bfloat16 rows [tiles * 8, I]; only live rows may change."""
    slices, num_bytes = layout.slices(*SIZES.values(), TILE_M)
    workspace, piece = with_tiles(slices, num_bytes)
    width = layout.padded(z.shape[1])
    order = torch.tensor([layout.k_of_position(i) for i in range(128)])
    operand = piece("z", torch.bfloat16).view(-1, width)
    columns = torch.zeros(len(z), width, dtype=torch.bfloat16)
    columns[:, : z.shape[1]] = z
    operand[: len(z)] = columns.unflatten(1, (-1, 128))[..., order].flatten(1)
    before = operand.clone()
    ints = [(SIZES | ALL_LOCAL).get(name, 0) for name in abi.INTS]
    simulated(mode, folder)(workspace, *[0] * len(abi.POINTERS), *ints, 1.0)
    live = live_rows()
    dead = torch.ones(len(operand), dtype=torch.bool)
    dead[: len(z)] = ~live
    assert torch.equal(operand[dead].view(torch.int16), before[dead].view(torch.int16)), "a row of padding was written"
    values = in_column_order(operand[: len(z)])
    padding = values[live, z.shape[1] :]
    assert not padding.nan_to_num(0).any(), "columns past I"  # NaN in a row of NaN, whose result is NaN in any case
    return values[live, : z.shape[1]], piece("row_scale", torch.float32)[: len(z)][live]


def live_rows() -> torch.Tensor:
    return (torch.arange(TILE_M) < ROWS[:, None]).flatten()


def patterns(generator: torch.Generator, shape) -> torch.Tensor:
    """Any finite bfloat16, all exponents alike."""
    bits = torch.randint(0, 1 << 16, shape, generator=generator, dtype=torch.int32)
    bits = torch.where((bits & 0x7F80) == 0x7F80, bits ^ 0x4000, bits)
    return bits.to(torch.int16).view(torch.bfloat16)


def near_ties(generator: torch.Generator, shape) -> torch.Tensor:
    """Eighths of a power of two up to 7.5, whose quotients by small scales tie between neighbours."""
    eighths = torch.randint(-60, 61, shape, generator=generator).float() / 8
    exponents = torch.randint(-6, 7, (shape[0], 1), generator=generator)
    return (eighths * 2.0**exponents).bfloat16()


def blocks_of_one_exponent(generator: torch.Generator, shape) -> torch.Tensor:
    """Normal values, every block of 16 with an exponent of its own; some blocks are zeros."""
    values = torch.randn(shape, generator=generator).unflatten(1, (-1, 16))
    exponents = torch.randint(-100, 100, (*values.shape[:2], 1), generator=generator)
    return (values * 2.0**exponents * (torch.rand(exponents.shape, generator=generator) > 0.1)).flatten(1).bfloat16()


INPUTS = {f.__name__: f for f in (patterns, near_ties, blocks_of_one_exponent)}


@functools.cache
def simulated_on_blackwell(weight_format: WeightFormat, folder):
    """The kernel that sm120a and sm100a share."""
    import tvm_ffi

    from tvmmoe.kernels.sm120a import build, operator, simulate
    from tvmmoe.kernels.sm120a.requantize import requantize

    config, path = operator.config(weight_format, TILE_M), folder / f"blackwell_{weight_format.name}.so"
    make = {SYMBOL: lambda: operator.function_of(SYMBOL, config, lambda a: requantize(a, weight_format, TILE_M))}
    simulate.compile_so(simulate.host_source(build.packed_source(make)), path)
    return tvm_ffi.load_module(str(path))[SYMBOL]


def run_on_blackwell(mode: str, z: torch.Tensor, folder) -> tuple[torch.Tensor, torch.Tensor]:
    """What :func:`run` returns: codes and block scales of their own, decoded."""
    form, is_per_token = MODES[mode]
    weight_format = WeightFormat.mxfp4 if form is MXFP8 else WeightFormat.nvfp4
    slices, num_bytes = blackwell.slices(*SIZES.values(), TILE_M, weight_format)
    workspace, piece = with_tiles(slices, num_bytes)
    width, block = z.shape[1], weight_format.block_size
    piece("z", torch.bfloat16)[: z.numel()] = z.flatten()
    pointers = dict.fromkeys(abi.POINTERS, 0) | {"per_token_scale": workspace.data_ptr() if is_per_token else 0}
    ints = [(SIZES | ALL_LOCAL).get(name, 0) for name in abi.INTS]
    simulated_on_blackwell(weight_format, folder)(workspace, *pointers.values(), *ints, 1.0)
    live, per_byte = live_rows(), 1 if form is MXFP8 else 2
    codes = piece("z_value", torch.uint8).view(-1, width // per_byte)[: len(z)][live]
    scales = piece("z_scale", torch.uint8).view(-1, width // block)[: len(z)][live]
    if form is MXFP8:
        values = numerics.dequantize_mxfp8(codes.view(torch.float8_e4m3fn), scales)
    else:
        values = numerics.dequantize_nvfp4(codes, scales)
    return values, piece("row_scale", torch.float32)[: len(z)][live]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", INPUTS)
def test_blackwells_matches_reference_bit_for_bit(kind, mode, folder):
    """Also where a block or a row is zeros, or has a NaN: of codes that 0 / 0 would make, whole operators show little."""
    form, is_per_token = MODES[mode]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        z = INPUTS[kind](generator, (len(ROWS) * TILE_M, SIZES["intermediate_size"]))
        z[1], z[2, 16:64] = 0, 0
        if seed == 2:
            z[0, 37] = float("nan")
        values, row_scale = run_on_blackwell(mode, z, folder)
        expected, expected_scale = requantize_ref(z[live_rows()].float(), form, is_per_token=is_per_token)
        assert torch.equal(values.isnan(), expected.isnan())
        assert torch.equal(values.nan_to_num(), expected.nan_to_num())
        if is_per_token:
            assert torch.equal(row_scale.nan_to_num(), expected_scale.nan_to_num())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", INPUTS)
def test_matches_reference_bit_for_bit(kind, mode, folder):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        z = INPUTS[kind](generator, (len(ROWS) * TILE_M, SIZES["intermediate_size"]))
        z[1] = 0  # a row of zeros
        values, row_scale = run(mode, z, folder)
        form, is_per_token = MODES[mode]
        expected, expected_scale = requantize_ref(z[live_rows()].float(), form, is_per_token=is_per_token)
        assert torch.equal(values.float(), expected)
        if is_per_token:
            assert torch.equal(row_scale, expected_scale)


@pytest.mark.parametrize("mode", MODES)
def test_nan_spreads_over_its_block_alone(mode, folder):
    z = torch.randn(len(ROWS) * TILE_M, SIZES["intermediate_size"], generator=torch.Generator().manual_seed(7)).bfloat16()
    z[0, 37] = float("nan")
    values, _ = run(mode, z, folder)
    block = SIZES["intermediate_size"] if mode == "nvfp4_per_token" else 16 if mode == "nvfp4" else 1
    is_nan = torch.zeros(values.shape, dtype=torch.bool)
    is_nan[0, 37 // block * block : (37 // block + 1) * block] = True
    assert torch.equal(values.isnan(), is_nan)


def test_nvfp4_quotients_over_all_scales(folder):
    """Every magnitude of bfloat16 from 2^-3 to 2^5 under every scale near it: a block is one value and its largest."""
    magnitudes = torch.arange(0x3E00, 0x4200, dtype=torch.int16).view(torch.bfloat16)
    per_row = SIZES["intermediate_size"] // 16
    for first in range(0, 1024, 16):
        z = torch.zeros(len(ROWS) * TILE_M, per_row, 16, dtype=torch.bfloat16)
        z[..., :15] = magnitudes[torch.randint(0, 1024, (*z.shape[:2], 15), generator=torch.Generator().manual_seed(first))]
        z[..., 15] = magnitudes[first + torch.arange(z.shape[0] * per_row).view(z.shape[:2]) % 16]
        values, _ = run("nvfp4", z.flatten(1), folder)
        assert torch.equal(values.float(), requantize_ref(z.flatten(1)[live_rows()].float(), NVFP4)[0])
