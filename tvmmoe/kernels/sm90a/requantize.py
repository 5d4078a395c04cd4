# SPDX-License-Identifier: Apache-2.0
"""requantize: round z to the values of the activation format, in place, in bf16 (operator-semantics 5).

e2m1 * e4m3 and e4m3 * 2^k are bf16 numbers (from k = -124 on), so gemm2 multiplies exactly what the format would hold and
stays one kernel.

    grid     a quad of lanes a 128-block of a permuted row; nvfp4 with per-token scales: a warp a row, which first takes
             the row's amax. Rows of padding return
    load     a lane takes 32 columns, one or two scale blocks: four 16-byte chunks, quad exchange to column order
    work     amax of its blocks (32: mxfp8; 16: nvfp4), scale, round
    store    the same chunks in K order, of thin tiles as columns, too (thin_rows.py); the row's scale for gemm2 where there
             is one

No fp8 conversions: sm80 runs the same kernel. Memory is the limit (400 MB for 65,536 rows of 1536 columns) as long as a value
costs less than some 30 instructions, which a division for each would not leave. nvfp4 with per-token scales does divide: its
divisor, a block's scale times the row's, has 24 bits, and only quotients by few bits are sure to tie where the division does.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from tvm.script import tirx as T

from tvmmoe.config import ActivationFormat
from tvmmoe.kernels import numerics
from tvmmoe.kernels.sm90a.gather import exchange_quad, from_pairs, pack_bf16, to_pairs
from tvmmoe.kernels.sm90a.layout import THIN_ROWS, padded
from tvmmoe.kernels.sm90a.thin_rows import columns_address, to_columns
from tvmmoe.kernels.sm90a.trace import (
    address,
    assign,
    bits,
    cast,
    for_,
    if_,
    kernel,
    let,
    load,
    load_vec4,
    ptx,
    regs,
    scalar,
    store,
    store_to,
    store_vec4,
    u32,
    warp_max_s32,
    while_,
)  # fmt: skip

THREADS = 128
WARP_COLUMNS = 1024  # of a warp at once


class Block:
    """A lane's 32 columns of one 128-block of a row of z: chunks 4m + q, q being the lane in its quad."""

    def __init__(self, a, row, block, lane, is_inside):
        self.a, self.row, self.block, self.lane, self.is_inside = a, row, block, lane, is_inside
        self._first = let(cast(row, "int64") * padded(a.intermediate_size) + cast(block * 128 + lane % 4 * 8, "int64"))

    def _chunk(self, m: int):
        return address(self.a.ws["z"], (self._first + 32 * m) * 2)

    def load(self):
        """float32 in column order; zeros where the block is not inside. All lanes of the warp call it."""
        values, chunks = regs(32, "float32"), [regs(4, "uint32") for _ in range(4)]
        for m, words in enumerate(chunks):
            for i in range(4):
                store(words, u32(0), i)
            with if_(self.is_inside):
                load_vec4(self._chunk(m), into=words)
        for m, words in enumerate(chunks):
            exchange_quad(words, self.lane)
            from_pairs(words)
            for i in range(4):
                store(values, bits(let(words[i] << u32(16)), "float32"), 8 * m + 2 * i)
                store(values, bits(let(words[i] & u32(0xFFFF0000)), "float32"), 8 * m + 2 * i + 1)
        return values

    def store(self, values, is_thin=None) -> None:
        """Write them back as bf16, where the row ``is_thin`` also as columns; all lanes of the warp call it."""
        for m in range(4):
            words = regs(4, "uint32")
            for i in range(4):
                store(words, pack_bf16(values[8 * m + 2 * i], values[8 * m + 2 * i + 1]), i)
            to_pairs(words)
            if is_thin is not None:
                with if_(is_thin):
                    self._store_columns(m, words)
            exchange_quad(words, self.lane)
            with if_(self.is_inside):
                store_vec4(self._chunk(m), words)

    def _store_columns(self, m: int, words) -> None:
        width = padded(self.a.intermediate_size)
        target = columns_address(self.a.ws["z"], width, self.row, self.block, m, self.lane % 4)
        store_vec4(target, [to_columns(words[i]) for i in range(4)])


