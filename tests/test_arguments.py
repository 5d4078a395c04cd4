# SPDX-License-Identifier: Apache-2.0
"""Valid calls of every mode pass; every other call is refused by one line that names the argument."""

import enum
import inspect

import pytest
import torch

from tvmmoe import arguments, config
from tvmmoe.arguments import validate
from tvmmoe.config import ActivationFormat, ActivationType, Problem, RoutingMethodType, WeightFormat
from tvmmoe.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError

T, H, INTER, E, E_LOC, K = 5, 96, 64, 8, 4, 2
MODES = {
    "nvfp4": (ActivationFormat.nvfp4, WeightFormat.nvfp4),
    "nvfp4_per_token": (ActivationFormat.nvfp4, WeightFormat.nvfp4),
    "mxfp8": (ActivationFormat.mxfp8, WeightFormat.mxfp4),
    "bf16": (ActivationFormat.bf16, WeightFormat.mxfp4),
    "bf16_nvfp4": (ActivationFormat.bf16, WeightFormat.nvfp4),
}
OPTIONAL = ("routing_bias", "gemm1_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "gemm2_bias")
OUTPUT_SCALES = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
U8, F32, BF16 = torch.uint8, torch.float32, torch.bfloat16
E4M3 = torch.float8_e4m3fn


def zeros(*shape, dtype=F32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def valid(mode="bf16", activation=ActivationType.Swiglu, t=T, h=H, i=INTER, device="cpu"):
    """A call of this mode with every tensor that it may have."""
    form, weight_format = MODES[mode]
    rows, block = i * (2 if activation.is_gated else 1), weight_format.block_size
    packed = form is ActivationFormat.nvfp4

    def make(*shape, dtype=F32):
        return zeros(*shape, dtype=dtype, device=device)

    call = dict(
        routing_logits=make(t, E),
        routing_bias=make(E),
        hidden_states=make(t, h // 2 if packed else h, dtype=(BF16, E4M3, U8)[form]),
        hidden_states_scale=None if form is ActivationFormat.bf16 else make(t, h // (16 if packed else 32), dtype=E4M3),
        gemm1_weights=make(E_LOC, rows, h // 2, dtype=U8),
        gemm1_weights_scale=make(E_LOC, rows, h // block, dtype=E4M3),
        gemm1_bias=make(E_LOC, rows),
        gemm2_weights=make(E_LOC, h, i // 2, dtype=U8),
        gemm2_weights_scale=make(E_LOC, h, i // block, dtype=U8),
        gemm2_bias=make(E_LOC, h),
        num_experts=E,
        top_k=K,
        n_group=None,
        topk_group=None,
        intermediate_size=i,
        local_expert_offset=2,
        local_num_experts=E_LOC,
        routed_scaling_factor=2.5,
        routing_method_type=RoutingMethodType.Renormalize,
        do_finalize=True,
        enable_pdl=None,
        activation_type=activation,
        per_token_scale=make(t) if mode == "nvfp4_per_token" else None,
        output=make(t, h, dtype=BF16),
        tune_max_num_tokens=8192,
        norm_topk_prob=True,
        routing_replay_out=make(t + 3, K, dtype=torch.int16),
    )
    for name in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"):
        call[name] = make(E_LOC) if activation.is_gated else None
    return call | {name: make(E_LOC) for name in OUTPUT_SCALES}


def refuse(call, error, *fragments):
    """The message, which is one line."""
    with pytest.raises(error) as refusal:
        validate(**call)
    assert type(refusal.value) is error
    message = str(refusal.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    return message


# Valid calls.


@pytest.mark.parametrize("activation", ActivationType)
@pytest.mark.parametrize("mode", MODES)
def test_valid_call_passes(mode, activation):
    problem = validate(**valid(mode, activation))
    form, weight_format = MODES[mode]
    assert problem == Problem(
        T,
        H,
        INTER,
        E,
        K,
        2,
        E_LOC,
        0,
        0,
        H,
        RoutingMethodType.Renormalize,
        activation,
        form,
        weight_format,
        2.5,
        True,
        True,
        True,
        mode == "nvfp4_per_token",
        torch.device("cpu"),
    )


@pytest.mark.parametrize("mode", MODES)
def test_optional_arguments_may_be_absent(mode):
    call = valid(mode) | dict.fromkeys((*OPTIONAL, "output", "routing_replay_out", "routed_scaling_factor"))
    if not mode.startswith("nvfp4"):
        call |= dict.fromkeys(OUTPUT_SCALES)
    for name, parameter in inspect.signature(validate).parameters.items():
        if parameter.default is not inspect.Parameter.empty and name != "per_token_scale":
            del call[name]
    problem = validate(**call)
    assert problem.routing_method is RoutingMethodType.Default and problem.activation is ActivationType.Swiglu
    assert problem.routed_scaling_factor == 1.0 and problem.enable_pdl


@pytest.mark.parametrize("mode", MODES)
def test_gpt_oss_sizes_pass(mode):  # 2880/32 = 90 columns of scales: rows start at any byte
    assert validate(**valid(mode, h=2880, i=2880)).hidden_size == 2880


@pytest.mark.parametrize("mode", MODES)
def test_zero_tokens_pass(mode):
    assert validate(**valid(mode, t=0)).num_tokens == 0


@pytest.mark.parametrize("mode", MODES)
def test_meta_and_fake_tensors_pass(mode):
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert validate(**valid(mode, device="meta")).device.type == "meta"
    call = valid(mode)
    with FakeTensorMode() as fake:
        faked = {k: fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        assert validate(**faked) == validate(**call)
        refuse(faked | dict(gemm1_bias=faked["gemm2_bias"]), ShapeError, "gemm1_bias")


def test_parameters_and_subclasses_without_dispatch_pass():
    class Weight(torch.nn.Parameter):
        pass

    call = valid()
    call["gemm1_weights"] = Weight(call["gemm1_weights"], requires_grad=False)
    call["gemm2_bias"] = torch.nn.Parameter(call["gemm2_bias"])
    call["hidden_states"] = call["hidden_states"].as_subclass(type("Mine", (torch.Tensor,), {}))
    validate(**call)


@pytest.mark.parametrize("dtype", [U8, E4M3, getattr(torch, "float8_e8m0fnu", U8)])
@pytest.mark.parametrize("mode", MODES)
def test_scale_bytes_of_any_view_pass(mode, dtype):
    call = valid(mode)
    for name in ("hidden_states_scale", "gemm1_weights_scale", "gemm2_weights_scale"):
        call[name] = None if call[name] is None else call[name].view(dtype)
    assert validate(**call) == validate(**valid(mode))


ACCEPTED = {
    "narrow_output": (dict(output=zeros(T, 40, dtype=BF16)), dict(output_hidden_size=40)),
    "output_ignored": (dict(do_finalize=False, output=zeros(3)), dict(do_finalize=False, output_hidden_size=H)),
    "bf16_logits_and_bias": (dict(routing_logits=zeros(T, E, dtype=BF16), routing_bias=zeros(E, dtype=BF16)), {}),
    "exact_replay": (dict(routing_replay_out=zeros(T, K, dtype=torch.int16)), {}),
    "int_factor": (dict(routed_scaling_factor=3), dict(routed_scaling_factor=3.0)),
    "ints_for_enums": (
        dict(routing_method_type=7, activation_type=4),
        dict(routing_method=RoutingMethodType.MiniMax2, activation=ActivationType.Geglu),
    ),
    "groups_of_others": (dict(n_group=3, topk_group=7), dict(n_group=0, topk_group=0)),
    "groups": (dict(routing_method_type=2, n_group=4, topk_group=2), dict(n_group=4, topk_group=2)),
    "one_group": (dict(routing_method_type=2, n_group=1, topk_group=1), dict(n_group=0, topk_group=0)),
    "no_group": (dict(routing_method_type=2, n_group=0, topk_group=0), dict(n_group=0, topk_group=0)),
    "llama4": (dict(routing_method_type=3, top_k=1, routing_replay_out=None), dict(top_k=1)),
    "all_experts": (dict(top_k=E, routing_replay_out=None), dict(top_k=E)),
    "no_pdl": (dict(enable_pdl=False), dict(enable_pdl=False)),
}


@pytest.mark.parametrize("label", ACCEPTED)
def test_accepted(label):
    changes, fields = ACCEPTED[label]
    problem = validate(**valid() | changes)
    assert {name: getattr(problem, name) for name in fields} == fields


@pytest.mark.parametrize("method", [m for m in RoutingMethodType if m is not RoutingMethodType.Llama4])
def test_every_method_passes(method):
    assert validate(**valid() | dict(routing_method_type=int(method))).routing_method is method


def test_identity_has_two_numbers():
    for number in (7, 9):
        assert ActivationType(number) is ActivationType.Identity
        call = valid(activation=ActivationType.Identity) | dict(activation_type=number)
        assert validate(**call).activation is ActivationType.Identity


def test_foreign_enum_passes_by_name():
    theirs = enum.IntEnum("theirs", dict(SwigluStep=7, Identity=9, DeepSeekV3=2, Custom=6))
    call = valid(activation=ActivationType.Identity) | dict(activation_type=theirs.Identity)
    assert validate(**call | dict(routing_method_type=theirs.DeepSeekV3)).activation is ActivationType.Identity
    refuse(call | dict(activation_type=theirs.SwigluStep), UnsupportedError, "activation_type: got 7 (SwigluStep)")
    refuse(call | dict(routing_method_type=theirs.Custom), UnsupportedError, "routing_method_type: got 6 (Custom)")


def test_slices_of_tokens_pass():
    call, rest = valid("nvfp4", t=T + 1), valid("nvfp4")
    for name in ("hidden_states", "hidden_states_scale", "routing_logits", "output"):
        rest[name] = call[name][1:]
    validate(**rest)


def test_problem_repr_evaluates_back():
    for mode in MODES:
        problem = validate(**valid(mode, ActivationType.Geglu))
        assert eval(repr(problem), vars(config)) == problem
        assert "RoutingMethodType.Renormalize" in repr(problem)


def test_equal_calls_share_one_problem():
    assert validate(**valid()) is validate(**valid())


# Refused calls: (mode, argument that the message blames, change, fragment of the message). A change is a dict of
# arguments, a function of the blamed one, or its new value. Hints are in parentheses.


def changed(call, argument, change):
    if isinstance(change, dict):
        return call | {name: new(call[name]) if callable(new) else new for name, new in change.items()}
    return call | {argument: change(call[argument]) if callable(change) else change}


def twice(dim):
    return lambda t: torch.cat((t.view(U8), t.view(U8)), dim).view(t.dtype)


def larger(dim):
    return lambda t: zeros(*(3 * n + 1 if i == dim else n for i, n in enumerate(t.shape)), dtype=t.dtype)


def to(dtype):
    return lambda t: t.to(dtype)


def freed(t):
    """The same without memory, as sharded training leaves parameters."""
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def swizzled(scale):
    """What FlashInfer's quantizers return: rows padded to 128, columns to 4, one dimension an expert."""
    *experts, rows, columns = scale.shape
    return zeros(*experts, -(-rows // 128) * 128 * (-(-columns // 4) * 4), dtype=U8)


def plain_rows(t):
    return t[:, :INTER].contiguous()


PER_TOKEN, RELU2, IDENTITY = "nvfp4_per_token", ActivationType.Relu2, ActivationType.Identity
NAN, INF = float("nan"), float("inf")
GROUPS = dict(routing_method_type=RoutingMethodType.DeepSeekV3, n_group=4, topk_group=2)
WEIGHTS = ("gemm1_weights", "gemm2_weights")
SCALES = ("hidden_states_scale", "gemm1_weights_scale", "gemm2_weights_scale")
GATE_PARAMETERS = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
REQUIRED = ("routing_logits", "hidden_states", *WEIGHTS, *SCALES[1:])
TENSORS = (*REQUIRED, *OPTIONAL, *OUTPUT_SCALES, SCALES[0], "per_token_scale", "output", "routing_replay_out")
UNBOUND = ("hidden_states", "routing_replay_out")  # any number of rows may be right
INTS = ("num_experts", "top_k", "intermediate_size", "local_expert_offset", "local_num_experts", "tune_max_num_tokens")

TYPES = [
    (
        "bf16",
        "routing_logits",
        None,
        "[num_tokens=5, num_experts=8] (precomputed expert ids are not taken)",
    ),
    (
        "bf16",
        "routing_logits",
        to(torch.float16),
        "got float16 [5, 8], expected bfloat16 or float32 [num_tokens=5",
    ),
    ("bf16", "hidden_states", to(torch.float16), "(mxfp8) or uint8 [num_tokens, hidden_size/2] (nvfp4"),
    (
        "bf16",
        "hidden_states",
        to(torch.float16),
        "got float16 [5, 96], expected bfloat16 [num_tokens, hidden_",
    ),
    ("bf16", "hidden_states", to(F32), "(convert with .bfloat16(), or quantize with tvmmoe.numerics)"),
    ("nvfp4", "hidden_states", lambda t: t.view(torch.int8), "(call .view(torch.uint8))"),
    ("bf16", "gemm1_weights_scale", lambda t: t.view(torch.int8), "(call .view(torch.uint8))"),
    (
        "bf16",
        "routing_replay_out",
        to(torch.int32),
        "got int32 [8, 2], expected int16 [at least num_tokens=5",
    ),
    *(("bf16", name, None, "got None, expected ") for name in REQUIRED),
    *(("bf16", name, to(BF16), "(not quantized? two e2m1 codes per byte, see tvmmoe.numerics)") for name in WEIGHTS),
    *(("bf16", name, lambda t: t.view(torch.int8), "(call .view(torch.uint8))") for name in WEIGHTS),
    *(("nvfp4", name, to(F32), "(encoded scale bytes, see tvmmoe.numerics)") for name in SCALES),
    *((PER_TOKEN, name, to(BF16), "(call .float())") for name in (*OPTIONAL[1:], *OUTPUT_SCALES, "per_token_scale")),
    *((PER_TOKEN, name, [1.0], "got list, expected ") for name in TENSORS),
    *((PER_TOKEN, name, 1, "got int 1, expected ") for name in TENSORS),
    *((PER_TOKEN, name, lambda t: zeros(1).numpy(), "got numpy.ndarray, expected ") for name in TENSORS),
    *((PER_TOKEN, name, to(torch.int64), "got int64 [") for name in TENSORS),
    *((PER_TOKEN, name, lambda t: torch.eye(2).to_sparse_csr(), "got sparse_csr float32 [2, 2]") for name in TENSORS),
    *(("bf16", name, None, "got None, expected int") for name in INTS),
    *(("bf16", name, True, "got bool True, expected int") for name in INTS),
    *(("bf16", name, 4.0, "got float 4.0, expected int") for name in INTS),
    *(("bf16", name, "4", "got str, expected int") for name in INTS),
    *(("bf16", name, zeros(1), "got float32 [1], expected int") for name in INTS),
    *(("bf16", name, False, "got bool False, expected int or None") for name in ("n_group", "topk_group")),
    *(("bf16", name, [1], "got list, expected int or None") for name in ("n_group", "topk_group")),
    *(("bf16", "routed_scaling_factor", value, "expected float or None") for value in (True, "1", zeros(()))),
    *(
        ("bf16", "routing_method_type", value, "expected int or enum, one of Default=0, R")
        for value in (True, None, 1.0)
    ),
    *(
        ("bf16", "activation_type", value, "expected int or enum, one of Swiglu=3, Geglu=4")
        for value in (True, "Geglu")
    ),
    *(("bf16", "do_finalize", value, "expected bool") for value in (1, None, "yes")),
    *(("bf16", "norm_topk_prob", value, "expected bool") for value in (0, None)),
    *(("bf16", "enable_pdl", value, "expected bool or None") for value in (1, "on")),
]
VALUES = [
    *(("bf16", name, -1, "got -1, expected ") for name in (*INTS, "n_group", "topk_group")),
    *(("bf16", name, 0, "got 0, expected 1 ") for name in INTS if name != "local_expert_offset"),
    ("bf16", "num_experts", 1025, "got 1025, expected 1 ... 1024"),
    ("bf16", "num_experts", 10**30, "got 100 bits, expected 1 ... 1024"),
    ("bf16", "top_k", 9, "got 9, expected 1 ... min(32, num_experts)=8"),
    ("bf16", "top_k", dict(num_experts=64, top_k=33), "got 33, expected 1 ... min(32, num_experts)=32"),
    ("bf16", "top_k", dict(routing_method_type=3), "got 2, expected 1 (routing_method_type Llama4)"),
    ("bf16", "top_k", GROUPS | dict(top_k=5), "got 5, expected at most topk_group*num_experts/n_group=4"),
    ("bf16", "n_group", GROUPS | dict(n_group=3), "got 3, expected a divisor of num_experts=8 with two or more"),
    ("bf16", "n_group", GROUPS | dict(n_group=8), "got 8, expected a divisor of num_experts=8 with two or more"),
    ("bf16", "topk_group", GROUPS | dict(topk_group=None), "got 0, expected 1 ... n_group=4"),
    ("bf16", "topk_group", GROUPS | dict(topk_group=5), "got 5, expected 1 ... n_group=4"),
    ("bf16", "topk_group", GROUPS | dict(n_group=None), "got 2 with n_group 0, expected None, 0 or 1"),
    ("bf16", "local_num_experts", 9, "got 9, expected 1 ... num_experts=8"),
    ("bf16", "local_expert_offset", 5, "got 5, expected 0 ... num_experts-local_num_experts=4"),
    ("bf16", "intermediate_size", 48, "got 48, expected a multiple of 32"),
    ("bf16", "intermediate_size", 1 << 17, "got 131072, expected 1 ... 131040"),
    *((PER_TOKEN, name, freed, "whose storage is freed, expected memory") for name in TENSORS),
    ("bf16", "routed_scaling_factor", NAN, "got nan, expected a finite float32 or None"),
    ("bf16", "routed_scaling_factor", INF, "got inf, expected a finite float32 or None"),
    ("bf16", "routed_scaling_factor", 1e39, "got 1e+39, expected a finite float32 or None"),
    ("bf16", "routed_scaling_factor", 10**400, "got 1329 bits, expected a finite float32 or None"),
    ("bf16", "routing_method_type", 11, "got 11, expected one of Default=0, Renormalize=1, DeepSeekV3=2"),
    ("bf16", "activation_type", 42, "got 42, expected one of Swiglu=3, Geglu=4, Relu2=6, Identity=7 (or 9)"),
    ("bf16", "hidden_states", zeros(1, 96, dtype=BF16).expand(65537, 96), "got bfloat16 [65537, 96], expected at most"),
    ("bf16", "hidden_states_scale", zeros(T, 3, dtype=U8), "got uint8 [5, 3] with bfloat16 hidden_states, expected N"),
    ("mxfp8", "hidden_states_scale", None, "[num_tokens=5, hidden_size/32=3] (only bfloat16 hidden_states co"),
    ("nvfp4", "hidden_states_scale", None, "[num_tokens=5, hidden_size/16=6] (only bfloat16 hidden_states co"),
    *(("nvfp4", name, None, "expected float32 [local_num_experts=4] (nvfp4 hid") for name in OUTPUT_SCALES),
    *((RELU2, name, zeros(E_LOC), "with activation_type Relu2, expected None (only") for name in GATE_PARAMETERS),
    *((IDENTITY, name, zeros(E_LOC), "with activation_type Identity, expected None (only") for name in GATE_PARAMETERS),
    ("bf16", "intermediate_size", 32, "got 32, expected 64 as in gemm1_weights [4, 128, 48] and gemm2_w"),
    ("bf16", "intermediate_size", 128, "got 128, expected 64 as in gemm1_weights [4, 128, 48] and gemm2"),
    ("bf16", "local_num_experts", dict.fromkeys(WEIGHTS, twice(0)), "got 4, expected 8 as in gemm1_weights [8"),
    *((PER_TOKEN, name, lambda t: t.to("meta"), "got a tensor on meta, expected cpu as hidden_states")
      for name in TENSORS if name != "hidden_states"),
    *((PER_TOKEN, name, lambda t: zeros(*t.shape, 2, dtype=t.dtype)[..., 0], "expected contiguous (call .contiguous())")
      for name in TENSORS),
]  # fmt: skip
SHAPES = [
    *((PER_TOKEN, name, lambda t: t[None], ", expected ") for name in TENSORS),
    *((PER_TOKEN, name, lambda t: zeros((), dtype=t.dtype), ", expected ") for name in TENSORS),
    *((PER_TOKEN, name, larger(0), ", expected ") for name in TENSORS if name not in UNBOUND),
    *((PER_TOKEN, name, larger(1), ", expected ") for name in TENSORS if valid(PER_TOKEN)[name].dim() > 1),
    *((PER_TOKEN, name, larger(2), ", expected ") for name in REQUIRED[2:]),
    ("bf16", "hidden_states", zeros(H, dtype=BF16), "got bfloat16 [96], expected bfloat16 [num_tokens, hidden_size]"),
    ("bf16", "hidden_states", zeros(T, 80, dtype=BF16), "hidden_size=80, expected a positive multiple of 32"),
    ("bf16", "hidden_states", zeros(T, 0, dtype=BF16), "hidden_size=0, expected a positive multiple of 32"),
    ("bf16", "hidden_states", zeros(1, 1, dtype=BF16).expand(T, 1 << 17), "hidden_size=131072, expected a positive multiple "
     "of 32, at most 131040"),
    ("bf16", "hidden_states", zeros(T, 64, dtype=BF16), "hidden_size=64, expected hidden_size=96 as in gemm1_weights"),
    ("nvfp4", "hidden_states", twice(1), "and gemm2_weights [4, 96, 32] (unpacked? nvfp4 has two e2m1 codes"),
    ("bf16", "gemm1_weights", twice(2), "got uint8 [4, 128, 96], expected uint8 [local_num_experts=4, 2*intermediate_"
     "size=128, hidden_size/2=48] (unpacked? two e2m1 codes per byte)"),
    ("bf16", "gemm2_weights", twice(2), "got uint8 [4, 96, 64], expected uint8 [local_num_experts=4, hidden_size=96, "
     "intermediate_size/2=32] (unpacked? two e2m1 codes per byte)"),
    ("bf16", "gemm1_weights", dict.fromkeys(WEIGHTS, twice(2)), "(unpacked? two e2m1 codes per byte)"),
    ("bf16", "gemm1_weights", dict(gemm1_weights=twice(2), gemm2_weights=None), "(unpacked? two e2m1 codes per byte)"),
    *(("bf16", name, lambda t: t.mT, "(transposed?)") for name in WEIGHTS),
    *(("bf16", name, lambda t: twice(2)(t).mT, "(transposed and unpacked?)") for name in WEIGHTS),
    *(("bf16", name, torch.flatten, "(call .view(4, ") for name in WEIGHTS),
    ("bf16", "gemm1_weights", plain_rows, "(a gated activation has [up; gate] rows)"),
    ("bf16", "gemm1_bias", plain_rows, "(a gated activation has [up; gate] rows)"),
    (RELU2, "gemm1_weights", twice(1), "intermediate_size=64, hidden_size/2=48] (a gated activation has"),
    ("bf16", "gemm1_weights", twice(0), "got uint8 [8, 128, 48]"),
    ("bf16", "gemm1_weights", twice(0), "(one entry per expert of this rank)"),
    ("bf16", "gemm1_alpha", zeros(1), "(one value for all? .expand(4).contiguous())"),
    ("bf16", "gemm1_alpha", zeros(E), "(one entry per expert of this rank)"),
    ("bf16", "routing_bias", zeros(E_LOC), "(routing is over the experts of all ranks)"),
    ("bf16", "routing_bias", zeros(1, E), "(call .view(8) if the order is that)"),
    ("bf16", "routing_logits", lambda t: t.T, "(transposed?)"),
    ("nvfp4", "hidden_states_scale", zeros(T, 0, dtype=U8), "got uint8 [5, 0], expected float8_e4m3fn or "),
    *((mode, name, swizzled, "(looks 128x4-swizzled: use tvmmoe.layouts.from_128x4)")
      for mode in ("nvfp4", "mxfp8") for name in SCALES),
    *(("bf16_nvfp4", name, swizzled, "(looks 128x4-swizzled: use tvmmoe.layouts.from_128x4)") for name in SCALES[1:]),
    *((mode, name, torch.flatten, "(flattened? call .view(") for mode in ("nvfp4", "mxfp8") for name in SCALES),
    ("bf16_nvfp4", "gemm1_weights_scale", torch.flatten, "(flattened? call .view(4, 128, 6);"),
    *(("nvfp4", name, zeros(*shape, dtype=U8), "(block size twice of what hidden_states and weights have)")
      for name, shape in (("hidden_states_scale", (T, 3)), ("gemm2_weights_scale", (E_LOC, H, 2)))),
    *(("mxfp8", name, twice(-1), "(block size half of what hidden_states and weights have)") for name in SCALES[::2]),
    ("bf16", "gemm1_weights_scale", twice(1), "hidden_size/32=3] (mxfp4; nvfp4 has hidden_size/16 columns)"),
    ("bf16", "gemm1_weights_scale", larger(2), "hidden_size/32=3] (mxfp4; nvfp4 has hidden_size/16 columns)"),
    *(("bf16", "output", zeros(*shape, dtype=BF16), "expected bfloat16 [num_tokens=5, at most hidden_size=96]")
      for shape in ((T, H + 32), (T - 1, H), (T + 1, 40), (T, 0))),
    *(("bf16", "routing_replay_out", zeros(*shape, dtype=torch.int16), "int16 [at least num_tokens=5, top_k=2]")
      for shape in ((T - 1, K), (T + 1, K + 1), (T, 1))),
]  # fmt: skip
UNSUPPORTED = [
    ("bf16", "activation_type", 8, "got 8 (GegluTanh), expected one of Swiglu=3, Geglu=4, Relu2=6, Identity=7 (or 9)"),
    ("bf16", "routing_method_type", 10, "got 10 (Unspecified), expected one of Default=0, Renormalize=1"),
    *((mode, "per_token_scale", zeros(T), "hidden_states, expected None (modes: nvfp4 x nvfp4")
      for mode in ("bf16", "bf16_nvfp4", "mxfp8")),
    ("nvfp4", "gemm1_weights_scale", zeros(E_LOC, 2 * INTER, 3, dtype=U8), "block size 32 of mxfp4 weights, with nv"),
    ("mxfp8", "gemm1_weights_scale", zeros(E_LOC, 2 * INTER, 6, dtype=U8), "block size 16 of nvfp4 weights, with mx"),
]  # fmt: skip
TABLES = {DtypeError: TYPES, ArgumentError: VALUES, ShapeError: SHAPES, UnsupportedError: UNSUPPORTED}
REFUSED = [
    pytest.param(mode, argument, change, error, text, id=f"{argument}: {text}")
    for error, rows in TABLES.items()
    for mode, argument, change, text in rows
]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("mode, argument, change, error, text", REFUSED)
def test_refused(mode, argument, change, error, text):
    call = valid(activation=mode) if isinstance(mode, ActivationType) else valid(mode)
    validate(**call)
    message = refuse(changed(call, argument, change), error, text)
    assert message.startswith(f"{argument}: got ") and len(message) < 400


READ = ("hidden_states", "hidden_states_scale", "routing_logits", "per_token_scale")
OVERLAPS = [(name, written) for name in READ for written in ("output", "routing_replay_out")]


@pytest.mark.parametrize("name, written", [*OVERLAPS, ("output", "routing_replay_out")])
def test_overlap_with_what_is_written_is_refused(name, written):
    for first, second in ((name, written), (written, name)):
        call = valid(PER_TOKEN)
        a, b = call[first], call[second]
        buffer = zeros(a.nbytes + b.nbytes, dtype=U8)
        last = (a.nbytes - 1) // b.element_size() * b.element_size()
        call[first] = buffer[: a.nbytes].view(a.dtype).view(a.shape)
        call[second] = buffer[last : last + b.nbytes].view(b.dtype).view(b.shape)
        refuse(call, ArgumentError, f"{written}: got memory that {name} shares, expected memory of its own")


def test_output_on_hidden_states_is_refused():
    call = valid()
    refuse(call | dict(output=call["hidden_states"]), ArgumentError, "output: got memory that hidden_states shares")


def test_neighbours_in_one_buffer_do_not_overlap():
    call = valid()
    buffer = zeros(2, T, H, dtype=BF16)
    validate(**call | dict(hidden_states=buffer[0], output=buffer[1]))
    validate(**call | dict(hidden_states=buffer[1], output=buffer[0]))


def test_subclass_that_dispatches_is_refused():
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise AssertionError("validation dispatches no operator")

    wrapped = torch.Tensor._make_wrapper_subclass(Wrapper, (E_LOC, 2 * INTER, H // 2), dtype=U8)
    refuse(
        valid() | dict(gemm1_weights=wrapped),
        DtypeError,
        "gemm1_weights: got Wrapper uint8 [4, 128, 48], expected uint8",
    )
    wrapped = torch.Tensor._make_wrapper_subclass(Wrapper, (T, H), dtype=BF16)
    refuse(valid() | dict(hidden_states=wrapped), DtypeError, "hidden_states: got Wrapper bfloat16 [5, 96], expected")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_tensor_is_refused():
    nested = torch.nested.nested_tensor([zeros(1), zeros(2)])
    refuse(valid() | dict(gemm1_alpha=nested), DtypeError, "gemm1_alpha: got Tensor float32 [...], expected float32")


@pytest.mark.parametrize("name", arguments.refusals.ALIGNMENT)
def test_misaligned_data_is_refused_for_cuda(name, monkeypatch):
    alignment = arguments.refusals.ALIGNMENT[name]

    def at(tensor, offset):
        buffer = zeros(tensor.nbytes + 64, dtype=U8)
        start = -buffer.data_ptr() % 32 + offset
        return buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    call = valid("nvfp4")
    for other in arguments.refusals.ALIGNMENT:
        call[other] = at(call[other], 0)
    monkeypatch.setattr(arguments, "_ALIGNED_DEVICES", frozenset(("cpu",)))
    validate(**call)
    validate(**call | {name: at(call[name], alignment)})
    misaligned = call | {name: at(call[name], alignment // 2)}
    refuse(misaligned, ArgumentError, f"{name}: got data at 0x", f"expected a multiple of {alignment} (call .clone())")
    monkeypatch.undo()
    validate(**misaligned)  # the CPU takes any address


@pytest.mark.gpu
def test_cuda_call_passes_and_mixed_devices_are_refused():
    for mode in MODES:
        call = valid(mode, device="cuda")
        assert validate(**call).device == call["hidden_states"].device
    refuse(
        call | dict(gemm2_bias=valid()["gemm2_bias"]), ArgumentError, "gemm2_bias: got a tensor on cpu, expected cuda:0"
    )
