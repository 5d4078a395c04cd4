# SPDX-License-Identifier: Apache-2.0
"""The public operator, with FlashInfer's documented signature."""

from dataclasses import replace

import torch

from tvmmoe import refusals, relaunch, torch_op
from tvmmoe.arguments import MODES, NAMES, validate
from tvmmoe.config import ActivationFormat, ActivationType, RoutingMethodType, WeightFormat
from tvmmoe.errors import ArgumentError, UnsupportedError


def trtllm_fp4_block_scale_moe(
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
) -> list[torch.Tensor]:
    """Mixture of Experts on FP4 weights: route, up/gate projection, activation, down projection, weighted sum.

    T tokens, H = hidden_size, I = intermediate_size, E = num_experts over all ranks, E_loc = local_num_experts. F is 2 for a
    gated activation (Swiglu, Geglu), else 1. Activation x weight modes, told from dtypes and scale shapes:

    =====================  ==================================================  =============================
    hidden_states          hidden_states_scale                                 weights, block
    =====================  ==================================================  =============================
    uint8 e2m1 [T, H/2]    e4m3 [T, H/16]                                      nvfp4, 16
    float8_e4m3fn [T, H]   ue8m0 [T, H/32]                                     mxfp4, 32
    bfloat16 [T, H]        None                                                mxfp4, 32 or nvfp4, 16
    =====================  ==================================================  =============================

    Parameters
    ----------
    routing_logits : float32 or bfloat16 [T, E]
    routing_bias : float32 or bfloat16 [E], optional
        Added to the selection key by DeepSeekV3 and MiniMax2; the other methods ignore it.
    hidden_states, hidden_states_scale
        See the table. Scales are linear row-major; ue8m0 and e4m3 bytes may come as uint8, float8_e8m0fnu or float8_e4m3fn.
    gemm1_weights : uint8 [E_loc, F*I, H/2]
        Two e2m1 per byte, even column in the low nibble. Plain row-major: no shuffle. Rows [0, I) are up, [I, 2I) are gate; a
        checkpoint that stores [gate; up] or interleaves them cannot be recognised by its shape: convert it with
        :mod:`tvmmoe.layouts` first.
    gemm1_weights_scale : scale bytes [E_loc, F*I, H/block]
        The block size, 16 (e4m3) or 32 (ue8m0), is inferred from the shape.
    gemm1_bias : float32 [E_loc, F*I], optional
        Added to the raw accumulator: in nvfp4 modes divide real units by output1_scale_gate_scalar.
    gemm1_alpha, gemm1_beta, gemm1_clamp_limit : float32 [E_loc], optional
        z = (up + beta) * gate * sigmoid(alpha * gate), up clamped to +-limit, gate to at most limit; beta and limit in raw
        accumulator units like the bias. Defaults 1, 0, inf.
    gemm2_weights : uint8 [E_loc, H, I/2]
    gemm2_weights_scale : scale bytes [E_loc, H, I/block]
    gemm2_bias : float32 [E_loc, H], optional
        Added to the raw accumulator: in nvfp4 modes divide real units by output2_scale_scalar.
    output1_scale_scalar, output1_scale_gate_scalar, output2_scale_scalar : float32 [E_loc]
        Factor of gemm1's result, of the gate before its non-linearity, of gemm2's result. Required for nvfp4 activations,
        otherwise None means 1.
    num_experts, top_k : int
        E <= 1024 and top_k <= 32. T is at most 65536: split what is longer. H and I are multiples of 32 below 2^17.
    n_group, topk_group : int or None
        Expert groups of DeepSeekV3: top_k is taken inside the topk_group groups with the best sum of two.
    intermediate_size : int
    local_expert_offset, local_num_experts : int
        This rank's experts, [offset, offset + E_loc). Other experts' slots contribute nothing.
    routed_scaling_factor : float or None
        Factor of the weights of DeepSeekV3 and MiniMax2; None is 1.
    routing_method_type : RoutingMethodType or int
    do_finalize : bool
        False returns the pieces instead of the sum (see Returns).
    enable_pdl : bool or None
        Programmatic dependent launch on CUDA; no effect on results.
    activation_type : ActivationType or int
        Swiglu 3, Geglu 4, Relu2 6, Identity 7 (or 9, FlashInfer's enum value).
    per_token_scale : float32 [T], optional
        Decode factor of each nvfp4 row; gemm1's result is then requantised per row.
    output : bfloat16 [T, H_out], optional
        Written in place; H_out <= H drops the last columns.
    tune_max_num_tokens : int
        Accepted for compatibility: selection is a table, nothing is tuned inside a call.
    norm_topk_prob : bool
        Read by SigmoidRenorm alone.
    routing_replay_out : int16 [>= T, top_k], optional
        Receives the chosen global expert ids.

    Returns
    -------
    list of Tensor
        ``[output]``; with ``do_finalize=False`` ``[gemm2_output, expert_weights, expanded_idx_to_permuted_idx]``: bfloat16
        [P, H] rows in expert order with zeros in the padding, bfloat16 [T, top_k], and int32 [T * top_k] with the row of each
        (token, slot) or -1.

    Raises
    ------
    DtypeError, ShapeError, ArgumentError
        One line with the argument, what it is and what was expected, before anything is launched or written.
    UnsupportedError
        A mode outside the table, or a device without an artifact.

    Notes
    -----
    Not differentiable: results have no gradients, whatever requires them. torch.compile, torch.jit.trace, make_fx, CUDA
    graphs and fake tensors are fine.
    Source of the maths: FlashInfer's operator of this name; element formats from OCP MX v1.0 and the PTX ISA.
    On sm90a ``TVMMOE_FP8=1``, read at a problem's first call, allows sums of about 13 bits for mxfp8 x mxfp4 from 48 rows an
    expert on (1e-3 to 4.6e-3 off the reference; Qwen3-235B T=1024 651 us for 714, H200). The default decodes exactly to bf16.
    """
    call = (  # spelled out: torch.compile cannot trace locals()
        routing_logits, routing_bias, hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale,
        gemm1_bias, gemm1_alpha, gemm1_beta, gemm1_clamp_limit, gemm2_weights, gemm2_weights_scale, gemm2_bias,
        output1_scale_scalar, output1_scale_gate_scalar, output2_scale_scalar, num_experts, top_k, n_group,
        topk_group, intermediate_size, local_expert_offset, local_num_experts, routed_scaling_factor,
        routing_method_type, do_finalize, enable_pdl, activation_type, per_token_scale, output, tune_max_num_tokens,
        norm_topk_prob, routing_replay_out,
    )  # fmt: skip
    if torch_op.is_traced():
        return torch_op.traced(**dict(zip(NAMES, call, strict=True)))
    known = relaunch.relaunch(call)
    if known is not None:
        return [known]
    problem = validate(*call)
    if not refusals.has_memory(type(hidden_states)):  # a FakeTensor without its mode
        return torch_op.traced(**dict(zip(NAMES, call, strict=True)))
    results = torch_op.launch(problem, dict(zip(NAMES, call, strict=True)))
    relaunch.learn(call, problem, results)
    return results


