# SPDX-License-Identifier: Apache-2.0
"""Random valid calls of the public operator: against the reference, and properties that hold without one."""

import contextlib

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tvmmoe
from tvmmoe import ActivationType, reference
from tvmmoe import RoutingMethodType as Method
from tvmmoe.config import ActivationFormat as A
from tvmmoe.config import WeightFormat as W
from tvmmoe.testing import Case, expert_slice, make_case, poison, rel_l2

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODES = [
    dict(activation_format=A.bf16, weight_format=W.mxfp4),
    dict(activation_format=A.bf16, weight_format=W.nvfp4),
    dict(activation_format=A.mxfp8, weight_format=W.mxfp4),
    dict(activation_format=A.nvfp4, weight_format=W.nvfp4),
    dict(activation_format=A.nvfp4, weight_format=W.nvfp4, has_per_token_scale=True),
]
FLOATS = [torch.float32, torch.bfloat16]
ROUTINGS = ["random", "balanced", "one_expert", "empty_expert"]
GUARD = 8  # rows before and after a buffer that a call must not touch; eight keep CUDA's 16 byte alignment at any width
ROUTE_ARGUMENTS = ("top_k", "routing_method_type", "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob")
BF16_UNIT = 2.0**-8  # largest relative error of a rounding to bfloat16

fuzz = settings(deadline=None, derandomize=True, database=None)


def optional(values):
    return st.none() | values


@st.composite
def sizes(draw):
    """num_tokens, hidden_size, intermediate_size, num_experts; many experts only with tiny weights and few tokens."""
    if draw(st.integers(0, 5)) == 5:
        tokens, experts = draw(st.integers(0, 2)), draw(st.sampled_from([127, 256, 1000, 1024]))
        return tokens, 32 * draw(st.integers(1, 2)), 32 * draw(st.integers(1, 2)), experts
    hidden_size, intermediate_size = 32 * draw(st.integers(1, 10)), 32 * draw(st.integers(1, 10))
    return draw(st.integers(0, 40)), hidden_size, intermediate_size, draw(st.integers(1, 40))


@st.composite
def routes(draw, num_experts, groups):
    """Fields of a routing method that accepts ``num_experts``; of DeepSeekV3 if there are (n_group, topk_group)."""
    method = Method.DeepSeekV3 if groups else draw(st.sampled_from(list(Method)))
    n_group, topk_group = groups or (1, 1)
    most = 1 if method == Method.Llama4 else min(topk_group * num_experts // n_group, 32)
    return dict(
        routing_method=method,
        n_group=n_group if groups else None,
        topk_group=topk_group if groups else None,
        top_k=draw(st.integers(1, most)),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(optional(st.sampled_from([0.5, 1.0, 2.5]))),
        routing_bias_dtype=draw(optional(st.sampled_from(FLOATS))),
        routing=draw(st.sampled_from(ROUTINGS)),
        logits_dtype=draw(st.sampled_from(FLOATS)),
    )


@st.composite
def cases(draw, device, mode=None, has_groups=False, min_tokens=0, min_experts=1):
    """Any valid call, of one mode or of any, with all experts or a slice of them."""
    num_tokens, hidden_size, intermediate_size, num_experts = draw(sizes())
    num_experts, groups = max(num_experts, min_experts), None
    if has_groups:
        groups = (n_group := draw(st.integers(2, 8)), draw(st.integers(1, n_group)))
        num_experts = n_group * draw(st.integers(2, 8))
    activation = draw(st.sampled_from(list(ActivationType)))
    offset, count = 0, num_experts
    if draw(st.booleans()):
        offset = draw(st.integers(0, num_experts - min_experts))
        count = draw(st.integers(min_experts, num_experts - offset))
    gate = {}
    if activation.is_gated:
        values = dict(alpha=[1.0, 1.702], beta=[0.5, 1.0], clamp_limit=[1.0, 7.0])
        gate = {name: draw(optional(st.sampled_from(choice))) for name, choice in values.items()}
    return Case(
        num_tokens=max(num_tokens, min_tokens),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        activation=activation,
        local_expert_offset=offset,
        local_num_experts=count,
        has_gemm1_bias=draw(st.booleans()),
        has_gemm2_bias=draw(st.booleans()),
        has_output_scales=draw(st.booleans()),
        from_float=num_experts <= 40 and draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
        device=device,
        **(mode or draw(st.sampled_from(MODES))),
        **draw(routes(num_experts, groups)),
        **gate,
    )


def well_posed(kwargs, case):
    """The reference's pieces and output; drops calls on which two correct implementations may differ by ``tolerance``.

    Next to a midpoint of e2m1 or of a block scale, the order of a float32 sum decides a code. With few values in the
    result one such flip is more than the tolerance, so a call counts only where float32 and float64 sums agree, and where a
    millionth more or less of every z changes nothing: what gate and up are clamped to is the largest z of many rows, whose
    bfloat16 decides all their scales.
    """
    pieces = reference.moe_ref(**kwargs | dict(do_finalize=False))
    output = reference.finalize_ref(*pieces)
    kwargs = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}
    single, *others = (reference.moe_ref(**kwargs, dtype=dtype)[0] for dtype in (torch.float32, torch.float64))
    if (scale := kwargs["output1_scale_scalar"]) is not None:
        factors = (1 - 2.0**-20, 1 + 2.0**-20)
        others += [reference.moe_ref(**kwargs | dict(output1_scale_scalar=scale * factor))[0] for factor in factors]
    assume(all(rel_l2(single, other) <= case.tolerance / 2 for other in others))
    assert output.isfinite().all()
    return pieces, output


