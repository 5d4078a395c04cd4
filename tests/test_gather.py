# SPDX-License-Identifier: Apache-2.0
"""Hopper's gather kernel, its generated code run on a CPU: every element under every block scale, bit for bit."""

import functools
import importlib.util

import pytest
import torch
from test_requantize import TILE_M, in_column_order, kernel_alone

from tvmmoe import abi
from tvmmoe.config import ActivationFormat
from tvmmoe.kernels.sm90a import layout
from tvmmoe.numerics import E2M1_VALUES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="needs tvm to build kernels")

SYMBOL = "gather_moe_m8"
TOP_K = 2
# Of each token's slots; another rank has three.
ROWS = torch.tensor([[5, 0], [3, -1], [8, 1], [2, 6], [4, 17], [-1, 16], [9, 10], [11, 12], [-1, 13]])


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("simulated_gather")


@functools.cache
def simulated(form: ActivationFormat, folder):
    from tvmmoe.kernels.sm90a.gather import gather

    return kernel_alone(SYMBOL, lambda a: gather(a, form), folder / f"{form.name}.so")


def run(form: ActivationFormat, hidden_states: torch.Tensor, scale: torch.Tensor | None, hidden_size: int, folder):
    """bfloat16 [slots, H] in column order of slots that have a row, and their tokens; other rows must be as they were."""
    sizes = dict(num_tokens=len(ROWS), top_k=TOP_K, hidden_size=hidden_size, intermediate_size=32, local_num_experts=1)
    slices, num_bytes = layout.slices(*sizes.values(), TILE_M)
    workspace = torch.full((num_bytes,), 0xA5, dtype=torch.uint8)

    def piece(name, dtype):
        offset, count = slices[name]
        return workspace[offset : offset + count].view(dtype)

    piece("expanded_idx_to_permuted_idx", torch.int32)[:] = ROWS.flatten()
    pointers = dict.fromkeys(abi.POINTERS, 0)
    pointers |= dict(hidden_states=hidden_states.data_ptr(), hidden_states_scale=0 if scale is None else scale.data_ptr())
    simulated(form, folder)(workspace, *pointers.values(), *[sizes.get(name, 0) for name in abi.INTS], 1.0)
    width = layout.padded(hidden_size)
    x = piece("x", torch.bfloat16).view(-1, width)
    rows = ROWS[ROWS >= 0]
    of_nobody = torch.ones(len(x), dtype=torch.bool)
    of_nobody[rows] = False
    assert (x[of_nobody].view(torch.uint8) == 0xA5).all(), "a row that no slot has was written"
    columns = in_column_order(x[rows])
    assert not columns[:, hidden_size:].any(), "columns past H are not zero"
    return columns[:, :hidden_size], torch.nonzero(ROWS >= 0)[:, 0]


def assert_equal_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """bfloat16 alike, signs of zeros too; any NaN is as good as another."""
    is_nan = expected.isnan()
    assert torch.equal(actual.isnan(), is_nan)
    assert torch.equal(actual[~is_nan].view(torch.int16), expected[~is_nan].view(torch.int16))


@pytest.mark.parametrize("hidden_size", [1024, 1000])  # whole K blocks, and not
def test_bf16(hidden_size, folder):
    generator = torch.Generator().manual_seed(hidden_size)
    bits = torch.randint(0, 1 << 16, (len(ROWS), hidden_size), generator=generator, dtype=torch.int32).to(torch.int16)
    actual, tokens = run(ActivationFormat.bf16, bits, None, hidden_size, folder)
    assert torch.equal(actual.view(torch.int16), bits[tokens])


@pytest.mark.parametrize("num_blocks", [256, 251])  # of 32 columns
def test_mxfp8(num_blocks, folder):
    generator = torch.Generator().manual_seed(num_blocks)
    # Each block has all elements in some order over the first eight tokens; NaN, two of them, are once more in the last one.
    order = torch.rand(num_blocks, 256, generator=generator).argsort(-1).to(torch.uint8)
    elements = torch.zeros(len(ROWS), num_blocks, 32, dtype=torch.uint8)
    elements[:8] = order.view(num_blocks, 8, 32).transpose(0, 1)
    is_nan = torch.rand(num_blocks, 32, generator=generator) < 0.3
    elements[8] = torch.where(is_nan, order[:, :32] | 0x7F, order[:, :32])
    scale = torch.randperm(256, generator=generator)[:num_blocks].to(torch.uint8).repeat(len(ROWS), 1)
    actual, tokens = run(ActivationFormat.mxfp8, elements, scale, 32 * num_blocks, folder)
    factors = torch.where(scale == 255, torch.nan, torch.ldexp(torch.ones(scale.shape), scale.int() - 127))
    expected = (elements.view(torch.float8_e4m3fn).float() * factors[..., None]).bfloat16().flatten(1)
    assert factors[scale == 0].eq(2.0**-127).all() and set(tokens.tolist()) == set(range(len(ROWS)))
    assert_equal_bits(actual, expected[tokens])


@pytest.mark.parametrize("num_blocks", [256, 251])  # of 16 columns
def test_nvfp4(num_blocks, folder):
    generator = torch.Generator().manual_seed(num_blocks)
    codes = torch.rand((len(ROWS), num_blocks, 16), generator=generator).argsort(-1)  # all of them, in each block
    scale = torch.randperm(256, generator=generator)[:num_blocks].to(torch.uint8).repeat(len(ROWS), 1)
    packed = (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8).contiguous()
    actual, tokens = run(ActivationFormat.nvfp4, packed, scale, 16 * num_blocks, folder)
    expected = (torch.tensor(E2M1_VALUES)[codes] * scale.view(torch.float8_e4m3fn).float()[..., None]).bfloat16().flatten(1)
    assert_equal_bits(actual, expected[tokens])
