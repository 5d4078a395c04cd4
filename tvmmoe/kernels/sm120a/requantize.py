# SPDX-License-Identifier: Apache-2.0
"""requantize: z [rows, I] bf16 -> values and block scales in the activation format, as gemm2's instruction reads them.

grid     one CTA of 128 threads a permuted row; rows of padding return
work     a thread takes one block of 16 (nvfp4) or 32 (mxfp8) columns at a time: amax, scale, codes; nvfp4 with
         per-token scales first takes the row's amax
store    the block's values, 8 or 32 bytes, and its scale byte
"""

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels import numerics
from tvmmoe.kernels.sm80.intrinsics import grid_dependency
from tvmmoe.kernels.sm90a.trace import (
    I,
    Smem,
    address,
    assign,
    bits,
    cast,
    cuda,
    for_,
    if_,
    if_else,
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
)  # fmt: skip

THREADS = 128


def _code_e4m3(value):
    """Byte of a float32 that is an e4m3 number or NaN."""
    pattern = let(bits(value))
    magnitude = let(pattern & u32(0x7FFFFFFF))
    small = cast(cast(bits(magnitude, "float32") * T.float32(512), "int32"), "uint32")  # below 2^-6 the grid is 2^-9
    code = T.Select(magnitude < u32(121 << 23), small, (magnitude - u32(120 << 23)) >> u32(20))
    code = T.Select(magnitude > u32(0x7F800000), u32(0x7F), code)
    return let(code | (pattern >> u32(31) << u32(7)))


def _code_e2m1(value):
    """Code of a float32 that is an e2m1 number: 0, 0.5, 1 and up are 0, 1, 2 and up in the top bits of the float."""
    pattern = let(bits(value))
    magnitude = let(pattern & u32(0x7FFFFFFF))
    code = T.Select(magnitude < u32(127 << 23), magnitude >> u32(29), (magnitude - u32(126 << 23)) >> u32(22))
    return let(code | (pattern >> u32(31) << u32(3)))


def _code_ue8m0(scale):
    """Byte of a power of two from 2^-127 to 2^127; NaN, of a block with NaN or infinity, is 255."""
    return let(T.Select(bits(scale) > u32(0x7F800000), u32(255), bits(scale) >> u32(23)))


