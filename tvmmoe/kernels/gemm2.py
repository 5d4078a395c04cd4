# SPDX-License-Identifier: Apache-2.0
"""gemm2, the down projection: y = s_2 * (row_scale * W2 z + bias), rounded to bfloat16 per row.

x            float32  [num_tiles, tile_m, I/32, 2, 16]   requantised z, blocks as in gemm1
weights      uint8    [E_loc, H/32, 32, I/32, 16]
block_scale  uint8    [E_loc, H/32, 32, I/32, 32/block_size]
y            bfloat16 [num_tiles, tile_m, H/32, 32]      rows without a token are written as zeros
"""

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels import numerics
from tvmmoe.kernels.gemm1 import row


def gemm2(weight_format: WeightFormat, tile_m: int):
    """The definition for one weight format and tile height; all other sizes are symbolic."""
    block_size = weight_format.block_size
    per_32 = 32 // block_size

    # fmt: off
    @T.prim_func(s_tir=True)
    def definition(x: T.handle, weights: T.handle, block_scale: T.handle, tile_expert: T.handle, row_token: T.handle,
                   row_scale: T.handle, bias: T.handle, scale: T.handle, y: T.handle):
        T.func_attr({"tirx.noalias": True})
        nt, experts, nb_, kb_ = T.int64(), T.int64(), T.int64(), T.int64()
        n_bias, n_scale = T.int64(), T.int64()
        X = T.match_buffer(x, (nt, tile_m, kb_, 2, 16), "float32", align=1)
        W = T.match_buffer(weights, (experts, nb_, 32, kb_, 16), "uint8", align=1)
        S = T.match_buffer(block_scale, (experts, nb_, 32, kb_, per_32), "uint8", align=1)
        TE = T.match_buffer(tile_expert, (nt,), "int32", align=1)
        ROW = T.match_buffer(row_token, (nt, tile_m), "int32", align=1)
        RS = T.match_buffer(row_scale, (nt, tile_m), "float32", align=1)
        B = T.match_buffer(bias, (n_bias, nb_, 32), "float32", align=1)
        SC = T.match_buffer(scale, (n_scale,), "float32", align=1)
        Y = T.match_buffer(y, (nt, tile_m, nb_, 32), "uint16", align=1)
        DQ = T.sblock_alloc_buffer((nt, nb_, 32, kb_, 2, 16), "float32")
        ACC = T.sblock_alloc_buffer((nt, tile_m, nb_, 32), "float32")
        for t, nb, n, kb, p, j in T.grid(nt, nb_, 32, kb_, 2, 16):
            with T.sblock("dequantize"):
                vt, vnb, vn, vkb, vp, vj = T.axis.remap("SSSSSS", [t, nb, n, kb, p, j])
                DQ[vt, vnb, vn, vkb, vp, vj] = numerics.e2m1_to_float32(
                    T.shift_right(T.Cast("uint32", W[TE[vt], vnb, vn, vkb, vj]), T.Cast("uint32", vp * 4))
                ) * numerics.block_scale_to_float32(S[TE[vt], vnb, vn, vkb, vj * per_32 // 16], block_size)
        for t, m, nb, n, kb, p, j in T.grid(nt, tile_m, nb_, 32, kb_, 2, 16):
            with T.sblock("gemm"):
                vt, vm, vnb, vn, vkb, vp, vj = T.axis.remap("SSSSRRR", [t, m, nb, n, kb, p, j])
                with T.init():
                    ACC[vt, vm, vnb, vn] = T.float32(0)
                ACC[vt, vm, vnb, vn] += X[vt, vm, vkb, vp, vj] * DQ[vt, vnb, vn, vkb, vp, vj]
        for t, m, nb, n in T.grid(nt, tile_m, nb_, 32):
            with T.sblock("epilogue"):
                vt, vm, vnb, vn = T.axis.remap("SSSS", [t, m, nb, n])
                Y[vt, vm, vnb, vn] = T.if_then_else(
                    ROW[vt, vm] < 0, T.uint16(0),
                    numerics.float32_to_bf16(SC[row(TE[vt], n_scale)] * (
                        ACC[vt, vm, vnb, vn] * RS[vt, vm] + B[row(TE[vt], n_bias), vnb, vn])))
    # fmt: on
    return definition
