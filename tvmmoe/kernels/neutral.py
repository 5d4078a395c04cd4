# SPDX-License-Identifier: Apache-2.0
"""neutral: the values that stand for absent arguments: 1 (scales, alpha), inf (clamp limit), then zeros (biases, beta)."""

from tvm.script import tirx as T

ONE, INF, ZEROS = 0, 1, 2  # positions in the vector


def neutral():
    """The definition: a float32 vector [2 + the longest bias]."""

    # fmt: off
    @T.prim_func(s_tir=True)
    def definition(values: T.handle):
        T.func_attr({"tirx.noalias": True})
        n = T.int64()
        V = T.match_buffer(values, (n,), "float32", align=1)
        for i in range(n):
            with T.sblock("fill"):
                vi = T.axis.spatial(n, i)
                V[vi] = T.Select(vi == T.int64(ONE), T.float32(1),
                                 T.Select(vi == T.int64(INF), T.float32(float("inf")), T.float32(0)))
    # fmt: on
    return definition
