# SPDX-License-Identifier: Apache-2.0
"""The public operator against the float32 reference, on the CPU artifact and, marked gpu, on CUDA."""

import pytest
import torch

import tvmmoe
from tvmmoe import ActivationType, reference, relaunch, torch_op
from tvmmoe import RoutingMethodType as Method
from tvmmoe.config import ActivationFormat as A
from tvmmoe.config import WeightFormat as W
from tvmmoe.refusals import ALIGNMENT
from tvmmoe.testing import Case, expert_slice, make_case, rel_l2

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODES = {
    "bf16": {},
    "bf16_nvfp4": dict(weight_format=W.nvfp4),
    "mxfp8": dict(activation_format=A.mxfp8),
    "nvfp4": dict(activation_format=A.nvfp4, weight_format=W.nvfp4),
    "nvfp4_per_token": dict(activation_format=A.nvfp4, weight_format=W.nvfp4, has_per_token_scale=True),
}
# Tokens: one row, tiles of 1, 4 and 16 rows on the CPU, one off a tile; the sizes are odd multiples of 32.
SHAPES = {
    "one_token": dict(num_tokens=1),
    "tails": dict(num_tokens=5, hidden_size=96, intermediate_size=160),
    "gpt_oss": dict(num_tokens=3, hidden_size=2880, intermediate_size=2880, num_experts=4),
    "tile_16": dict(num_tokens=67, num_experts=8),
    "one_expert": dict(num_tokens=33, routing="one_expert"),
    "empty_expert": dict(num_tokens=9, routing="empty_expert"),
    "experts_2_to_6": dict(num_tokens=17, local_expert_offset=2, local_num_experts=5),
    "options": dict(num_tokens=19, has_gemm1_bias=True, has_gemm2_bias=True, alpha=1.702, beta=1.0, clamp_limit=7.0),
}
ROUTES = {
    **{method.name: dict(routing_method=method, top_k=1 if method == Method.Llama4 else 8) for method in Method},
    "groups": dict(routing_method=Method.DeepSeekV3, top_k=8, n_group=8, topk_group=4, routed_scaling_factor=2.5,
                   routing_bias_dtype=torch.float32),
    "grouped_bf16_bias": dict(routing_method=Method.DeepSeekV3, top_k=8, n_group=4, topk_group=2,
                              routing_bias_dtype=torch.bfloat16, logits_dtype=torch.bfloat16),
    "one_group": dict(routing_method=Method.DeepSeekV3, top_k=8, routing_bias_dtype=torch.bfloat16),
    "scaled": dict(routing_method=Method.MiniMax2, top_k=8, routed_scaling_factor=2.5, routing_bias_dtype=torch.float32),
    "not_normalised": dict(routing_method=Method.SigmoidRenorm, top_k=8, norm_topk_prob=False),
}  # fmt: skip