def amax_bits(values, first: int, count: int):
    """Largest magnitude as an integer, where NaN is above all; the largest of floats drops it."""
    amax = scalar("int32", T.int32(0))
    for i in range(first, first + count):
        assign(amax, T.max(amax, bits(let(values[i]), "int32") & T.int32(0x7FFFFFFF)))
    return amax


def _amax(values, first: int, count: int):
    return let(bits(amax_bits(values, first, count), "float32"))


def _round_magnitude(x, mantissa_bits: int, lowest: int):
    """Non-negative ``x`` to ``mantissa_bits``, ties to even, on the grid of 2^lowest below it; inf and NaN stay."""
    power = let(bits(let(T.max(x, T.float32(2.0**lowest))), "uint32") & u32(0x7F800000))
    # 1.5 * 2^23 units of x's binade: adding it rounds at the unit.
    magic = let(bits(power + u32(((23 - mantissa_bits) << 23) | 0x400000), "float32"))
    shifted = let(x + magic)
    return let(shifted - magic)


def round_mxfp8(values, which: range, amax) -> None:
    """Values of a scale block whose largest magnitude is ``amax``."""
    scale = let(numerics.ue8m0_scale_ceil(let(amax / T.float32(448))))
    pattern = let(bits(scale))
    # 1 / 2^k: exponents add up to 254; those of 2^127 and 2^-127, a subnormal, do not.
    inverse = let(T.Select(pattern == u32(1 << 22), u32(254 << 23), u32(254 << 23) - pattern))
    reciprocal = let(bits(T.max(inverse, u32(1 << 22)), "float32"))
    for i in which:
        magnitude = _round_magnitude(let(T.abs(values[i]) * reciprocal), 3, -6)
        store(values, numerics.with_sign_of(let(magnitude * scale), values[i]), i)


def _fma(a, b, c):
    return T.call_pure_extern("float32", "fmaf", a, b, c)


def _quotient(x, scale, reciprocal):
    """``x / scale`` rounded once where it is a number of few bits, so also where rounding it to e2m1 ties."""
    estimate = let(x * reciprocal)
    rest = let(_fma(T.float32(0) - estimate, scale, x))
    return let(_fma(rest, reciprocal, estimate))


def round_nvfp4(values, which: range, amax, row_scale=None) -> None:
    """Values of a scale block whose largest magnitude is ``amax``; ``row_scale`` is that of a row with per-token scales."""
    ratio = let(amax / T.float32(6))
    if row_scale is not None:
        assign(ratio, ratio / row_scale)
    scale = let(numerics.round_to_e4m3(ratio))
    full = scale if row_scale is None else let(scale * row_scale)
    is_zero = full == T.float32(0)
    if row_scale is not None:  # an all-zero row: 0 / 0 above
        is_zero = T.Or(is_zero, row_scale == T.float32(0))
        assign(scale, T.Select(is_zero, T.float32(0), scale))
    divisor = let(T.Select(is_zero, T.float32(1), full))
    reciprocal = let(T.float32(1) / divisor) if row_scale is None else None
    for i in which:
        x = let(T.abs(values[i]))
        ratio = let(x / divisor) if row_scale is not None else _quotient(x, divisor, reciprocal)
        code = _round_magnitude(let(T.min(ratio, T.float32(6))), 1, 0)
        store(values, numerics.with_sign_of(let(code * scale), values[i]), i)


def _round_nvfp4_blocks(values, row_scale=None) -> None:
    for first in (0, 16):
        round_nvfp4(values, range(first, first + 16), _amax(values, first, 16), row_scale)


def is_live(row, tile_m: int, rows):
    """Whether a row holds a pair, of whose tile ``rows`` do."""
    return let(cast(row % tile_m < rows, "int32")) != 0


