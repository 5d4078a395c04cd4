# SPDX-License-Identifier: Apache-2.0
"""requantize: round z to the values of the activation format, in place, in bf16 (operator-semantics 5).

e2m1 * e4m3 and e4m3 * 2^k are bf16 numbers, so gemm2 multiplies exactly what the format would hold and stays one
kernel.

    grid     one CTA of 128 threads a permuted row; padding rows return
    load     a thread takes the 32 columns of one lane of a 128-block: four 16-byte chunks, quad exchange to column
             order
    work     amax of its blocks (32: mxfp8; 16: nvfp4), scale, round; nvfp4 with per-token scales first takes the row's
             amax
    store    the same chunks in K order; the row's scale for gemm2 where there is one
"""

from tvm.script import tirx as T

from tvmmoe.config import ActivationFormat
from tvmmoe.kernels import numerics
from tvmmoe.kernels.sm90a.gather import exchange_quad, from_pairs, pack_bf16, to_pairs
from tvmmoe.kernels.sm90a.layout import padded
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
COLUMNS = THREADS * 32


def _chunk_pointer(a, row_base, segment, tid, m: int, columns: int = COLUMNS):
    """16-byte chunk 4m + q of the thread's 128-block."""
    block = segment * (columns // 128) + tid // 4
    return address(a.ws["z"], (row_base + cast(block * 128 + (4 * m + tid % 4) * 8, "int64")) * 2)


def load_columns(a, thread, row_base, segment, width, columns: int = COLUMNS):
    """The thread's 32 columns of a segment as float32, in column order; zeros past the row."""
    values = regs(32, "float32")
    is_inside = let(cast(segment * columns + thread.tid // 4 * 128, "int64")) < width
    for m in range(4):
        words = regs(4, "uint32")
        for i in range(4):
            store(words, u32(0), i)
        with if_(is_inside):
            load_vec4(_chunk_pointer(a, row_base, segment, thread.tid, m, columns), into=words)
        exchange_quad(words, thread.lane)
        from_pairs(words)
        for i in range(4):
            store(values, bits(let(words[i] << u32(16)), "float32"), 8 * m + 2 * i)
            store(values, bits(let(words[i] & u32(0xFFFF0000)), "float32"), 8 * m + 2 * i + 1)
    return values, is_inside


def _store_columns(a, thread, row_base, segment, values, is_inside) -> None:
    for m in range(4):
        words = regs(4, "uint32")
        for i in range(4):
            store(words, pack_bf16(values[8 * m + 2 * i], values[8 * m + 2 * i + 1]), i)
        to_pairs(words)
        exchange_quad(words, thread.lane)
        with if_(is_inside):
            store_vec4(_chunk_pointer(a, row_base, segment, thread.tid, m), words)


def amax_bits(values, first: int, count: int):
    """Largest magnitude as an integer, where NaN is above all; the largest of floats drops it."""
    amax = scalar("int32", T.int32(0))
    for i in range(first, first + count):
        assign(amax, T.max(amax, bits(let(values[i]), "int32") & T.int32(0x7FFFFFFF)))
    return amax


def _amax(values, first: int, count: int):
    return let(bits(amax_bits(values, first, count), "float32"))


def _round_mxfp8(values) -> None:
    scale = let(numerics.ue8m0_scale_ceil(let(_amax(values, 0, 32) / T.float32(448))))
    # z / 2^b by a true division: the reciprocal of 2^-127 is no float32.
    for i in range(32):
        store(values, numerics.round_to_e4m3(let(values[i] / scale)) * scale, i)


def _round_nvfp4(values, row_scale) -> None:
    for block in (0, 16):
        ratio = let(_amax(values, block, 16) / T.float32(6))
        if row_scale is not None:
            assign(ratio, ratio / row_scale)
        scale = let(numerics.round_to_e4m3(ratio))
        full = scale if row_scale is None else let(scale * row_scale)
        is_zero = full == T.float32(0)
        if row_scale is not None:  # an all-zero row: 0 / 0 above
            is_zero = T.Or(is_zero, row_scale == T.float32(0))
        for i in range(block, block + 16):
            code = let(numerics.round_to_e2m1(let(values[i] / full)))
            store(values, T.Select(is_zero, T.float32(0), code * scale), i)


def _row_amax(a, thread, row_base, segments, width, partial):
    """Largest magnitude of the row, known to every thread."""
    amax = scalar("int32", T.int32(0))
    with for_(segments) as segment:
        values, _ = load_columns(a, thread, row_base, segment, width)
        assign(amax, T.max(amax, amax_bits(values, 0, 32)))
    assign(amax, warp_max_s32(amax))
    with if_(thread.lane == 0):
        I.buffer_store(partial, amax, [thread.warp])
    cuda.cta_sync()
    for warp in range(THREADS // 32):
        assign(amax, T.max(amax, partial[warp]))
    return let(bits(amax, "float32"))


def requantize(a, form: ActivationFormat, per_token: bool, tile_m: int) -> None:
    """Emit the kernel for one activation format."""
    width = padded(a.intermediate_size)
    with kernel(f"requantize_{form.name}{'_per_token' * per_token}", cast(a.max_tiles * tile_m, "int32"), THREADS) as thread:
        smem = Smem()
        partial = smem.alloc(THREADS // 32, "int32")
        smem.commit()
        ptx.griddepcontrol.wait()
        ptx.griddepcontrol.launch_dependents()
        tile = let(cast(thread.cta // tile_m, "int64"))
        rows = scalar("int32", T.int32(0))
        with if_(tile < cast(load("int32", address(a.ws["num_tiles"])), "int64")):
            assign(rows, load("int32", address(a.ws["tile_rows"], tile * 4)))
        with if_(thread.cta % tile_m < rows):
            row_base = let(cast(thread.cta, "int64") * width)
            segments = let(cast((width + COLUMNS - 1) // COLUMNS, "int32"))
            row_scale = None
            if per_token:
                row_scale = let(_row_amax(a, thread, row_base, segments, width, partial) / T.float32(448 * 6))
                with if_(thread.tid == 0):
                    store_to("float32", address(a.ws["row_scale"], cast(thread.cta, "int64") * 4), row_scale)
            with for_(segments) as segment:
                values, is_inside = load_columns(a, thread, row_base, segment, width)
                if form == ActivationFormat.mxfp8:
                    _round_mxfp8(values)
                else:
                    _round_nvfp4(values, row_scale)
                _store_columns(a, thread, row_base, segment, values, is_inside)
