# SPDX-License-Identifier: Apache-2.0
"""requantize for the fp8 GEMM: z (bf16) -> mxfp8 (operator-semantics 5) -> e4m3 operand of gemm2, in place.

    grid     a warp a permuted row, four a CTA; padding rows return
    load     a lane takes the 32 columns of one scale block: four 16-byte chunks, quad exchange to column order
    first    largest value of the row and of its smallest block that is not zero: the row's base and the window
             (gemm_fp8.py), as gather_fp8 does for the tokens
    second   quantise a block, fold its exponent relative to the base or not, store in K order

A row of z is 2 * padded I bytes; the operand takes the first half of them. A warp reads all 2048 bytes of 1024 columns before
it writes 1024 bytes of them, so it overwrites nothing that it still needs.
"""

from tvm.script import tirx as T

from tvmmoe.kernels import numerics
from tvmmoe.kernels.sm90a import intrinsics_fp8 as fp8
from tvmmoe.kernels.sm90a.gather import exchange_quad
from tvmmoe.kernels.sm90a.gather_fp8 import INSIDE, OUTSIDE, row_factor, write_byte, write_quarters
from tvmmoe.kernels.sm90a.layout import padded
from tvmmoe.kernels.sm90a.requantize import WARP_COLUMNS, amax_bits, is_live, kernel_over_rows, warp_block
from tvmmoe.kernels.sm90a.trace import (
    address,
    assign,
    bits,
    cast,
    for_,
    if_,
    let,
    ptx,
    regs,
    scalar,
    store,
    store_to,
    u32,
    warp_max_s32,
    warp_min_s32,
)  # fmt: skip

INFINITY_BITS = 0x7F800000


def _scale_of(amax_pattern):
    """The scale of a block whose largest value has this pattern, as float32."""
    return let(numerics.ue8m0_scale_ceil(let(bits(amax_pattern, "float32") / T.float32(448))))


def _byte_of(scale):
    """Its ue8m0 byte."""
    return let(bits(scale, "int32") >> 23)


def _quantized(values, byte):
    """Two quarters of four words: e4m3 of value / 2^(byte - 127)."""
    # z is a bf16, so the byte is at most 247 and the reciprocal a normal number; of a NaN it does not matter.
    reciprocal = let(fp8.power_of_two(254 - T.min(byte, T.int32(253))))
    quarters = [regs(4, "uint32") for _ in range(2)]
    for i in range(8):
        halves = []
        for first in (4 * i, 4 * i + 2):
            pair = scalar("uint16")
            ptx["cvt.rn.satfinite.e4m3x2.f32"](pair, values[first + 1] * reciprocal, values[first] * reciprocal)
            halves.append(let(cast(pair, "uint32")))
        store(quarters[i // 4], halves[0] | (halves[1] << u32(16)), i % 4)
    return quarters


def _state(base, largest, smallest):
    """INSIDE, OUTSIDE or 0 for zeros, from the patterns of the largest value and of the smallest block that is not zero."""
    limit = let(T.float32(fp8.MIN_FOLDED) * fp8.power_of_two(base))
    lost = bits(smallest, "float32") < limit
    in_range = T.And(base >= fp8.MIN_BASE, base <= fp8.MAX_BASE)
    state = T.Select(T.And(in_range, T.Not(lost)), T.int32(INSIDE), T.int32(OUTSIDE))
    return let(T.Select(largest == 0, T.int32(0), state))


def requantize_fp8(a, tile_m: int) -> None:
    """Emit the kernel."""
    width = padded(a.intermediate_size)
    with kernel_over_rows(a, "requantize_fp8", tile_m, 1, 32) as (thread, row, _, rows):
        with if_(is_live(row, tile_m, rows)):
            _requantize_row(a, thread.lane, let(cast(row, "int64")), width)


def _requantize_row(a, lane, row, width) -> None:
    rounds = let(cast((width + WARP_COLUMNS - 1) // WARP_COLUMNS, "int32"))
    first = let(row * width)  # of the row in z
    largest, smallest = scalar("int32", T.int32(0)), scalar("int32", T.int32(INFINITY_BITS))
    with for_(rounds) as i:
        amax = amax_bits(warp_block(a, row, i, lane).load(), 0, 32)
        assign(largest, T.max(largest, amax))
        assign(smallest, T.Select(amax > 0, T.min(smallest, amax), smallest))
    assign(largest, warp_max_s32(largest))
    assign(smallest, warp_min_s32(smallest))
    base = _byte_of(_scale_of(largest))
    state = _state(base, largest, smallest)
    with if_(lane == 0):
        store_to("float32", address(a.ws["row_scale"], row * 4), row_factor(base, state))
    with for_(rounds) as i:
        columns = warp_block(a, row, i, lane)
        values = columns.load()
        byte = _byte_of(_scale_of(amax_bits(values, 0, 32)))
        quarters = _quantized(values, byte)
        is_outside = state == OUTSIDE
        shift = let(T.Select(is_outside, T.int32(0), T.max(T.min(base - byte, T.int32(15)), T.int32(0))))
        for words in quarters:
            fp8.fold(words, shift)
            exchange_quad(words, lane)
        block = let(i * (WARP_COLUMNS // 32) + lane)
        with if_(columns.is_inside):
            write_quarters(let(a.ws["z"] + first * 2), block, quarters)
            offset = row * (width // 32) + cast(block, "int64")
            write_byte(address(a.ws["z_scale"], offset), let(T.Select(is_outside, byte, base)))