@contextlib.contextmanager
def poisoned_allocations():
    """torch.empty fills with NaN, and integers with their maximum: workspace and results of a call."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def call(kwargs, **options):
    with poisoned_allocations():
        return tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, **options)


def guarded(rows, columns, dtype, device):
    """A poisoned buffer and its middle ``rows``."""
    buffer = poison(torch.empty(rows + 2 * GUARD, columns, dtype=dtype, device=device))
    return buffer, buffer[GUARD : GUARD + rows]


def is_intact(buffer, rows):
    """Whether everything but ``rows`` in the middle still is poison."""
    outside = torch.cat((buffer[:GUARD], buffer[GUARD + rows :]))
    return bool((outside.view(torch.uint8) == 0xFF).all())


def same(a, b):
    """Equal bytes: NaN equals itself, -0 is not 0."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_pieces(pieces, kwargs, ids):
    """The index map leads every local slot to a row of its own, in expert order; all other rows are zeros."""
    rows, weights, index = pieces
    expert = ids.flatten() - kwargs["local_expert_offset"]
    is_local = (expert >= 0) & (expert < kwargs["local_num_experts"])
    assert index.shape == expert.shape and torch.equal(index >= 0, is_local) and (index >= -1).all()
    used, order = index[is_local].long().sort()
    assert (used.diff() > 0).all() and (used < len(rows)).all()
    assert (expert[is_local][order].diff() >= 0).all()
    is_padding = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    is_padding[used] = False
    assert not rows[is_padding].view(torch.int16).any()
    assert weights.shape == ids.shape and weights.dtype == rows.dtype == torch.bfloat16 and index.dtype == torch.int32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_groups", [False, True], ids=["any_method", "groups"])
@pytest.mark.parametrize("mode", MODES, ids=["bf16", "bf16_nvfp4", "mxfp8", "nvfp4", "nvfp4_per_token"])
@settings(fuzz, max_examples=40)
@given(data=st.data())
def test_random_call(mode, has_groups, device, data):
    case = data.draw(cases(device, mode, has_groups))
    width = data.draw(st.just(case.hidden_size) | st.integers(1, case.hidden_size), label="output width")
    spare_rows = data.draw(st.integers(0, 3), label="spare rows of the replay")
    kwargs = make_case(case)
    (expected_rows, expected_weights, expected_index), expected = well_posed(kwargs, case)

    output_buffer, output = guarded(case.num_tokens, width, torch.bfloat16, device)
    replay_buffer, replay = guarded(case.num_tokens + spare_rows, case.top_k, torch.int16, device)
    (actual,) = call(kwargs, output=output, routing_replay_out=replay)
    assert actual is output
    assert rel_l2(actual, expected[:, :width]) <= case.tolerance
    assert is_intact(output_buffer, case.num_tokens) and is_intact(replay_buffer, case.num_tokens)
    ids, _ = reference.route_ref(
        kwargs["routing_logits"], kwargs["routing_bias"], **{name: kwargs[name] for name in ROUTE_ARGUMENTS}
    )
    assert torch.equal(replay[: case.num_tokens].int(), ids)

    (again,) = call(kwargs)
    assert same(again[:, :width].contiguous(), actual.contiguous())
    pieces = call(kwargs, do_finalize=False)
    assert all(same(a, b) for a, b in zip(call(kwargs, do_finalize=False), pieces, strict=True))
    check_pieces(pieces, kwargs, ids)
    rows, weights, index = pieces
    assert same(weights, expected_weights)
    is_local = index >= 0
    assert rel_l2(rows[index[is_local].long()], expected_rows[expected_index[is_local].long()]) <= case.tolerance
    assert same(reference.finalize_ref(*pieces), again)


@pytest.mark.parametrize("device", DEVICES)
@settings(fuzz, max_examples=60)
@given(data=st.data())
def test_expert_parallel_parts_sum_to_the_whole(device, data):
    case = data.draw(cases(device, min_tokens=1, min_experts=2))
    num_local = case.num_local_experts
    cut = st.integers(1, num_local - 1)
    cuts = sorted(data.draw(st.sets(cut, min_size=1, max_size=min(3, num_local - 1)), label="cuts"))
    bounds = list(zip([0, *cuts], [*cuts, num_local], strict=True))
    kwargs = make_case(case)
    well_posed(kwargs, case)
    (whole,) = call(kwargs)
    _, weights, whole_index = call(kwargs, do_finalize=False)

    parts, rows, index = [], [], torch.full_like(whole_index, -1)
    for start, stop in bounds:
        part = expert_slice(kwargs, start, stop - start)
        parts.append(call(part)[0])
        part_rows, part_weights, part_index = call(part, do_finalize=False)
        assert same(part_weights, weights)
        is_mine = part_index >= 0
        assert (index[is_mine] == -1).all()
        index[is_mine] = part_index[is_mine] + sum(map(len, rows))
        rows.append(part_rows)
    assert torch.equal(index >= 0, whole_index >= 0)
    assert rel_l2(reference.finalize_ref(torch.cat(rows), weights, index), whole) <= case.tolerance
    # What a reduction over ranks returns: every part is rounded to bfloat16 by itself, and parts may cancel.
    *sizes, size = (part.double().norm() for part in (*parts, whole))
    error = (sum(part.double() for part in parts) - whole.double()).norm()
    assert error <= BF16_UNIT * (sum(sizes) + size) + case.tolerance * size
