# SPDX-License-Identifier: Apache-2.0
"""Every check of the documented call, before any work: no tensor data is read, nothing is allocated or launched.

A valid call pays for conjunctions of cheap attribute tests alone; their messages are made in :mod:`tvmmoe.refusals`.

What shapes cannot show: [gate; up] or interleaved or shuffled rows, 128x4-swizzled scales whose padded size equals the
plain one, and the units of biases, beta and clamp_limit.
"""

import functools
import inspect
from typing import Any

import torch

from tvmmoe import refusals
from tvmmoe.config import (
    MAX_EXPERTS,
    MAX_SIZE,
    MAX_TOP_K,
    ActivationFormat,
    ActivationType,
    Problem,
    RoutingMethodType,
    WeightFormat,
)
from tvmmoe.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from tvmmoe.refusals import (
    BF16,
    E2M1_PAIR,
    FLOAT32,
    FLOAT32_MAX,
    FLOATS,
    INT16,
    PACKED,
    SCALE_BYTES,
    SIZE_MULTIPLE,
    describe,
    has_memory,
    is_tensor,
)

MAX_TOKENS = 65536
MODES = "nvfp4 x nvfp4 (with or without per_token_scale), mxfp8 x mxfp4, bf16 x mxfp4, bf16 x nvfp4"

_ALIGNED_DEVICES = frozenset(("cuda",))  # CPU kernels take any address: weights in a mapped file start anywhere
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_FORMATS = {
    torch.bfloat16: ActivationFormat.bf16,
    torch.float8_e4m3fn: ActivationFormat.mxfp8,
    torch.uint8: ActivationFormat.nvfp4,
}
_HIDDEN_STATES = (
    "bfloat16 [num_tokens, hidden_size], float8_e4m3fn [num_tokens, hidden_size] (mxfp8) "
    "or uint8 [num_tokens, hidden_size/2] (nvfp4, packed e2m1)"
)
# What comes anew with every call, and is read while results are written.
PER_CALL = ("hidden_states", "hidden_states_scale", "routing_logits", "per_token_scale")
_METHODS = {int(method): method for method in RoutingMethodType}
_ACTIVATIONS = {int(activation): activation for activation in ActivationType} | {9: ActivationType.Identity}
_problem = functools.lru_cache(maxsize=4096)(Problem)

Labels = dict[str, tuple[str, ...]]


def _labels(is_gated: bool, block_size: int) -> Labels:
    """Names of every tensor's dimensions, for messages."""
    rows = "2*intermediate_size" if is_gated else "intermediate_size"
    gate_parameters = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
    output_scales = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
    return dict.fromkeys(gate_parameters + output_scales, ("local_num_experts",)) | {
        "routing_logits": ("num_tokens", "num_experts"),
        "routing_bias": ("num_experts",),
        "gemm1_weights": ("local_num_experts", rows, "hidden_size/2"),
        "gemm1_weights_scale": ("local_num_experts", rows, f"hidden_size/{block_size}"),
        "gemm1_bias": ("local_num_experts", rows),
        "gemm2_weights": ("local_num_experts", "hidden_size", "intermediate_size/2"),
        "gemm2_weights_scale": ("local_num_experts", "hidden_size", f"intermediate_size/{block_size}"),
        "gemm2_bias": ("local_num_experts", "hidden_size"),
        "per_token_scale": ("num_tokens",),
        "output": ("num_tokens", "at most hidden_size"),
        "routing_replay_out": ("at least num_tokens", "top_k"),
    }


_LABELS = {(is_gated, block): _labels(is_gated, block) for is_gated in (False, True) for block in (16, 32)}
_HIDDEN_SCALE_LABELS = {
    ActivationFormat.mxfp8: {"hidden_states_scale": ("num_tokens", "hidden_size/32")},
    ActivationFormat.nvfp4: {"hidden_states_scale": ("num_tokens", "hidden_size/16")},
}


