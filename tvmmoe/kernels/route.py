# SPDX-License-Identifier: Apache-2.0
"""route: logits -> top-k expert ids and bfloat16 weights of every token, all ten methods (operator-semantics 6).

    logits       float32 or bfloat16 [num_tokens, num_experts]
    bias         float32 or bfloat16 [num_experts], or one row that serves nobody (``has_bias`` = 0)
    topk_ids     int32    [num_tokens, top_k]     descending key, ties to the lower id
    topk_weights bfloat16 [num_tokens, top_k]
    replay       int16    [num_tokens, top_k]     a copy of the ids; zero rows when the caller wants none

One token is one task: keys of all experts in a scratch row, then ``top_k`` passes over it.
"""

from tvm.script import tirx as T

from tvmmoe.config import MAX_EXPERTS
from tvmmoe.config import RoutingMethodType as Method
from tvmmoe.kernels import numerics

MAX_GROUPS = 1024


def is_method(method, *kinds: Method):
    """Whether the run-time ``method`` is one of ``kinds``."""
    condition = method == T.int32(kinds[0])
    for kind in kinds[1:]:
        condition = T.Or(condition, method == T.int32(kind))
    return condition


def _score(method, x, bias):
    """The float32 that experts are ranked by (Default, a softmax, is finished by the caller)."""
    sigmoid = numerics.sigmoid_exact(x)
    biased = T.if_then_else(is_method(method, Method.DeepSeekV3, Method.MiniMax2), sigmoid + bias, sigmoid)
    uses_sigmoid = is_method(method, Method.DeepSeekV3, Method.MiniMax2, Method.SigmoidRenorm, Method.Sigmoid)
    return T.if_then_else(uses_sigmoid, biased, _without_nan(method, x))


def _without_nan(method, x):
    """Llama4 takes NaN for -inf."""
    return T.if_then_else(T.And(is_method(method, Method.Llama4), numerics.is_nan(x)), T.float32(float("-inf")), x)


def _larger(x, maximum):
    """``maximum`` with ``x`` taken in; NaN stays."""
    return T.Select(T.Or(numerics.is_nan(x), maximum < x), x, maximum)


def _weight(method, x, softmax, maximum, total, scale, renormalize):
    """Routing weight of one chosen expert before its rounding to bfloat16; ``total`` as the caller summed it."""
    sigmoid = numerics.sigmoid_exact(_without_nan(method, x))
    renormalized = numerics.exp_float64(T.Cast("float64", x) - T.Cast("float64", maximum)) / total
    share = T.Cast("float64", sigmoid) * scale / (total + T.float64(1e-20))
    # Not T.max, which would replace NaN.
    mean = T.Cast("float64", sigmoid) / T.Select(total < T.float64(1e-20), T.float64(1e-20), total)
    weight = T.if_then_else(is_method(method, Method.TopK), x, sigmoid)
    weight = T.if_then_else(
        T.And(is_method(method, Method.SigmoidRenorm), renormalize != 0), T.Cast("float32", mean), weight
    )
    weight = T.if_then_else(is_method(method, Method.DeepSeekV3, Method.MiniMax2), T.Cast("float32", share), weight)
    weight = T.if_then_else(
        is_method(method, Method.Renormalize, Method.RenormalizeNaive), T.Cast("float32", renormalized), weight
    )
    return T.if_then_else(is_method(method, Method.Default), softmax, weight)