def live_rows(a, row, tile_m: int, num_tiles):
    """Pairs in a row's tile; asked after the wait, for before it the list had to be read past L1, by every warp."""
    tile, rows = let(row // tile_m), scalar("int32", T.int32(0))
    with if_(tile < num_tiles):
        assign(rows, load("int32", address(a.ws["tile_rows"], cast(tile, "int64") * 4)))
    return rows


@contextlib.contextmanager
def kernel_over_rows(a, name: str, tile_m: int, per_row: Any, threads_each: int) -> Iterator[tuple]:
    """A kernel of ``per_row`` items (int or host expression) a row of z, each of so many threads. For each item of a thread
    it yields thread, row, number of the item in the row and pairs in its tile. CTAs are as many as a rank's usual share of
    rows has work for, and go on where there is more."""
    per_cta = THREADS // threads_each
    num_ctas = cast((a.usual_tiles * tile_m * per_row + (per_cta - 1)) // per_cta, "int32")
    with kernel(name, num_ctas, THREADS) as thread:
        items_per_row = T.int32(per_row) if isinstance(per_row, int) else let(cast(per_row, "int32"))
        ptx.griddepcontrol.launch_dependents()  # gemm2 loads weights before it waits
        ptx.griddepcontrol.wait()
        num_tiles = load("int32", address(a.ws["num_tiles"]))
        first, num_items = let(thread.cta * per_cta), let(num_tiles * tile_m * items_per_row)
        with while_(first < num_items):
            item = let(first + thread.tid // threads_each)
            row = let(item // items_per_row)
            yield thread, row, let(item % items_per_row), live_rows(a, row, tile_m, num_tiles)
            assign(first, first + num_ctas * per_cta)


def requantize(a, form: ActivationFormat, per_token: bool, tile_m: int) -> None:
    """Emit the kernel for one activation format."""
    assert form == ActivationFormat.nvfp4 or not per_token
    if per_token:
        _requantize_rows(a, tile_m)
    else:
        _requantize_blocks(a, form, tile_m)


def _requantize_blocks(a, form: ActivationFormat, tile_m: int) -> None:
    blocks = padded(a.intermediate_size) // 128
    with kernel_over_rows(a, f"requantize_{form.name}", tile_m, blocks, 4) as (thread, row, index, rows):
        is_inside = is_live(row, tile_m, rows)
        with if_(T.cuda.any_sync(u32(0xFFFFFFFF), is_inside) != 0):
            block = Block(a, row, index, thread.lane, is_inside)
            values = block.load()
            if form == ActivationFormat.mxfp8:
                round_mxfp8(values, range(32), _amax(values, 0, 32))
            else:
                _round_nvfp4_blocks(values)
            block.store(values, T.And(is_inside, rows <= THIN_ROWS) if a.has_thin_tiles else None)


def _requantize_rows(a, tile_m: int) -> None:
    """nvfp4 with per-token scales."""
    width = padded(a.intermediate_size)
    with kernel_over_rows(a, "requantize_nvfp4_per_token", tile_m, 1, 32) as (thread, row, _, rows):
        with if_(is_live(row, tile_m, rows)):
            rounds = let(cast((width + WARP_COLUMNS - 1) // WARP_COLUMNS, "int32"))
            amax = scalar("int32", T.int32(0))
            with for_(rounds) as i:
                assign(amax, T.max(amax, amax_bits(warp_block(a, row, i, thread.lane).load(), 0, 32)))
            row_scale = let(bits(warp_max_s32(amax), "float32") / T.float32(448 * 6))
            with if_(thread.lane == 0):
                store_to("float32", address(a.ws["row_scale"], cast(row, "int64") * 4), row_scale)
            with for_(rounds) as i:
                block = warp_block(a, row, i, thread.lane)
                values = block.load()
                _round_nvfp4_blocks(values, row_scale)
                block.store(values)


def warp_block(a, row, i, lane) -> Block:
    """A lane's block of the ``i``-th 1024 columns of a row."""
    block = let(i * (WARP_COLUMNS // 128) + lane // 4)
    is_inside = let(cast(cast(block * 128, "int64") < padded(a.intermediate_size), "int32")) != 0
    return Block(a, row, block, lane, is_inside)
