# SPDX-License-Identifier: Apache-2.0
"""The operator in plain float32 torch, one function per stage: the oracle of the tests, on the CPU and on CUDA.

    route_ref -> permute_ref -> dequantize_hidden_ref -> gemm1_ref -> requantize_ref -> gemm2_ref -> finalize_ref

Stages of one expert take that expert's tensors and the rows routed to it; :func:`moe_ref` loops over the local experts
and decodes one expert's weights at a time. Nothing is validated here. Semantics: the documented call in tvmmoe/op.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from tvmmoe import numerics
from tvmmoe.config import ActivationFormat, ActivationType
from tvmmoe.config import RoutingMethodType as Method
from tvmmoe.workspace import max_num_tiles

E4M3_MAX = 448.0
E2M1_MAX = 6.0
CLOSED = -(2**40)  # below every int32 key: an expert outside the chosen groups


class Permutation(NamedTuple):
    """Rows in expert order; the fields of :func:`permute_ref`, int32."""

    expanded_idx_to_permuted_idx: torch.Tensor  # [T * top_k]; -1: not a local expert
    permuted_idx_to_token_idx: torch.Tensor  # [max_num_padded_tokens]; -1: padding
    tile_expert: torch.Tensor  # [max_num_padded_tokens / tile_m] local expert; -1: tile not in use
    num_tiles: int  # tiles in use, at the front
    max_num_padded_tokens: int


def sortable_key(x: torch.Tensor) -> torch.Tensor:
    """int64 whose order is the order of the float32 bits: +0 above -0, NaN with a clear sign bit above +inf."""
    bits = x.float().view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()


def sigmoid_ref(x: torch.Tensor) -> torch.Tensor:
    """0.5 * tanh(x / 2) + 0.5 in float32, tanh rounded once from float64."""
    return 0.5 * torch.tanh(0.5 * x.double()).float() + 0.5


def _best(key: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest keys of every row, descending; ties to the lower index."""
    return torch.sort(key, dim=-1, descending=True, stable=True).indices[..., :count]


