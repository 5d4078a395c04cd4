# SPDX-License-Identifier: Apache-2.0
"""requantize: z -> the operand of gemm2 in the precision that the mode prescribes (operator-semantics 5).

    z          bfloat16 [num_tiles, tile_m, I/32, 16, 2]
    x          float32  [num_tiles, tile_m, I/32, 2, 16]   exact values of the quantised z, even columns first
    row_scale  float32  [num_tiles, tile_m]                factor of the row that gemm2 applies to its accumulators

Modes: bf16 (as it is), mxfp8 (e4m3 and a power of two per 32), nvfp4 (e2m1 and an e4m3 scale per 16), nvfp4_per_token
(the same relative to the row's maximum). Values, not codes, are stored: e2m1 x e4m3 and e4m3 x 2^k are exact in float32.
"""

from tvm.script import tirx as T

from tvmmoe.kernels import numerics

MODES = ("bf16", "mxfp8", "nvfp4", "nvfp4_per_token")


def _larger(amax, z):
    """The larger magnitude of bfloat16 patterns: as integers, where NaN is above all; T.max of floats drops it."""
    return T.max(amax, T.bitwise_and(z, T.uint16(0x7FFF)))


def _safe(divisor):
    """``divisor``, or 1 where it is 0: the quotient of a zero block is multiplied by 0 afterwards."""
    return T.Select(divisor == T.float32(0), T.float32(1), divisor)


def _block_scale(mode, amax, row_scale):
    if mode == "mxfp8":
        return numerics.ue8m0_scale_ceil(amax / T.float32(448))
    if mode == "nvfp4":
        return numerics.round_to_e4m3(amax / T.float32(6))
    return numerics.round_to_e4m3(amax / T.float32(6) / _safe(row_scale))


def _value(mode, z, scale, row_scale):
    """The quantised z as a float32 (without the row factor)."""
    if mode == "mxfp8":
        return numerics.round_to_e4m3(z / scale) * scale
    if mode == "nvfp4":
        return numerics.round_to_e2m1(z / _safe(scale)) * scale
    return numerics.round_to_e2m1(z / _safe(scale * row_scale)) * scale


def requantize(mode: str):
    """The definition for one of ``MODES``."""
    blocks = 2 if mode.startswith("nvfp4") else 1  # scale blocks per 32 columns
    width = 16 // blocks  # pairs of columns in a scale block

    # fmt: off
    @T.prim_func(s_tir=True)
    def definition(z: T.handle, x: T.handle, row_scale: T.handle):
        T.func_attr({"tirx.noalias": True})
        nt, tile_m, ib = T.int64(), T.int64(), T.int64()
        Z = T.match_buffer(z, (nt, tile_m, ib, blocks, width, 2), "uint16", align=1)
        X = T.match_buffer(x, (nt, tile_m, ib, 2, blocks, width), "float32", align=1)
        RS = T.match_buffer(row_scale, (nt, tile_m), "float32", align=1)
        if mode == "nvfp4_per_token":
            ROW_AMAX = T.sblock_alloc_buffer((nt, tile_m), "uint16")
            for t, m, kb, b, j, p in T.grid(nt, tile_m, ib, blocks, width, 2):
                with T.sblock("row_amax"):
                    vt, vm, vkb, vb, vj, vp = T.axis.remap("SSRRRR", [t, m, kb, b, j, p])
                    with T.init():
                        ROW_AMAX[vt, vm] = T.uint16(0)
                    ROW_AMAX[vt, vm] = _larger(ROW_AMAX[vt, vm], Z[vt, vm, vkb, vb, vj, vp])
        for t, m in T.grid(nt, tile_m):
            with T.sblock("row_scale"):
                vt, vm = T.axis.remap("SS", [t, m])
                if mode == "nvfp4_per_token":
                    RS[vt, vm] = numerics.bf16_to_float32(ROW_AMAX[vt, vm]) / T.float32(448 * 6)
                else:
                    RS[vt, vm] = T.float32(1)
        if mode != "bf16":
            AMAX = T.sblock_alloc_buffer((nt, tile_m, ib, blocks), "uint16")
            SCALE = T.sblock_alloc_buffer((nt, tile_m, ib, blocks), "float32")
            for t, m, kb, b, j, p in T.grid(nt, tile_m, ib, blocks, width, 2):
                with T.sblock("amax"):
                    vt, vm, vkb, vb, vj, vp = T.axis.remap("SSSSRR", [t, m, kb, b, j, p])
                    with T.init():
                        AMAX[vt, vm, vkb, vb] = T.uint16(0)
                    AMAX[vt, vm, vkb, vb] = _larger(AMAX[vt, vm, vkb, vb], Z[vt, vm, vkb, vb, vj, vp])
            for t, m, kb, b in T.grid(nt, tile_m, ib, blocks):
                with T.sblock("scale"):
                    vt, vm, vkb, vb = T.axis.remap("SSSS", [t, m, kb, b])
                    SCALE[vt, vm, vkb, vb] = _block_scale(
                        mode, numerics.bf16_to_float32(AMAX[vt, vm, vkb, vb]), RS[vt, vm])
        for t, m, kb, p, b, j in T.grid(nt, tile_m, ib, 2, blocks, width):
            with T.sblock("encode"):
                vt, vm, vkb, vp, vb, vj = T.axis.remap("SSSSSS", [t, m, kb, p, b, j])
                if mode == "bf16":
                    X[vt, vm, vkb, vp, vb, vj] = numerics.bf16_to_float32(Z[vt, vm, vkb, vb, vj, vp])
                else:
                    X[vt, vm, vkb, vp, vb, vj] = _value(
                        mode, numerics.bf16_to_float32(Z[vt, vm, vkb, vb, vj, vp]), SCALE[vt, vm, vkb, vb], RS[vt, vm])
    # fmt: on
    return definition
