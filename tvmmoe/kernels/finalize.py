# SPDX-License-Identifier: Apache-2.0
"""finalize: out[t] = sum over k of topk_weights[t, k] * y[row of (t, k)], float32, k ascending (operator-semantics 9).

y                             bfloat16 [rows, hidden_size]
topk_weights                  bfloat16 [num_tokens, top_k]
expanded_idx_to_permuted_idx  int32    [num_tokens, top_k]   -1: not local, contributes nothing
output                        bfloat16 [num_tokens, output_hidden_size]   columns beyond are dropped
"""

from tvm.script import tirx as T

from tvmmoe.kernels import numerics


def finalize():
    """The definition; a token without local experts gets a row of zeros."""

    # fmt: off
    @T.prim_func(s_tir=True)
    def definition(y: T.handle, topk_weights: T.handle, expanded_to_permuted: T.handle, output: T.handle):
        T.func_attr({"tirx.noalias": True})
        rows, hidden, num_tokens, top_k, out_hidden = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        Y = T.match_buffer(y, (rows, hidden), "uint16", align=1)
        WEIGHTS = T.match_buffer(topk_weights, (num_tokens, top_k), "uint16", align=1)
        ROW = T.match_buffer(expanded_to_permuted, (num_tokens, top_k), "int32", align=1)
        OUT = T.match_buffer(output, (num_tokens, out_hidden), "uint16", align=1)
        ACC = T.sblock_alloc_buffer((num_tokens, out_hidden), "float32")
        for t, h, k in T.grid(num_tokens, out_hidden, top_k):
            with T.sblock("sum"):
                vt, vh, vk = T.axis.remap("SSR", [t, h, k])
                with T.init():
                    ACC[vt, vh] = T.float32(0)
                ACC[vt, vh] = ACC[vt, vh] + T.if_then_else(
                    ROW[vt, vk] < 0, T.float32(0),
                    numerics.bf16_to_float32(WEIGHTS[vt, vk]) * numerics.bf16_to_float32(Y[ROW[vt, vk], vh]))
        for t, h in T.grid(num_tokens, out_hidden):
            with T.sblock("round"):
                vt, vh = T.axis.remap("SS", [t, h])
                OUT[vt, vh] = numerics.float32_to_bf16(ACC[vt, vh])
    # fmt: on
    return definition