def _open_groups(score: torch.Tensor, n_group: int, topk_group: int) -> torch.Tensor:
    """bool [T, E]: experts in the ``topk_group`` groups with the largest sum of two scores."""
    num_tokens, num_experts = score.shape
    # Two more scores of -inf: what a group of one lacks, and the floor below which a score does not count.
    grouped = F.pad(score.view(num_tokens, n_group, num_experts // n_group), (0, 2), value=float("-inf"))
    best_two = grouped.gather(-1, _best(sortable_key(grouped), 2))
    chosen = _best(sortable_key(best_two[..., 0] + best_two[..., 1]), topk_group)
    is_open = torch.zeros(num_tokens, n_group, dtype=torch.bool, device=score.device).scatter(1, chosen, True)
    return is_open.repeat_interleave(num_experts // n_group, dim=1)


def _routing_score(x: torch.Tensor, bias: torch.Tensor | None, method: Method, is_grouped: bool) -> torch.Tensor:
    """float32 [T, E] that experts are ranked by."""
    if method == Method.Default:
        p = torch.exp(x.double() - x.amax(-1, keepdim=True).double())
        return (p / p.cumsum(-1)[:, -1:]).float()
    if method in (Method.SigmoidRenorm, Method.Sigmoid):
        return sigmoid_ref(x)
    if method in (Method.DeepSeekV3, Method.MiniMax2):
        if bias is None:
            return sigmoid_ref(x)
        return sigmoid_ref(x) + (bias.bfloat16().float() if is_grouped else bias.float())
    return x


def _routing_weight(
    chosen: torch.Tensor, score: torch.Tensor, method: Method, routed_scaling_factor: float, norm_topk_prob: bool
) -> torch.Tensor:
    """float32 [T, top_k]: weights of the chosen logits before their rounding; sums are float64, in slot order."""
    if method == Method.Default:
        return score
    if method in (Method.Renormalize, Method.RenormalizeNaive):
        p = torch.exp(chosen.double() - chosen[:, :1].double())
        return (p / p.cumsum(-1)[:, -1:]).float()
    if method == Method.TopK:
        return chosen
    sigmoid = sigmoid_ref(chosen)
    total = sigmoid.double().cumsum(-1)[:, -1:]
    if method in (Method.DeepSeekV3, Method.MiniMax2):
        return (sigmoid.double() * routed_scaling_factor / (total + 1e-20)).float()
    if method == Method.SigmoidRenorm and norm_topk_prob:
        return (sigmoid.double() / total.clamp(min=1e-20)).float()
    return sigmoid


def route_ref(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor | None,
    *,
    top_k: int,
    routing_method_type: Method | int,
    n_group: int | None = None,
    topk_group: int | None = None,
    routed_scaling_factor: float | None = None,
    norm_topk_prob: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose ``top_k`` experts per token.

    Parameters
    ----------
    routing_logits : float32 or bfloat16 [T, num_experts]
    routing_bias : float32 or bfloat16 [num_experts], optional
        DeepSeekV3 and MiniMax2 only. With groups it is rounded to bfloat16 first.

    Returns
    -------
    topk_ids : int32 [T, top_k]
        Descending key, ties to the lower id.
    topk_weights : bfloat16 [T, top_k]
    """
    method = Method(routing_method_type)
    x = routing_logits.float()
    if method == Method.Llama4:  # ignores NaN
        x = torch.where(x.isnan(), float("-inf"), x)
    is_grouped = method == Method.DeepSeekV3 and (n_group or 0) > 1
    score = _routing_score(x, routing_bias, method, is_grouped)
    key = sortable_key(score)
    if is_grouped:
        key = torch.where(_open_groups(score, n_group, topk_group), key, CLOSED)
    ids = _best(key, top_k)
    scale = 1.0 if routed_scaling_factor is None else float(routed_scaling_factor)
    weights = _routing_weight(x.gather(1, ids), score.gather(1, ids), method, scale, norm_topk_prob)
    return ids.int(), weights.bfloat16()


def permute_ref(
    topk_ids: torch.Tensor, *, local_expert_offset: int = 0, local_num_experts: int, tile_m: int = 8
) -> Permutation:
    """Rows of ``gemm2_output`` for every (token, slot) pair of a local expert.

    Experts ascend, rows of an expert follow expanded_idx, and every expert starts at a multiple of ``tile_m``.

    Parameters
    ----------
    topk_ids : int32 [T, top_k]
        Global expert ids.
    """
    num_tokens, top_k = topk_ids.shape
    device = topk_ids.device
    num_tiles_bound = max_num_tiles(num_tokens * top_k, local_num_experts, tile_m)
    to_permuted = torch.full((num_tokens * top_k,), -1, dtype=torch.int32, device=device)
    to_token = torch.full((num_tiles_bound * tile_m,), -1, dtype=torch.int32, device=device)
    tile_expert = torch.full((num_tiles_bound,), -1, dtype=torch.int32, device=device)
    expert = topk_ids.flatten() - local_expert_offset
    num_tiles = 0
    for e in range(local_num_experts):
        expanded_idx = (expert == e).nonzero().flatten()
        count = expanded_idx.numel()
        first = num_tiles * tile_m
        to_permuted[expanded_idx] = torch.arange(first, first + count, dtype=torch.int32, device=device)
        to_token[first : first + count] = (expanded_idx // top_k).int()
        tiles = (count + tile_m - 1) // tile_m
        tile_expert[num_tiles : num_tiles + tiles] = e
        num_tiles += tiles
    return Permutation(to_permuted, to_token, tile_expert, num_tiles, num_tiles_bound * tile_m)


def activation_format_of(hidden_states: torch.Tensor) -> ActivationFormat:
    """Format of ``hidden_states``, which its dtype tells."""
    formats = {
        torch.uint8: ActivationFormat.nvfp4,
        torch.float8_e4m3fn: ActivationFormat.mxfp8,
        torch.bfloat16: ActivationFormat.bf16,
    }
    return formats[hidden_states.dtype]


def dequantize_hidden_ref(hidden_states: torch.Tensor, hidden_states_scale: torch.Tensor | None) -> torch.Tensor:
    """float32 [T, hidden_size]: elements times block scales, without ``per_token_scale`` and global factors."""
    activation_format = activation_format_of(hidden_states)
    if activation_format == ActivationFormat.nvfp4:
        return numerics.dequantize_nvfp4(hidden_states, hidden_states_scale.view(torch.float8_e4m3fn))
    if activation_format == ActivationFormat.mxfp8:
        return numerics.dequantize_mxfp8(hidden_states, hidden_states_scale.view(torch.uint8))
    return hidden_states.float()


def dequantize_weight_ref(weights: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """float32 [rows, columns] of one expert's packed e2m1 [rows, columns / 2]; blocks of 16 are nvfp4, of 32 mxfp4."""
    if 2 * weights.shape[-1] == 16 * block_scale.shape[-1]:
        return numerics.dequantize_nvfp4(weights, block_scale.view(torch.float8_e4m3fn))
    return numerics.dequantize_mxfp4(weights, block_scale.view(torch.uint8))


def _matmul(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x weight^T accumulated in ``dtype``; in float64 on CUDA, where float32 may mean TF32."""
    compute = torch.float64 if x.is_cuda else dtype
    return (x.to(compute) @ weight.to(compute).T).to(dtype)


def activation_ref(
    up: torch.Tensor,
    gate: torch.Tensor | None,
    activation: ActivationType | int,
    *,
    scale: torch.Tensor | float = 1.0,
    scale_gate: torch.Tensor | float = 1.0,
    alpha: torch.Tensor | float | None = None,
    beta: torch.Tensor | float | None = None,
    clamp_limit: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """z from gemm1's accumulators with bias; ``gate`` is None where the activation has none.

    ``scale`` is output1_scale_scalar and ``scale_gate`` output1_scale_gate_scalar, of one expert like the other
    parameters. The clamp and beta are in raw units.
    """
    activation = ActivationType(activation)
    if activation == ActivationType.Identity:
        return scale * up
    if activation == ActivationType.Relu2:
        return scale * torch.relu(scale_gate * up) ** 2
    if clamp_limit is not None:
        limit = float(clamp_limit)
        up, gate = up.clamp(-limit, limit), gate.clamp(max=limit)
    if beta is not None:
        up = up + beta
    gate = scale_gate * gate
    argument = gate if alpha is None else alpha * gate
    if activation == ActivationType.Geglu:
        return scale * up * gate * (0.5 * (1 + torch.erf(argument * 0.5**0.5)))
    return scale * up * gate * torch.sigmoid(argument)


def gemm1_ref(
    x: torch.Tensor,
    weights: torch.Tensor,
    weights_scale: torch.Tensor,
    activation: ActivationType | int,
    *,
    per_token_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    **activation_parameters: torch.Tensor | float | None,
) -> torch.Tensor:
    """z of one expert: activation(x W1^T * per_token_scale + bias).

    Parameters
    ----------
    x : float32 [n, hidden_size]
        Decoded rows of the tokens routed to the expert.
    weights, weights_scale : uint8 [F * intermediate_size, hidden_size / 2], scale bytes [F * intermediate_size, blocks]
        Rows [up; gate] when the activation is gated.
    per_token_scale : float32 [n], optional
    bias : float32 [F * intermediate_size], optional
    activation_parameters
        Keywords of :func:`activation_ref`.

    Returns
    -------
    z : ``dtype`` [n, intermediate_size]
        Not rounded yet; see :func:`requantize_ref`.
    """
    acc = _matmul(x, dequantize_weight_ref(weights, weights_scale), dtype)
    if per_token_scale is not None:
        acc = acc * per_token_scale[:, None]
    if bias is not None:
        acc = acc + bias
    up, gate = acc.chunk(2, dim=-1) if ActivationType(activation).is_gated else (acc, None)
    return activation_ref(up, gate, activation, **activation_parameters)


def _to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to the nearest e4m3 value, saturating."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def _to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to the nearest e2m1 value, saturating."""
    return numerics.decode_e2m1(numerics.encode_e2m1(x))


def _nonzero(divisor: torch.Tensor) -> torch.Tensor:
    """The divisor, or 1 where it is 0: such a block is multiplied by a scale of 0 afterwards."""
    return torch.where(divisor == 0, 1.0, divisor)


def _power_of_two_not_below(x: torch.Tensor) -> torch.Tensor:
    """2^max(ceil(log2(x)), -127), and 2^-127 for 0."""
    bits = x.view(torch.int32).long()
    byte = torch.where(bits <= 1 << 22, 0, (bits + 0x7FFFFF) >> 23).clamp(max=254)  # of 2^(byte - 127)
    return torch.where(byte == 0, 1 << 22, byte << 23).int().view(torch.float32)


def requantize_ref(
    z: torch.Tensor, activation_format: ActivationFormat, *, is_per_token: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What gemm2 reads of z: rounded to bfloat16, then quantised to the activation format.

    Parameters
    ----------
    z : float32 [n, intermediate_size]
    is_per_token : bool
        nvfp4 with a factor per row: the mode of a call with ``per_token_scale``.

    Returns
    -------
    value : float32 [n, intermediate_size]
        Elements times block scales, exact.
    row_scale : float32 [n]
        Factor of gemm2's accumulators, 1 unless ``is_per_token``.
    """
    z = z.bfloat16().float()
    row_scale = torch.ones(z.shape[0], dtype=torch.float32, device=z.device)
    if activation_format == ActivationFormat.bf16:
        return z, row_scale
    blocks = z.unflatten(-1, (-1, 16 if activation_format == ActivationFormat.nvfp4 else 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    if activation_format == ActivationFormat.mxfp8:
        scale = _power_of_two_not_below(amax / E4M3_MAX)
        return (_to_e4m3(blocks / scale) * scale).flatten(-2), row_scale
    if is_per_token:
        row_scale = z.abs().amax(-1) / (E4M3_MAX * E2M1_MAX)
        p = row_scale[:, None, None]
        scale = _to_e4m3(amax / E2M1_MAX / _nonzero(p))
        return (_to_e2m1(blocks / _nonzero(scale * p)) * scale).flatten(-2), row_scale
    scale = _to_e4m3(amax / E2M1_MAX)
    return (_to_e2m1(blocks / _nonzero(scale)) * scale).flatten(-2), row_scale


def gemm2_ref(
    x: torch.Tensor,
    weights: torch.Tensor,
    weights_scale: torch.Tensor,
    *,
    row_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """y of one expert, bfloat16 [n, hidden_size]: scale * (x W2^T * row_scale + bias).

    ``x`` and ``row_scale`` come from :func:`requantize_ref`; ``scale`` is output2_scale_scalar of the expert.
    """
    acc = _matmul(x, dequantize_weight_ref(weights, weights_scale), dtype)
    if row_scale is not None:
        acc = acc * row_scale[:, None]
    if bias is not None:
        acc = acc + bias
    return (scale * acc).bfloat16()


def finalize_ref(
    gemm2_output: torch.Tensor,
    topk_weights: torch.Tensor,
    expanded_idx_to_permuted_idx: torch.Tensor,
    output_hidden_size: int | None = None,
) -> torch.Tensor:
    """bfloat16 [T, output_hidden_size]: sum of weight times row in float32, slots ascending, -1 skipped."""
    rows = expanded_idx_to_permuted_idx.view(topk_weights.shape).long()
    gemm2_output = gemm2_output[:, :output_hidden_size].float()
    total = torch.zeros(rows.shape[0], gemm2_output.shape[1], dtype=torch.float32, device=rows.device)
    for k in range(rows.shape[1]):
        tokens = (rows[:, k] >= 0).nonzero().flatten()
        total[tokens] += topk_weights[tokens, k, None].float() * gemm2_output[rows[tokens, k]]
    return total.bfloat16()


def moe_ref(
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
    routing_method_type: Method | int = 0,
    do_finalize: bool = True,
    enable_pdl: bool | None = None,
    activation_type: ActivationType | int = 3,
    per_token_scale: torch.Tensor | None = None,
    output: torch.Tensor | None = None,
    tune_max_num_tokens: int = 8192,
    norm_topk_prob: bool = True,
    routing_replay_out: torch.Tensor | None = None,
    *,
    tile_m: int = 8,
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """The operator; arguments and result of :func:`tvmmoe.trtllm_fp4_block_scale_moe`.

    Parameters
    ----------
    tile_m : int
        Rows that an expert's segment of ``gemm2_output`` is padded to, with ``do_finalize=False``.
    dtype : torch.dtype
        What GEMMs accumulate and epilogues compute in: float32 or float64.
    """
    num_tokens, hidden_size = hidden_states.shape[0], 2 * gemm1_weights.shape[-1]
    topk_ids, topk_weights = route_ref(
        routing_logits,
        routing_bias,
        top_k=top_k,
        routing_method_type=routing_method_type,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=routed_scaling_factor,
        norm_topk_prob=norm_topk_prob,
    )
    if routing_replay_out is not None:
        routing_replay_out[:num_tokens] = topk_ids.short()
    maps = permute_ref(
        topk_ids, local_expert_offset=local_expert_offset, local_num_experts=local_num_experts, tile_m=tile_m
    )
    x = dequantize_hidden_ref(hidden_states, hidden_states_scale)
    gemm2_output = x.new_zeros(maps.max_num_padded_tokens, hidden_size, dtype=torch.bfloat16)
    row_expert = maps.tile_expert.repeat_interleave(tile_m)
    row_token = maps.permuted_idx_to_token_idx.long()

    def of(tensor: torch.Tensor | None, e: int, absent: float | None = None) -> torch.Tensor | float | None:
        return absent if tensor is None else tensor[e]

    for e in maps.tile_expert[: maps.num_tiles].unique().tolist():
        rows = ((row_expert == e) & (row_token >= 0)).nonzero().flatten()
        tokens = row_token[rows]
        z = gemm1_ref(
            x[tokens],
            gemm1_weights[e],
            gemm1_weights_scale[e],
            activation_type,
            per_token_scale=of(per_token_scale, tokens),
            bias=of(gemm1_bias, e),
            dtype=dtype,
            scale=of(output1_scale_scalar, e, 1.0),
            scale_gate=of(output1_scale_gate_scalar, e, 1.0),
            alpha=of(gemm1_alpha, e),
            beta=of(gemm1_beta, e),
            clamp_limit=of(gemm1_clamp_limit, e),
        )
        z, row_scale = requantize_ref(z, activation_format_of(hidden_states), is_per_token=per_token_scale is not None)
        gemm2_output[rows] = gemm2_ref(
            z,
            gemm2_weights[e],
            gemm2_weights_scale[e],
            row_scale=row_scale,
            bias=of(gemm2_bias, e),
            scale=of(output2_scale_scalar, e, 1.0),
            dtype=dtype,
        )
    if not do_finalize:
        return [gemm2_output, topk_weights, maps.expanded_idx_to_permuted_idx]
    output_hidden_size = hidden_size if output is None else output.shape[1]
    result = finalize_ref(gemm2_output, topk_weights, maps.expanded_idx_to_permuted_idx, output_hidden_size)
    if output is None:
        return [result]
    return [output.copy_(result)]