def workspace_bytes(
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    *,
    local_num_experts: int | None = None,
    activation_format: str = "bf16",
    weight_format: str = "mxfp4",
    device: torch.device | str = "cpu",
) -> int:
    """Bytes that one call takes from torch's allocator for intermediates, beside its results.

    ``activation_format`` is bf16, mxfp8 or nvfp4, ``weight_format`` mxfp4 or nvfp4; ``local_num_experts`` defaults to
    ``num_experts``. Raises what the call would: UnsupportedError where no artifact serves it, ArgumentError, DtypeError or
    ShapeError for sizes that are none.
    """
    from tvmmoe.info import problem_of
    from tvmmoe.testing import Case

    for name, value, kind in (
        ("activation_format", activation_format, ActivationFormat), ("weight_format", weight_format, WeightFormat),
    ):  # fmt: skip
        if value not in kind.__members__:
            raise ArgumentError(f"{name}: got {value!r}, expected {' or '.join(kind.__members__)}")
    if (activation_format, weight_format) in (("mxfp8", "nvfp4"), ("nvfp4", "mxfp4")):
        raise UnsupportedError(f"weight_format: got {weight_format} with {activation_format} hidden_states, expected {MODES}")
    sizes = dict(num_tokens=num_tokens, hidden_size=hidden_size, intermediate_size=intermediate_size)
    sizes |= dict(num_experts=num_experts, top_k=top_k)
    local = num_experts if local_num_experts is None else local_num_experts
    for name, value in (sizes | dict(local_num_experts=local)).items():
        refusals.require_int(name, value, 0)
    formats = dict(activation_format=ActivationFormat[activation_format], weight_format=WeightFormat[weight_format])
    problem = replace(problem_of(Case(**sizes, local_num_experts=local, **formats)), device=torch.device(device))
    if problem.device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"device: got {problem.device}, expected cpu: torch sees no CUDA device")
    return torch_op.entry_workspace_bytes(problem, torch_op.selected_entry(problem))