def route(logits_dtype: str, bias_dtype: str):
    """The definition for one pair of input dtypes; method and sizes are run-time values."""

    def logit(stored):
        return numerics.bf16_to_float32(stored) if logits_dtype == "bfloat16" else stored

    def bias_value(stored):
        return numerics.bf16_to_float32(stored) if bias_dtype == "bfloat16" else stored

    def rounded_bias(stored):
        return stored if bias_dtype == "bfloat16" else numerics.float32_to_bf16(stored)

    logits_storage, bias_storage = ("uint16" if dtype == "bfloat16" else dtype for dtype in (logits_dtype, bias_dtype))

    # fmt: off
    @T.prim_func(s_tir=True)
    def definition(logits: T.handle, bias: T.handle, topk_ids: T.handle, topk_weights: T.handle, replay: T.handle,
                   method: T.int32, has_bias: T.int32, n_group: T.int32, topk_group: T.int32,
                   routed_scaling_factor: T.float64, norm_topk_prob: T.int32):
        T.func_attr({"tirx.noalias": True})
        num_tokens, num_experts, top_k = T.int64(), T.int64(), T.int64()
        n_bias, n_replay = T.int64(), T.int64()
        X = T.match_buffer(logits, (num_tokens, num_experts), logits_storage, align=1)
        B = T.match_buffer(bias, (n_bias,), bias_storage, align=1)
        IDS = T.match_buffer(topk_ids, (num_tokens, top_k), "int32", align=1)
        WEIGHTS = T.match_buffer(topk_weights, (num_tokens, top_k), "uint16", align=1)
        REPLAY = T.match_buffer(replay, (n_replay, top_k), "int16", align=1)
        for token in range(num_tokens):
            with T.sblock("token"):
                vt = T.axis.spatial(num_tokens, token)
                T.reads(X[vt, 0:num_experts], B[0:n_bias])
                T.writes(IDS[vt, 0:top_k], WEIGHTS[vt, 0:top_k], REPLAY[0:n_replay, 0:top_k])
                score = T.sblock_alloc_buffer((MAX_EXPERTS,), "float32")
                group_score = T.sblock_alloc_buffer((MAX_GROUPS,), "float32")
                is_open = T.sblock_alloc_buffer((MAX_EXPERTS,), "uint8")       # may still be chosen
                group_is_open = T.sblock_alloc_buffer((MAX_GROUPS,), "uint8")  # is not among the best groups yet
                maximum = T.sblock_alloc_buffer((1,), "float32")
                total = T.sblock_alloc_buffer((1,), "float64")
                best = T.sblock_alloc_buffer((2,), "int32")                    # id, key
                pair = T.sblock_alloc_buffer((2,), "float32")                  # a group's two largest scores

                # Scores. Default ranks by the softmax itself: its rounding decides ties.
                maximum[0] = T.float32(float("-inf"))
                for e in range(num_experts):
                    is_open[e] = T.uint8(1)
                    score[e] = _score(
                        method, logit(X[vt, e]),
                        T.if_then_else(has_bias != 0, T.if_then_else(
                            n_group > 1, numerics.bf16_to_float32(rounded_bias(B[T.min(e, n_bias - T.int64(1))])),
                            bias_value(B[T.min(e, n_bias - T.int64(1))])), T.float32(0)))
                    maximum[0] = _larger(logit(X[vt, e]), maximum[0])
                if is_method(method, Method.Default):
                    total[0] = T.float64(0)
                    for e in range(num_experts):
                        total[0] = total[0] + numerics.exp_float64(
                            T.Cast("float64", logit(X[vt, e])) - T.Cast("float64", maximum[0]))
                    for e in range(num_experts):
                        score[e] = T.Cast("float32", numerics.exp_float64(
                            T.Cast("float64", logit(X[vt, e])) - T.Cast("float64", maximum[0])) / total[0])

                # DeepSeekV3 groups: only experts of the topk_group groups with the largest sum of two stay open.
                if T.And(is_method(method, Method.DeepSeekV3), n_group > 1):
                    for g in range(n_group):
                        group_is_open[g] = T.uint8(1)
                        pair[0] = T.float32(float("-inf"))
                        pair[1] = T.float32(float("-inf"))
                        for i in range(T.Cast("int32", num_experts) // n_group):
                            if numerics.sortable_key(score[g * (T.Cast("int32", num_experts) // n_group) + i]) \
                                    > numerics.sortable_key(pair[0]):
                                pair[1] = pair[0]
                                pair[0] = score[g * (T.Cast("int32", num_experts) // n_group) + i]
                            else:
                                if numerics.sortable_key(score[g * (T.Cast("int32", num_experts) // n_group) + i]) \
                                        > numerics.sortable_key(pair[1]):
                                    pair[1] = score[g * (T.Cast("int32", num_experts) // n_group) + i]
                        group_score[g] = pair[0] + pair[1]
                    for e in range(num_experts):
                        is_open[e] = T.uint8(0)
                    for k in range(topk_group):
                        best[0] = -1
                        for g in range(n_group):
                            if group_is_open[g] != T.uint8(0):
                                if T.Or(best[0] < 0, numerics.sortable_key(group_score[g]) > best[1]):
                                    best[0] = g
                                    best[1] = numerics.sortable_key(group_score[g])
                        group_is_open[best[0]] = T.uint8(0)
                        for i in range(T.Cast("int32", num_experts) // n_group):
                            is_open[best[0] * (T.Cast("int32", num_experts) // n_group) + i] = T.uint8(1)

                # Selection: ascending ids and a strict comparison send ties to the lower id.
                for k in range(top_k):
                    best[0] = -1
                    for e in range(num_experts):
                        if is_open[e] != T.uint8(0):
                            if T.Or(best[0] < 0, numerics.sortable_key(score[e]) > best[1]):
                                best[0] = T.Cast("int32", e)
                                best[1] = numerics.sortable_key(score[e])
                    is_open[best[0]] = T.uint8(0)
                    IDS[vt, k] = best[0]
                    if vt < n_replay:
                        REPLAY[vt, k] = T.Cast("int16", best[0])

                # Weights: sums over the chosen experts in double, each weight rounded once to float32, then to bf16.
                maximum[0] = logit(X[vt, IDS[vt, 0]])
                total[0] = T.float64(0)
                for k in range(top_k):
                    total[0] = total[0] + T.if_then_else(
                        is_method(method, Method.Renormalize, Method.RenormalizeNaive),
                        numerics.exp_float64(T.Cast("float64", logit(X[vt, IDS[vt, k]])) - T.Cast("float64", maximum[0])),
                        T.Cast("float64", numerics.sigmoid_exact(logit(X[vt, IDS[vt, k]]))))
                for k in range(top_k):
                    WEIGHTS[vt, k] = numerics.float32_to_bf16(_weight(
                        method, logit(X[vt, IDS[vt, k]]), score[IDS[vt, k]], maximum[0], total[0],
                        routed_scaling_factor, norm_topk_prob))
    # fmt: on
    return definition
