# SPDX-License-Identifier: Apache-2.0
"""gather: rows of hidden_states in expert order, decoded exactly to the operand of gemm1.

    hidden_states  bfloat16 [num_tokens, H/32, 16, 2]; mxfp8: uint8 (e4m3) of that shape; nvfp4: uint8 [.., H/32, 16]
    block_scale    uint8    [num_tokens, H/32, 32/block_size]   mxfp8: ue8m0, nvfp4: e4m3; bf16: one unused row
    x              float32  [num_tiles, tile_m, H/32, 2, 16]    even columns of a 32-block, then the odd ones

Padding rows (token -1) are zeros.
"""

from tvm.script import tirx as T

from tvmmoe.config import ActivationFormat
from tvmmoe.kernels import numerics


def gather(activation_format: ActivationFormat):
    """The definition for one format of hidden_states."""
    per_32 = 2 if activation_format == ActivationFormat.nvfp4 else 1

    # fmt: off
    if activation_format == ActivationFormat.nvfp4:
        @T.prim_func(s_tir=True)
        def definition(hidden_states: T.handle, block_scale: T.handle, row_token: T.handle, x: T.handle):
            T.func_attr({"tirx.noalias": True})
            nt, tile_m, num_tokens, hb = T.int64(), T.int64(), T.int64(), T.int64()
            HS = T.match_buffer(hidden_states, (num_tokens, hb, 16), "uint8", align=1)
            S = T.match_buffer(block_scale, (num_tokens, hb, per_32), "uint8", align=1)
            ROW = T.match_buffer(row_token, (nt, tile_m), "int32", align=1)
            X = T.match_buffer(x, (nt, tile_m, hb, 2, 16), "float32", align=1)
            for t, m, kb, p, j in T.grid(nt, tile_m, hb, 2, 16):
                with T.sblock("gather"):
                    vt, vm, vkb, vp, vj = T.axis.remap("SSSSS", [t, m, kb, p, j])
                    X[vt, vm, vkb, vp, vj] = T.Select(
                        ROW[vt, vm] < 0, T.float32(0),
                        numerics.e2m1_to_float32(T.shift_right(
                            T.Cast("uint32", HS[T.max(ROW[vt, vm], 0), vkb, vj]), T.Cast("uint32", vp * 4)))
                        * numerics.e4m3_to_float32(S[T.max(ROW[vt, vm], 0), vkb, vj // 8]))
        return definition

    is_mxfp8 = activation_format == ActivationFormat.mxfp8
    dtype = "uint8" if is_mxfp8 else "uint16"

    def decode(value, scale_byte):
        if is_mxfp8:
            return numerics.e4m3_to_float32(value) * numerics.ue8m0_to_float32(scale_byte)
        return numerics.bf16_to_float32(value)

    @T.prim_func(s_tir=True)
    def definition(hidden_states: T.handle, block_scale: T.handle, row_token: T.handle, x: T.handle):
        T.func_attr({"tirx.noalias": True})
        nt, tile_m, num_tokens, hb, n_scale = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        HS = T.match_buffer(hidden_states, (num_tokens, hb, 16, 2), dtype, align=1)
        S = T.match_buffer(block_scale, (n_scale, hb, per_32), "uint8", align=1)
        ROW = T.match_buffer(row_token, (nt, tile_m), "int32", align=1)
        X = T.match_buffer(x, (nt, tile_m, hb, 2, 16), "float32", align=1)
        for t, m, kb, p, j in T.grid(nt, tile_m, hb, 2, 16):
            with T.sblock("gather"):
                vt, vm, vkb, vp, vj = T.axis.remap("SSSSS", [t, m, kb, p, j])
                X[vt, vm, vkb, vp, vj] = T.Select(
                    ROW[vt, vm] < 0, T.float32(0),
                    decode(HS[T.max(ROW[vt, vm], 0), vkb, vj, vp], S[T.max(ROW[vt, vm], 0), vkb, 0]))
    # fmt: on
    return definition
