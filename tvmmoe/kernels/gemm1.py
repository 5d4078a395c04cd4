# SPDX-License-Identifier: Apache-2.0
"""gemm1, the up/gate projection: z = activation(W1 x) for tiles of rows that share an expert.

    x            float32  [num_tiles, tile_m, H/32, 2, 16]   rows in expert order; every 32-block as its 16 even, then
                                                             its 16 odd columns: the order in which a byte holds them
    weights      uint8    [E_loc, F, I/32, 32, H/32, 16]     F = 2: the up rows, then the gate rows; F = 1 otherwise
    block_scale  uint8    [E_loc, F, I/32, 32, H/32, 32/block_size]
    z            bfloat16 [num_tiles, tile_m, I/32, 32]

A per-expert or per-token vector of one row serves every index: that is how an absent argument is passed (see ``row``).
Formulas: operator-semantics 3.1 and 4.1.
"""

from tvm.script import tirx as T

from tvmmoe.config import ActivationType, WeightFormat
from tvmmoe.kernels import numerics


def activate(kind: ActivationType, up, gate, scale, scale_gate, alpha, beta, limit):
    """z of one element: ``up``, ``gate`` are accumulators with bias; ``gate`` is None for a non-gated activation.

    Binds what is used several times, so call it inside a block: an expression's length doubles with every use.
    """
    if kind == ActivationType.Identity:
        return scale * up
    up = T.bind(up)
    if kind == ActivationType.Relu2:
        gated = T.bind(scale_gate * up)
        positive = T.bind(T.Select(numerics.is_nan(gated), gated, T.max(gated, T.float32(0))))
        return scale * (positive * positive)
    gate = T.bind(gate)
    up = T.Select(numerics.is_nan(up), up, T.max(T.min(up, limit), T.float32(0) - limit))
    gate = T.bind(scale_gate * T.Select(numerics.is_nan(gate), gate, T.min(gate, limit)))
    argument = T.bind(alpha * gate)
    squashed = (
        numerics.sigmoid_float32(argument) if kind == ActivationType.Swiglu else numerics.normal_cdf_float32(argument)
    )
    return scale * (up + beta) * (gate * squashed)


def row(index, count):
    """``index`` into a vector of ``count`` rows, of which a single one serves all; -1 (padding) reads row 0."""
    return T.max(T.min(T.Cast("int64", index), count - T.int64(1)), T.int64(0))


def gemm1(weight_format: WeightFormat, activation: ActivationType, tile_m: int):
    """The definition for one weight format, activation and tile height; all other sizes are symbolic."""
    block_size = weight_format.block_size
    per_32 = 32 // block_size
    is_gated = activation.is_gated
    halves = 2 if is_gated else 1

    # fmt: off
    @T.prim_func(s_tir=True)
    def definition(x: T.handle, weights: T.handle, block_scale: T.handle, tile_expert: T.handle, row_token: T.handle,
                   per_token_scale: T.handle, bias: T.handle, alpha: T.handle, beta: T.handle, limit: T.handle,
                   scale: T.handle, scale_gate: T.handle, z: T.handle):
        T.func_attr({"tirx.noalias": True})
        nt, experts, ib, hb, tokens = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        n_bias, n_alpha, n_beta, n_limit = T.int64(), T.int64(), T.int64(), T.int64()
        n_scale, n_gate = T.int64(), T.int64()
        X = T.match_buffer(x, (nt, tile_m, hb, 2, 16), "float32", align=1)
        W = T.match_buffer(weights, (experts, halves, ib, 32, hb, 16), "uint8", align=1)
        S = T.match_buffer(block_scale, (experts, halves, ib, 32, hb, per_32), "uint8", align=1)
        TE = T.match_buffer(tile_expert, (nt,), "int32", align=1)
        ROW = T.match_buffer(row_token, (nt, tile_m), "int32", align=1)
        PTS = T.match_buffer(per_token_scale, (tokens,), "float32", align=1)
        B = T.match_buffer(bias, (n_bias, halves, ib, 32), "float32", align=1)
        ALPHA = T.match_buffer(alpha, (n_alpha,), "float32", align=1)
        BETA = T.match_buffer(beta, (n_beta,), "float32", align=1)
        LIMIT = T.match_buffer(limit, (n_limit,), "float32", align=1)
        SC = T.match_buffer(scale, (n_scale,), "float32", align=1)
        SG = T.match_buffer(scale_gate, (n_gate,), "float32", align=1)
        Z = T.match_buffer(z, (nt, tile_m, ib, 32), "uint16", align=1)
        DQ = T.sblock_alloc_buffer((nt, halves, ib, 32, hb, 2, 16), "float32")
        ACC = T.sblock_alloc_buffer((nt, tile_m, halves, ib, 32), "float32")
        for t, f, nb, n, kb, p, j in T.grid(nt, halves, ib, 32, hb, 2, 16):
            with T.sblock("dequantize"):
                vt, vf, vnb, vn, vkb, vp, vj = T.axis.remap("SSSSSSS", [t, f, nb, n, kb, p, j])
                DQ[vt, vf, vnb, vn, vkb, vp, vj] = numerics.e2m1_to_float32(
                    T.shift_right(T.Cast("uint32", W[TE[vt], vf, vnb, vn, vkb, vj]), T.Cast("uint32", vp * 4))
                ) * numerics.block_scale_to_float32(S[TE[vt], vf, vnb, vn, vkb, vj * per_32 // 16], block_size)
        for t, m, f, nb, n, kb, p, j in T.grid(nt, tile_m, halves, ib, 32, hb, 2, 16):
            with T.sblock("gemm"):
                vt, vm, vf, vnb, vn, vkb, vp, vj = T.axis.remap("SSSSSRRR", [t, m, f, nb, n, kb, p, j])
                with T.init():
                    ACC[vt, vm, vf, vnb, vn] = T.float32(0)
                ACC[vt, vm, vf, vnb, vn] += X[vt, vm, vkb, vp, vj] * DQ[vt, vf, vnb, vn, vkb, vp, vj]
        for t, m, nb, n in T.grid(nt, tile_m, ib, 32):
            with T.sblock("epilogue"):
                vt, vm, vnb, vn = T.axis.remap("SSSS", [t, m, nb, n])
                activated = T.bind(activate(
                    activation,
                    ACC[vt, vm, 0, vnb, vn] * PTS[row(ROW[vt, vm], tokens)] + B[row(TE[vt], n_bias), 0, vnb, vn],
                    ACC[vt, vm, halves - 1, vnb, vn] * PTS[row(ROW[vt, vm], tokens)]
                    + B[row(TE[vt], n_bias), halves - 1, vnb, vn],
                    SC[row(TE[vt], n_scale)], SG[row(TE[vt], n_gate)], ALPHA[row(TE[vt], n_alpha)],
                    BETA[row(TE[vt], n_beta)], LIMIT[row(TE[vt], n_limit)]))
                Z[vt, vm, vnb, vn] = numerics.float32_to_bf16(activated)
    # fmt: on
    return definition