def validate(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor | None,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor | None,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm1_bias: torch.Tensor | None,
    gemm1_alpha: torch.Tensor | None,
    gemm1_beta: torch.Tensor | None,
    gemm1_clamp_limit: torch.Tensor | None,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    gemm2_bias: torch.Tensor | None,
    output1_scale_scalar: torch.Tensor | None,
    output1_scale_gate_scalar: torch.Tensor | None,
    output2_scale_scalar: torch.Tensor | None,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None,
    routing_method_type: RoutingMethodType | int = 0,
    do_finalize: bool = True,
    enable_pdl: bool | None = None,
    activation_type: ActivationType | int = 3,
    per_token_scale: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
    tune_max_num_tokens: int = 8192,
    norm_topk_prob: bool = True,
    routing_replay_out: torch.Tensor | None = None,
) -> Problem:
    """Check a call of :func:`tvmmoe.trtllm_fp4_block_scale_moe`, whose arguments these are.

    Fake and meta tensors pass if their shapes do; their memory is not asked for. What a routing method ignores (bias,
    groups) may be given, as in FlashInfer, and ``output`` is not looked at with ``do_finalize=False``.

    Returns
    -------
    Problem
        Equal calls get the same object.

    Raises
    ------
    DtypeError
        A wrong Python type or tensor dtype.
    ShapeError
        A tensor's shape does not follow from the others.
    ArgumentError
        A value out of range; arguments that contradict each other; a tensor on another device, not contiguous,
        misaligned, or in memory that is written.
    UnsupportedError
        A combination of formats, or an activation, that this package does not have.
    """
    method, activation, n_group, topk_group = _check_options(
        num_experts, top_k, n_group, topk_group, intermediate_size, local_expert_offset, local_num_experts,
        routed_scaling_factor, routing_method_type, do_finalize, enable_pdl, activation_type, tune_max_num_tokens,
        norm_topk_prob,
    )  # fmt: skip
    form, num_tokens, hidden_size, device = _check_hidden_states(hidden_states)
    is_gated = activation.is_gated
    # Before the scales: both weights together tell whether it is hidden_states that is unpacked.
    _check_weights(
        hidden_states, hidden_size, intermediate_size, local_num_experts, is_gated, device, gemm1_weights, gemm2_weights
    )
    if hidden_states_scale is not None or per_token_scale is not None or form is not ActivationFormat.bf16:
        _check_activation_scales(form, num_tokens, hidden_size, device, hidden_states_scale, per_token_scale)
    weight_format = _weight_format(form, gemm1_weights_scale, hidden_size)
    block_size = weight_format.block_size
    labels = _LABELS[is_gated, block_size]
    rows = intermediate_size * 2 if is_gated else intermediate_size
    note = " (mxfp4; nvfp4 has hidden_size/16 columns)" if form is ActivationFormat.bf16 else ""
    shape = (local_num_experts, rows, hidden_size // block_size)
    _expect("gemm1_weights_scale", gemm1_weights_scale, SCALE_BYTES, shape, device, labels, note=note)
    shape = (local_num_experts, hidden_size, intermediate_size // block_size)
    _expect("gemm2_weights_scale", gemm2_weights_scale, SCALE_BYTES, shape, device, labels)
    if gemm1_bias is not None:
        _expect("gemm1_bias", gemm1_bias, FLOAT32, (local_num_experts, rows), device, labels)
    if gemm2_bias is not None:
        _expect("gemm2_bias", gemm2_bias, FLOAT32, (local_num_experts, hidden_size), device, labels)
    _expect("routing_logits", routing_logits, FLOATS, (num_tokens, num_experts), device, labels)
    if routing_bias is not None:
        _expect("routing_bias", routing_bias, FLOATS, (num_experts,), device, labels)
    per_expert = (local_num_experts,)
    is_nvfp4 = form is ActivationFormat.nvfp4
    if is_nvfp4 or output1_scale_scalar is not None:
        _expect("output1_scale_scalar", output1_scale_scalar, FLOAT32, per_expert, device, labels)
    if is_nvfp4 or output1_scale_gate_scalar is not None:
        _expect("output1_scale_gate_scalar", output1_scale_gate_scalar, FLOAT32, per_expert, device, labels)
    if is_nvfp4 or output2_scale_scalar is not None:
        _expect("output2_scale_scalar", output2_scale_scalar, FLOAT32, per_expert, device, labels)
    if gemm1_alpha is not None:
        _check_gate_parameter("gemm1_alpha", gemm1_alpha, per_expert, device, labels, activation)
    if gemm1_beta is not None:
        _check_gate_parameter("gemm1_beta", gemm1_beta, per_expert, device, labels, activation)
    if gemm1_clamp_limit is not None:
        _check_gate_parameter("gemm1_clamp_limit", gemm1_clamp_limit, per_expert, device, labels, activation)
    output_hidden_size = hidden_size
    if not do_finalize:
        output = None
    elif output is not None:
        output_hidden_size = _check_output(output, num_tokens, hidden_size, device, labels)
    if routing_replay_out is not None:
        _check_replay(routing_replay_out, num_tokens, top_k, device, labels)
    is_real = device.type != "meta" and (type(hidden_states) in _PLAIN or has_memory(type(hidden_states)))
    if is_real:
        tensors = (
            routing_logits, routing_bias, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm1_bias,
            gemm1_alpha, gemm1_beta, gemm1_clamp_limit, gemm2_weights, gemm2_weights_scale, gemm2_bias, output1_scale_scalar,
            output1_scale_gate_scalar, output2_scale_scalar, per_token_scale, output, routing_replay_out,
        )  # fmt: skip
        if num_tokens and not all(tensor is None or tensor.data_ptr() for tensor in tensors):
            refusals.refuse_freed(dict(zip(_TENSORS, tensors, strict=True)))
    if is_real and (output is not None or routing_replay_out is not None):
        per_call = (hidden_states, hidden_states_scale, routing_logits, per_token_scale)
        _check_overlap(output, routing_replay_out, per_call)
    if is_real and is_alignment_checked(device):
        _check_alignment(hidden_states, gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale, output)
    make = _problem if is_real else Problem  # sizes of fake tensors may be symbols, which have no hash
    return make(
        num_tokens, hidden_size, intermediate_size, num_experts, top_k, local_expert_offset, local_num_experts,
        n_group, topk_group, output_hidden_size, method, activation, form, weight_format,
        1.0 if routed_scaling_factor is None else float(routed_scaling_factor), norm_topk_prob, do_finalize,
        enable_pdl is not False, per_token_scale is not None, device,
    )  # fmt: skip


NAMES = tuple(inspect.signature(validate).parameters)
_TENSORS = tuple(name for name, of in inspect.signature(validate).parameters.items() if "Tensor" in str(of.annotation))


def is_alignment_checked(device: torch.device) -> bool:
    """Whether kernels of this device need the addresses of ``refusals.ALIGNMENT``."""
    return device.type in _ALIGNED_DEVICES


def _check_options(
    num_experts: Any,
    top_k: Any,
    n_group: Any,
    topk_group: Any,
    intermediate_size: Any,
    local_expert_offset: Any,
    local_num_experts: Any,
    routed_scaling_factor: Any,
    routing_method_type: Any,
    do_finalize: Any,
    enable_pdl: Any,
    activation_type: Any,
    tune_max_num_tokens: Any,
    norm_topk_prob: Any,
) -> tuple[RoutingMethodType, ActivationType, int, int]:
    """Everything that is not a tensor; the method, the activation, n_group and topk_group (0: no groups)."""
    if not (
        type(num_experts) is type(top_k) is type(intermediate_size) is int
        and type(local_expert_offset) is type(local_num_experts) is type(tune_max_num_tokens) is int
        and 1 <= top_k <= num_experts <= MAX_EXPERTS
        and top_k <= MAX_TOP_K
        and 1 <= local_num_experts
        and 0 <= local_expert_offset <= num_experts - local_num_experts
        and 0 < intermediate_size <= MAX_SIZE
        and intermediate_size % SIZE_MULTIPLE == 0
        and tune_max_num_tokens > 0
        and type(do_finalize) is type(norm_topk_prob) is bool
        and (enable_pdl is None or type(enable_pdl) is bool)
        and (n_group is None or (type(n_group) is int and n_group >= 0))
        and (topk_group is None or (type(topk_group) is int and topk_group >= 0))
        and (routed_scaling_factor is None or type(routed_scaling_factor) is float)
        and (routed_scaling_factor is None or -FLOAT32_MAX <= routed_scaling_factor <= FLOAT32_MAX)
    ):
        refusals.refuse_options(
            num_experts, top_k, n_group, topk_group, intermediate_size, local_expert_offset, local_num_experts,
            routed_scaling_factor, do_finalize, enable_pdl, tune_max_num_tokens, norm_topk_prob,
        )  # fmt: skip
    method, activation = routing_method_type, activation_type
    if type(method) is not RoutingMethodType:
        method = _METHODS.get(method) if type(method) is int else None
        if method is None:
            method = refusals.routing_method(routing_method_type)
    if type(activation) is not ActivationType:
        activation = _ACTIVATIONS.get(activation) if type(activation) is int else None
        if activation is None:
            activation = refusals.activation_type(activation_type)
    if method is RoutingMethodType.Llama4 and top_k != 1:
        raise ArgumentError(f"top_k: got {top_k}, expected 1 (routing_method_type Llama4)")
    if method is not RoutingMethodType.DeepSeekV3 or not (n_group or topk_group):
        return method, activation, 0, 0
    return method, activation, *_groups(num_experts, top_k, n_group or 0, topk_group or 0)


def _groups(num_experts: int, top_k: int, n_group: int, topk_group: int) -> tuple[int, int]:
    """Expert groups of DeepSeekV3; (0, 0) for one group."""
    if n_group <= 1:
        if topk_group > 1:
            raise ArgumentError(f"topk_group: got {topk_group} with n_group {n_group}, expected None, 0 or 1")
        return 0, 0
    group_size = num_experts // n_group
    if num_experts % n_group or group_size < 2:
        raise ArgumentError(
            f"n_group: got {n_group}, expected a divisor of num_experts={num_experts} with two or more experts a group"
        )
    if not 1 <= topk_group <= n_group:
        raise ArgumentError(f"topk_group: got {topk_group}, expected 1 ... n_group={n_group}")
    if top_k > topk_group * group_size:
        raise ArgumentError(
            f"top_k: got {top_k}, expected at most topk_group*num_experts/n_group={topk_group * group_size}"
        )
    return n_group, topk_group


def _check_hidden_states(hidden_states: Any) -> tuple[ActivationFormat, int, int, torch.device]:
    """Format, num_tokens, hidden_size and device, which every other tensor is compared with."""
    if type(hidden_states) not in _PLAIN and not is_tensor(hidden_states):
        raise DtypeError(f"hidden_states: got {describe(hidden_states)}, expected {_HIDDEN_STATES}")
    form = _FORMATS.get(hidden_states.dtype)
    if form is None or hidden_states.layout is not torch.strided:
        hint = ""
        if hidden_states.dtype in (torch.float16, torch.float32):
            hint = " (convert with .bfloat16(), or quantize with tvmmoe.numerics)"
        elif hidden_states.dtype in (torch.int8, E2M1_PAIR):
            hint = " (call .view(torch.uint8))"
        raise DtypeError(f"hidden_states: got {describe(hidden_states)}, expected {_HIDDEN_STATES}{hint}")
    shape = hidden_states.shape
    if len(shape) != 2:
        raise ShapeError(f"hidden_states: got {describe(hidden_states)}, expected {_HIDDEN_STATES}")
    num_tokens, hidden_size = shape
    if form is ActivationFormat.nvfp4:
        hidden_size *= 2
    if num_tokens > MAX_TOKENS:
        raise ArgumentError(f"hidden_states: got {describe(hidden_states)}, expected at most {MAX_TOKENS} tokens a call")
    if hidden_size % SIZE_MULTIPLE or not 0 < hidden_size <= MAX_SIZE:
        expected = f"expected a positive multiple of {SIZE_MULTIPLE}, at most {MAX_SIZE}"
        raise ShapeError(f"hidden_states: got {describe(hidden_states)}, hidden_size={hidden_size}, {expected}")
    if not hidden_states.is_contiguous():
        raise ArgumentError(refusals.not_contiguous("hidden_states", hidden_states))
    return form, num_tokens, hidden_size, hidden_states.device


def _check_activation_scales(
    form: ActivationFormat,
    num_tokens: int,
    hidden_size: int,
    device: torch.device,
    block_scale: Any,
    per_token_scale: Any,
) -> None:
    if form is not ActivationFormat.bf16:
        shape = (num_tokens, hidden_size // (16 if form is ActivationFormat.nvfp4 else 32))
        _expect("hidden_states_scale", block_scale, SCALE_BYTES, shape, device, _HIDDEN_SCALE_LABELS[form])
    elif block_scale is not None:
        raise ArgumentError(
            f"hidden_states_scale: got {describe(block_scale)} with bfloat16 hidden_states, expected None "
            "(bfloat16 is not block-scaled; to ignore a scale, as FlashInfer does, would hide a forgotten quantization)"
        )
    if per_token_scale is not None:
        if form is not ActivationFormat.nvfp4:
            got = f"got {describe(per_token_scale)} with {form.name} hidden_states"
            raise UnsupportedError(f"per_token_scale: {got}, expected None (modes: {MODES})")
        _expect("per_token_scale", per_token_scale, FLOAT32, (num_tokens,), device, _LABELS[True, 16])


def _weight_format(form: ActivationFormat, gemm1_weights_scale: Any, hidden_size: int) -> WeightFormat:
    """Told from the last dimension of the scales; where that says neither, what ``form`` goes with."""
    columns = _size(gemm1_weights_scale, -1)
    if columns * 16 == hidden_size:
        weight_format = WeightFormat.nvfp4
    elif columns * 32 == hidden_size:
        weight_format = WeightFormat.mxfp4
    else:
        return WeightFormat.nvfp4 if form is ActivationFormat.nvfp4 else WeightFormat.mxfp4
    partner = WeightFormat.nvfp4 if form is ActivationFormat.nvfp4 else WeightFormat.mxfp4
    if weight_format is not partner and form is not ActivationFormat.bf16:
        raise UnsupportedError(
            f"gemm1_weights_scale: got {describe(gemm1_weights_scale)}, block size {weight_format.block_size} of "
            f"{weight_format.name} weights, with {form.name} hidden_states, expected one of {MODES}"
        )
    return weight_format


def _size(tensor: Any, dim: int) -> int:
    """A size of what may be no tensor at all: then -1, and :func:`_expect` says what is wrong."""
    try:
        return tensor.size(dim)
    except (AttributeError, TypeError, IndexError, RuntimeError):
        return -1


def _check_weights(
    hidden_states: torch.Tensor,
    hidden_size: int,
    intermediate_size: int,
    local_num_experts: int,
    is_gated: bool,
    device: torch.device,
    gemm1_weights: Any,
    gemm2_weights: Any,
) -> None:
    labels = _LABELS[is_gated, 32]
    shape1 = (local_num_experts, intermediate_size * 2 if is_gated else intermediate_size, hidden_size // 2)
    shape2 = (local_num_experts, hidden_size, intermediate_size // 2)
    try:
        _expect("gemm1_weights", gemm1_weights, PACKED, shape1, device, labels)
        _expect("gemm2_weights", gemm2_weights, PACKED, shape2, device, labels)
    except ShapeError:
        refusals.refuse_sizes(hidden_states, gemm1_weights, gemm2_weights, shape1, shape2, is_gated)
        raise


def _check_gate_parameter(
    name: str, tensor: Any, shape: tuple[int, ...], device: torch.device, labels: Labels, activation: ActivationType
) -> None:
    if not activation.is_gated:
        got = f"got {describe(tensor)} with activation_type {activation.name}"
        raise ArgumentError(f"{name}: {got}, expected None (only the gated Swiglu and Geglu use it)")
    _expect(name, tensor, FLOAT32, shape, device, labels)


def _check_output(output: Any, num_tokens: int, hidden_size: int, device: torch.device, labels: Labels) -> int:
    """The width of ``output``, which may drop columns at the end."""
    width = _size(output, -1)
    largest = (num_tokens, hidden_size)
    shape = (num_tokens, width) if 1 <= width <= hidden_size else largest
    _expect("output", output, BF16, shape, device, labels, largest)
    return width


def _check_replay(replay: Any, num_tokens: int, top_k: int, device: torch.device, labels: Labels) -> None:
    rows = _size(replay, 0)
    smallest = (num_tokens, top_k)
    shape = (rows, top_k) if rows > num_tokens else smallest
    _expect("routing_replay_out", replay, INT16, shape, device, labels, smallest)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    start_a, start_b = a.data_ptr(), b.data_ptr()
    return start_a < start_b + b.nbytes and start_b < start_a + a.nbytes


def _check_overlap(output: Any, replay: Any, per_call: tuple[Any, ...]) -> None:
    """What is written, against each other and against the tensors that come anew with every call."""
    if output is not None and replay is not None and _overlap(output, replay):
        refusals.refuse_overlap("routing_replay_out", "output")
    for name, tensor in zip(PER_CALL, per_call, strict=True):
        if tensor is None:
            continue
        if output is not None and _overlap(output, tensor):
            refusals.refuse_overlap("output", name)
        if replay is not None and _overlap(replay, tensor):
            refusals.refuse_overlap("routing_replay_out", name)


def _check_alignment(
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    output: torch.Tensor | None,
) -> None:
    """The largest alignments of ``refusals.ALIGNMENT`` at once."""
    words = hidden_states.data_ptr() | gemm1_weights.data_ptr() | gemm2_weights.data_ptr()
    if output is not None:
        words |= output.data_ptr()
    if words & 15 or (gemm1_weights_scale.data_ptr() | gemm2_weights_scale.data_ptr()) & 7:
        tensors = (hidden_states, gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale, output)
        refusals.refuse_alignment(tensors)


def _expect(
    name: str,
    tensor: Any,
    dtypes: frozenset[torch.dtype],
    shape: tuple[int, ...],
    device: torch.device,
    labels: Labels,
    nominal: tuple[int, ...] | None = None,
    note: str = "",
) -> None:
    """Pass a contiguous tensor of one of ``dtypes``, this shape, on this device; ``nominal`` is the shape to name."""
    try:
        if (
            type(tensor) in _PLAIN
            and tensor.dtype in dtypes
            and tensor.shape == shape
            and tensor.device == device
            and tensor.is_contiguous()
        ):
            return
    except RuntimeError:  # sparse and nested tensors lack some of these
        pass
    refusals.refuse_tensor(name, tensor, dtypes, shape, device, labels[name], nominal or shape, note)