def check(case: Case) -> None:
    kwargs = make_case(case)
    output = torch.full((case.num_tokens, case.hidden_size), float("nan"), dtype=torch.bfloat16, device=case.device)
    (actual,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, output=output)
    assert actual is output
    (expected,) = reference.moe_ref(**kwargs)
    assert rel_l2(actual, expected) <= case.tolerance
    assert torch.equal(tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)[0], actual)  # reruns are bit-identical


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", MODES)
def test_matches_reference(mode, shape, device):
    check(Case(**MODES[mode], **SHAPES[shape], device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", [ActivationType.Geglu, ActivationType.Relu2, ActivationType.Identity])
@pytest.mark.parametrize("mode", MODES)
def test_activation_matches_reference(mode, activation, device):
    check(Case(num_tokens=6, activation=activation, has_gemm1_bias=True, **MODES[mode], device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("route", ROUTES)
def test_routing_is_bit_equal(route, logits_dtype, device):
    fields = {"logits_dtype": logits_dtype, **ROUTES[route]}
    kwargs = make_case(num_tokens=200, num_experts=64, hidden_size=32, intermediate_size=32, **fields, device=device)
    if logits_dtype == torch.float32:
        kwargs["routing_logits"][::2] = kwargs["routing_logits"][::2].round()  # exact ties
    replay = torch.full((201, kwargs["top_k"]), -7, dtype=torch.int16, device=device)
    pieces = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, do_finalize=False, routing_replay_out=replay)
    names = ("routing_method_type", "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob")
    ids, weights = reference.route_ref(
        kwargs["routing_logits"], kwargs["routing_bias"], top_k=kwargs["top_k"],
        **{name: kwargs[name] for name in names if name in kwargs},
    )  # fmt: skip
    assert torch.equal(replay[:200].int(), ids)
    assert (replay[200:] == -7).all()
    assert torch.equal(pieces[1], weights)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "activation, limit", [(kind, limit) for kind in ActivationType for limit in (None, 7.0)[: 1 + kind.is_gated]]
)
def test_nan_stays_in_its_token(activation, limit, device):
    kwargs = make_case(num_tokens=5, activation=activation, clamp_limit=limit, device=device)
    (expected,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    kwargs["hidden_states"][2, 7] = float("nan")
    (actual,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    others = torch.tensor([0, 1, 3, 4])
    assert actual[2].isnan().all() and torch.equal(actual[others], expected[others])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ActivationType)
@pytest.mark.parametrize("mode", MODES)
def test_nan_in_one_column_of_z(mode, activation, device):
    kwargs = make_case(num_tokens=5, activation=activation, has_gemm1_bias=True, device=device, **MODES[mode])
    kwargs["gemm1_bias"][:, 3] = float("nan")
    assert tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)[0].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [1, 300])
@pytest.mark.parametrize("weight_format", W)
def test_nan_block_scale_of_weights(weight_format, num_tokens, device):
    kwargs = make_case(num_tokens=num_tokens, weight_format=weight_format, device=device)
    kwargs["gemm2_weights_scale"].view(torch.uint8)[:, 3, 1] = 255 if weight_format == W.mxfp4 else 127
    (actual,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    assert actual[:, 3].isnan().all() and not actual[:, :3].isnan().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", Method)
def test_nan_logit_as_the_reference(method, device):
    top_k = 1 if method == Method.Llama4 else 3
    kwargs = make_case(num_tokens=4, num_experts=16, routing_method=method, top_k=top_k, device=device)
    kwargs["routing_logits"][1, 5] = float("nan")
    kwargs["routing_logits"][2] = float("nan")
    replay = torch.empty(4, top_k, dtype=torch.int16, device=device)
    _, weights, _ = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, do_finalize=False, routing_replay_out=replay)
    ids, expected = reference.route_ref(kwargs["routing_logits"], kwargs["routing_bias"], top_k=top_k,
                                        routing_method_type=method)  # fmt: skip
    assert torch.equal(replay.int(), ids)
    assert torch.equal(weights.isnan(), expected.isnan())
    assert torch.equal(weights.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("device", DEVICES)
def test_pieces_reconstruct_the_output(device):
    kwargs = make_case(num_tokens=23, local_expert_offset=1, local_num_experts=5, device=device)
    (expected,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    rows, weights, index = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, do_finalize=False)
    assert torch.equal(reference.finalize_ref(rows, weights, index), expected)
    is_padding = torch.ones(len(rows), dtype=torch.bool, device=device)
    is_padding[index[index >= 0].long()] = False
    assert is_padding.any() and not rows[is_padding].any()


@pytest.mark.parametrize("device", DEVICES)
def test_expert_slices_sum_to_the_whole(device):
    kwargs = make_case(num_tokens=31, num_experts=8, device=device)
    (whole,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    parts = [tvmmoe.trtllm_fp4_block_scale_moe(**expert_slice(kwargs, start, 4))[0].float() for start in (0, 4)]
    assert rel_l2(parts[0] + parts[1], whole) <= 4e-3


@pytest.mark.parametrize("device", DEVICES)
def test_narrow_output_drops_columns(device):
    kwargs = make_case(num_tokens=4, device=device)
    (whole,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    narrow = torch.empty(4, 72, dtype=torch.bfloat16, device=device)
    tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, output=narrow)
    assert torch.equal(narrow, whole[:, :72])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_no_tokens(mode, device):
    kwargs = make_case(num_tokens=0, **MODES[mode], device=device)
    assert tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)[0].shape == (0, 128)
    assert [len(piece) for piece in tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, do_finalize=False)] == [0, 0, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("byte", [0, 1, 254])
def test_extreme_ue8m0_bytes(byte, device):
    kwargs = make_case(num_tokens=7, device=device)
    kwargs["gemm1_weights"] &= 0xBB  # codes up to 1.5: 1.5 * 2^127 is the largest finite weight
    kwargs["gemm1_weights_scale"].view(torch.uint8).fill_(byte)
    kwargs["hidden_states"] *= 2.0 ** (60 - byte / 2 if byte < 2 else -126)
    (actual,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    (expected,) = reference.moe_ref(**kwargs, dtype=torch.float64)
    assert expected.isfinite().all()
    assert rel_l2(actual, expected) <= 4e-3


def test_refused_call_writes_nothing():
    kwargs = make_case(num_tokens=4)
    output = torch.full((4, 128), 3.0, dtype=torch.bfloat16)
    replay = torch.full((4, 2), 3, dtype=torch.int16)
    with pytest.raises(tvmmoe.ArgumentError, match="top_k"):
        tvmmoe.trtllm_fp4_block_scale_moe(**kwargs | dict(top_k=33), output=output, routing_replay_out=replay)
    assert (output == 3).all() and (replay == 3).all()


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_do_not_change_bits(num_threads):
    kwargs = make_case(num_tokens=40)
    before = torch.get_num_threads()
    (expected,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    try:
        torch.set_num_threads(num_threads)
        assert torch.equal(tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)[0], expected)
    finally:
        torch.set_num_threads(before)


def test_as_many_threads_as_torch_has(monkeypatch):
    import tvm_ffi

    kwargs, seen, selected, before = make_case(num_tokens=4), [], torch_op.selected_plan, torch.get_num_threads()
    spy = tvm_ffi.convert(lambda num_threads: seen.append(num_threads))
    monkeypatch.setattr(torch_op, "selected_plan", lambda problem: selected(problem)._replace(set_num_threads=spy))
    relaunch.forget()
    try:
        for num_threads in (3, 2, 2):  # validated, and as a known call
            torch.set_num_threads(num_threads)
            tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    finally:
        torch.set_num_threads(before)
        relaunch.forget()
    assert seen == [3, 2, 2]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [1, 9, 300])
@pytest.mark.parametrize("mode", MODES)
def test_zeros_make_zeros(mode, num_tokens, device):
    """A row of zeros has scales of 0, by which FlashInfer's producers divide."""
    kwargs = make_case(num_tokens=num_tokens, **MODES[mode], device=device)
    for name in ("hidden_states", "hidden_states_scale", "per_token_scale"):
        if kwargs[name] is not None:
            kwargs[name].view(torch.uint8).zero_()
    assert not tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)[0].any()


def at_least_alignment(tensor: torch.Tensor, alignment: int) -> torch.Tensor:
    """A copy at an address that is a multiple of ``alignment`` and of no more."""
    buffer = torch.empty(tensor.nbytes + 4 * alignment, dtype=torch.uint8, device=tensor.device)
    start = -buffer.data_ptr() % (2 * alignment) + alignment
    buffer[start:][: tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
    return buffer[start:][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [1, 9, 300])
@pytest.mark.parametrize("mode", MODES)
def test_least_alignment_that_validation_accepts(mode, num_tokens, device):
    options = dict(has_gemm1_bias=True, has_gemm2_bias=True, alpha=1.7, beta=1.0, clamp_limit=2.0, has_output_scales=True)
    options |= dict(routing_method=Method.MiniMax2, routing_bias_dtype=torch.bfloat16, logits_dtype=torch.bfloat16)
    kwargs = make_case(num_tokens=num_tokens, num_experts=9, **MODES[mode], **options, device=device)
    moved = {
        name: at_least_alignment(value, ALIGNMENT.get(name, value.element_size())) if torch.is_tensor(value) else value
        for name, value in kwargs.items()
    }
    assert torch.equal(tvmmoe.trtllm_fp4_block_scale_moe(**moved)[0], tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 4, 12, 200, 1100])
@pytest.mark.parametrize("mode", MODES)
def test_programmatic_launches_change_no_bit(mode, num_tokens):
    """Kernels that begin before the one in front of them has ended read nothing too early."""
    kwargs = make_case(num_tokens=num_tokens, hidden_size=512, intermediate_size=256, num_experts=32, top_k=4,
                       **MODES[mode], device="cuda")  # fmt: skip
    runs = [tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, enable_pdl=flag)[0] for flag in (False, True) for _ in range(20)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.gpu
def test_most_tokens():
    """Operands and results of more than 2^31 bytes; each part of the tokens alone gives what it has in the whole."""
    num_tokens, part = 65536, 8192
    kwargs = make_case(num_tokens=num_tokens, hidden_size=4096, intermediate_size=128, num_experts=8, top_k=8, device="cuda")
    (whole,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs)
    for start in (0, num_tokens // 2, num_tokens - part):
        some = {name: kwargs[name][start : start + part] for name in ("hidden_states", "routing_logits")}
        (alone,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs | some)
        assert rel_l2(whole[start : start + part], alone) <= 1e-3


@pytest.fixture
def baseline_cpu(monkeypatch):
    """This CPU without AVX2."""
    torch_op.selected_plan.cache_clear()
    relaunch.forget()
    monkeypatch.setattr(torch_op, "targets_of", lambda device: ("x86-64",))
    yield
    torch_op.selected_plan.cache_clear()
    relaunch.forget()


@pytest.mark.parametrize("shape", ["one_token", "tails", "tile_16", "options"])
@pytest.mark.parametrize("mode", MODES)
def test_baseline_artifact_matches_reference(mode, shape, baseline_cpu):
    check(Case(**MODES[mode], **SHAPES[shape]))


@pytest.mark.parametrize("activation", [ActivationType.Geglu, ActivationType.Relu2, ActivationType.Identity])
def test_baseline_artifact_has_every_activation(activation, baseline_cpu):
    check(Case(num_tokens=6, activation=activation, has_gemm1_bias=True))


@pytest.mark.parametrize("device", DEVICES)
def test_op_is_registered_and_compiles(device):
    kwargs = make_case(num_tokens=6, device=device)
    for do_finalize in (True, False):
        compiled = torch.compile(
            lambda flag=do_finalize: tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, do_finalize=flag),
            fullgraph=True, backend="aot_eager",
        )  # fmt: skip
        expected = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, do_finalize=do_finalize)
        for actual, wanted in zip(compiled(), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 12])
def test_cuda_graph_replays_with_changed_inputs(num_tokens):
    cases = [make_case(num_tokens=num_tokens, seed=seed, device="cuda") for seed in range(4)]
    live = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in cases[0].items()}
    output = torch.empty(num_tokens, 128, dtype=torch.bfloat16, device="cuda")
    tvmmoe.trtllm_fp4_block_scale_moe(**live, output=output)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tvmmoe.trtllm_fp4_block_scale_moe(**live, output=output)
    for case in cases[1:]:
        for name, value in case.items():
            if isinstance(value, torch.Tensor):
                live[name].copy_(value)
        output.fill_(float("nan"))
        graph.replay()
        assert torch.equal(output, tvmmoe.trtllm_fp4_block_scale_moe(**case)[0])