class Row:
    """A CTA's row of z."""

    def __init__(self, a, weight_format: WeightFormat, row, tid):
        self.a, self.tid, self.size = a, tid, weight_format.block_size
        self.row = let(cast(row, "int64"))
        self.num_blocks = let(cast(a.intermediate_size // self.size, "int32"))
        self.rounds = let((self.num_blocks + (THREADS - 1)) // THREADS)

    def blocks(self, work) -> None:
        """Call ``work(index, values)`` for each of this thread's blocks."""
        with for_(self.rounds) as i:
            index = let(i * THREADS + self.tid)
            with if_(index < self.num_blocks):
                work(index, self._load(index))

    def offset(self, index):
        """First column of a block, counted from the first of z."""
        return self.row * self.a.intermediate_size + cast(index * self.size, "int64")

    def _load(self, index):
        values, source = regs(self.size, "float32"), let(self.a.ws["z"] + self.offset(index) * 2)
        for first in range(0, self.size, 8):
            words = load_vec4(address(source, first * 2))
            for i in range(4):
                store(values, bits(let(words[i] << u32(16)), "float32"), first + 2 * i)
                store(values, bits(let(words[i] & u32(0xFFFF0000)), "float32"), first + 2 * i + 1)
        return values


def _amax_bits(values, count: int):
    """Largest magnitude as an integer, where NaN is above all; the largest of floats drops it."""
    amax = scalar("int32", T.int32(0))
    for i in range(count):
        assign(amax, T.max(amax, bits(let(values[i]), "int32") & T.int32(0x7FFFFFFF)))
    return amax


def _store_byte(pointer, value) -> None:
    ptx["st.global.u8"](pointer, value)


def _mxfp8_block(row: Row, index, values) -> None:
    amax = let(bits(_amax_bits(values, 32), "float32"))
    scale = let(numerics.ue8m0_scale_ceil(let(amax / T.float32(448))))
    # z / 2^b by a true division: the reciprocal of 2^-127 is no float32.
    codes = [_code_e4m3(let(numerics.round_to_e4m3(let(values[i] / scale)))) for i in range(32)]
    for half in range(2):
        words = regs(4, "uint32")
        for i in range(4):
            quad = codes[16 * half + 4 * i :][:4]
            store(words, quad[0] | (quad[1] << u32(8)) | (quad[2] << u32(16)) | (quad[3] << u32(24)), i)
        store_vec4(address(row.a.ws["z_value"], row.offset(index) + 16 * half), words)
    at = row.row * cast(row.num_blocks, "int64") + cast(index, "int64")
    _store_byte(address(row.a.ws["z_scale"], at), _code_ue8m0(scale))


def _nvfp4_block(row: Row, index, values, row_scale) -> None:
    ratio = let(bits(_amax_bits(values, 16), "float32"))
    assign(ratio, ratio / T.float32(6))
    if row_scale is not None:
        assign(ratio, T.Select(row_scale == T.float32(0), T.float32(0), ratio / row_scale))  # a row of zeros
    scale = let(numerics.round_to_e4m3(ratio))
    full = scale if row_scale is None else let(scale * row_scale)
    words = regs(2, "uint32")
    for i in range(2):
        word = scalar("uint32", u32(0))
        for n in range(8):
            code = _code_e2m1(let(numerics.round_to_e2m1(let(values[8 * i + n] / full))))
            assign(word, word | (code << u32(4 * n)))
        # A block of zeros: 0 / 0 above.
        store(words, T.Select(full == T.float32(0), u32(0), word), i)
    ptx["st.global.v2.b32"](address(row.a.ws["z_value"], row.offset(index) // 2), words[0], words[1])
    at = row.row * cast(row.num_blocks, "int64") + cast(index, "int64")
    _store_byte(address(row.a.ws["z_scale"], at), _code_e4m3(scale))


def _row_scale(row: Row, thread, partial):
    """amax of the row / (448 * 6), known to every thread and stored for gemm2."""
    amax = scalar("int32", T.int32(0))
    row.blocks(lambda index, values: assign(amax, T.max(amax, _amax_bits(values, 16))))
    assign(amax, warp_max_s32(amax))
    with if_(thread.lane == 0):
        I.buffer_store(partial, amax, [thread.warp])
    cuda.cta_sync()
    for warp in range(THREADS // 32):
        assign(amax, T.max(amax, partial[warp]))
    scale = let(let(bits(amax, "float32")) / T.float32(448 * 6))
    with if_(thread.tid == 0):
        store_to("float32", address(row.a.ws["row_scale"], row.row * 4), scale)
    return scale


def requantize(a, weight_format: WeightFormat, tile_m: int) -> None:
    """Emit the kernel."""
    with kernel("requantize", cast(a.max_tiles * tile_m, "int32"), THREADS) as thread:
        smem = Smem()
        partial = smem.alloc(THREADS // 32, "int32")
        smem.commit()
        grid_dependency()
        tile, rows = let(cast(thread.cta // tile_m, "int64")), scalar("int32", T.int32(0))
        with if_(tile < cast(load("int32", address(a.ws["num_tiles"])), "int64")):
            assign(rows, load("int32", address(a.ws["tile_rows"], tile * 4)))
        with if_(thread.cta % tile_m < rows):
            row = Row(a, weight_format, thread.cta, thread.tid)
            if weight_format is WeightFormat.mxfp4:
                row.blocks(lambda index, values: _mxfp8_block(row, index, values))
                return

            def per_token():
                scale = _row_scale(row, thread, partial)
                row.blocks(lambda index, values: _nvfp4_block(row, index, values, scale))

            def plain():
                row.blocks(lambda index, values: _nvfp4_block(row, index, values, None))

            if_else(a.per_token_scale != 0, per_token, plain)
