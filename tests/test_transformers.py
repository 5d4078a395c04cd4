# SPDX-License-Identifier: Apache-2.0
"""The operator against the MoE modules of Hugging Face transformers, in float32 on the same quantised numbers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tvmmoe
from tvmmoe import RoutingMethodType as Method
from tvmmoe import layouts, numerics
from tvmmoe.config import ActivationFormat as A
from tvmmoe.config import WeightFormat as W
from tvmmoe.testing import rel_l2

pytest.importorskip("transformers")

from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config  # noqa: E402
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE  # noqa: E402
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig  # noqa: E402
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP  # noqa: E402
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig  # noqa: E402
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe  # noqa: E402
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig  # noqa: E402
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
MODES = {
    "bf16_mxfp4": (A.bf16, W.mxfp4),
    "bf16_nvfp4": (A.bf16, W.nvfp4),
    "mxfp8_mxfp4": (A.mxfp8, W.mxfp4),
    "nvfp4_nvfp4": (A.nvfp4, W.nvfp4),
}
# Relative L2 error. The modules stay in float32; the operator rounds z, routing weights, gemm2's rows and the output to
# bf16 (3e-3 together), and stores z with 3 bits of mantissa in mxfp8 (3e-2) or 1 bit in nvfp4 (9e-2).
TOLERANCE = {A.bf16: 6e-3, A.mxfp8: 5e-2, A.nvfp4: 1.4e-1}
Z_FACTOR = 16.0  # of static nvfp4: z reaches 75, and 448 * 6 / 16 is 168


@dataclasses.dataclass(frozen=True)
class Model:
    """A module with random weights, and what the operator has to be told about it."""

    config: Any
    experts: torch.nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]  # float32 [T, H] to [T, H]
    route: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # logits, topk_weights, topk_ids
    to_up_gate: Callable[[torch.Tensor], torch.Tensor]  # rows of gate_up_proj in the operator's order
    is_transposed: bool  # expert parameters are [E, columns, rows]
    routing: dict[str, Any]
    has_bias_and_clamp: bool = False


def randomize(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """Seeded parameters, the same on every device: weights 1 / sqrt(columns) large, experts of different size."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 3:
            value *= 0.5 + torch.rand(len(value), 1, 1, generator=generator)
        parameter.data = value if name.endswith("bias") else value / parameter.shape[-1] ** 0.5
    return module.to(device).requires_grad_(False)


def gpt_oss(device: str) -> Model:
    config = GptOssConfig(
        hidden_size=96, intermediate_size=160, num_local_experts=8, num_experts_per_tok=4,
        experts_implementation="eager",
    )  # fmt: skip
    module = randomize(GptOssMLP(config), device)
    module.experts.gate_up_proj *= 3  # 6 % of up and 3 % of gate are beyond the limit
    module.experts.down_proj_bias *= 3  # visible beside what it is added to
    return Model(
        config=config,
        experts=module.experts,
        forward=lambda x: module(x[None])[0][0],
        route=module.router,
        to_up_gate=layouts.deinterleave_gate_up,
        is_transposed=True,
        routing=dict(routing_method_type=Method.Renormalize),
        has_bias_and_clamp=True,
    )


def qwen3_moe(device: str, method: Method) -> Model:
    config = Qwen3MoeConfig(
        hidden_size=160, moe_intermediate_size=96, num_experts=16, num_experts_per_tok=4,
        norm_topk_prob=method != Method.Default, experts_implementation="eager",
    )  # fmt: skip
    module = randomize(Qwen3MoeSparseMoeBlock(config), device)
    return Model(
        config=config,
        experts=module.experts,
        forward=lambda x: module(x[None])[0],
        route=module.gate,
        to_up_gate=layouts.swap_gate_up,
        is_transposed=False,
        routing=dict(routing_method_type=method),
    )


def deepseek_v3(device: str, n_group: int, topk_group: int) -> Model:
    config = DeepseekV3Config(
        hidden_size=288, moe_intermediate_size=96, n_routed_experts=32, num_experts_per_tok=6, n_group=n_group,
        topk_group=topk_group, routed_scaling_factor=2.5, experts_implementation="eager",
    )  # fmt: skip
    module = randomize(DeepseekV3MoE(config), device)
    module.shared_experts.down_proj.weight.zero_()
    # In bfloat16, which the operator rounds to where it selects groups.
    bias = 0.2 * torch.randn(32, generator=torch.Generator().manual_seed(1)).to(device).bfloat16()
    module.gate.e_score_correction_bias.copy_(bias)
    return Model(
        config=config,
        experts=module.experts,
        forward=lambda x: module(x[None])[0],
        route=module.gate,
        to_up_gate=layouts.swap_gate_up,
        is_transposed=False,
        routing=dict(
            routing_method_type=Method.DeepSeekV3, routing_bias=bias, n_group=n_group, topk_group=topk_group,
            routed_scaling_factor=2.5,
        ),
    )  # fmt: skip


def llama4(device: str, is_saturated: bool) -> Model:
    """transformers scales the expert's input by the score, the operator its output: equal where every score is 1.

    Elsewhere the module's experts run on the unscaled tokens, and the module's scores weigh what they return.
    """
    config = Llama4TextConfig(hidden_size=160, intermediate_size=96, num_local_experts=8, num_experts_per_tok=1)
    module = randomize(Llama4TextMoe(config), device)
    module.shared_expert.down_proj.weight.zero_()
    if is_saturated:
        module.router.weight *= 100

    def route(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores, logits = module.router(x)
        return logits, *scores.max(dim=1, keepdim=True)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if is_saturated:
            return module(x)[0]
        scores = module.router(x)[0].T[..., None]
        return (scores * module.experts(x.repeat(8, 1)).view(8, *x.shape)).sum(dim=0)

    return Model(
        config=config,
        experts=module.experts,
        forward=forward,
        route=route,
        to_up_gate=layouts.swap_gate_up,
        is_transposed=True,
        routing=dict(routing_method_type=Method.Llama4),
    )


MODELS = {
    "gpt_oss": gpt_oss,
    "qwen3_moe": lambda device: qwen3_moe(device, Method.Renormalize),
    "qwen3_moe_naive": lambda device: qwen3_moe(device, Method.RenormalizeNaive),
    "qwen3_moe_not_normalized": lambda device: qwen3_moe(device, Method.Default),
    "deepseek_v3": lambda device: deepseek_v3(device, 4, 2),
    "deepseek_v3_one_group": lambda device: deepseek_v3(device, 1, 1),
    "llama4": lambda device: llama4(device, is_saturated=False),
    "llama4_saturated": lambda device: llama4(device, is_saturated=True),
}


def quantize_tokens(x: torch.Tensor, activation_format: A) -> tuple[dict[str, Any], torch.Tensor, float | torch.Tensor]:
    """hidden_states and its scale; their values in float32; the global factor."""
    values, scale, factor, exact = x.bfloat16(), None, 1.0, x.bfloat16().float()
    if activation_format == A.mxfp8:
        values, scale = numerics.quantize_mxfp8(x)
        exact = numerics.dequantize_mxfp8(values, scale)
    elif activation_format == A.nvfp4:
        factor = numerics.nvfp4_global_scale(x)
        values, scale = numerics.quantize_nvfp4(x, factor)
        exact = numerics.dequantize_nvfp4(values, scale, factor)
    return dict(hidden_states=values, hidden_states_scale=scale), exact, factor


def quantize_parameter(
    parameter: torch.Tensor, is_transposed: bool, weight_format: W
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed rows, block scales, global factors [E]; ``parameter`` becomes exactly what they stand for."""
    weight = parameter.transpose(1, 2) if is_transposed else parameter
    if weight_format == W.mxfp4:
        values, scale = numerics.quantize_mxfp4(weight)
        weight.copy_(numerics.dequantize_mxfp4(values, scale))
        return values, scale, weight.new_ones(len(weight))
    factor = numerics.nvfp4_global_scale(weight, dim=(-2, -1))
    values, scale = numerics.quantize_nvfp4(weight, factor)
    weight.copy_(numerics.dequantize_nvfp4(values, scale, factor))
    return values, scale, factor


def expert_arguments(model: Model, weight_format: W, activation_format: A, factor_x: Any) -> dict[str, Any]:
    """Quantise the experts of the module in place; the same experts in the operator's order and units."""
    experts = model.experts
    values1, scale1, factor1 = quantize_parameter(experts.gate_up_proj, model.is_transposed, weight_format)
    values2, scale2, factor2 = quantize_parameter(experts.down_proj, model.is_transposed, weight_format)
    factor_z = Z_FACTOR if activation_format == A.nvfp4 else 1.0
    unit1, unit2 = factor1 * factor_x, factor2 * factor_z  # raw accumulators per real unit
    arguments = dict(
        gemm1_weights=model.to_up_gate(values1),
        gemm1_weights_scale=model.to_up_gate(scale1),
        gemm1_bias=None,
        gemm1_alpha=None,
        gemm1_beta=None,
        gemm1_clamp_limit=None,
        gemm2_weights=values2,
        gemm2_weights_scale=scale2,
        gemm2_bias=None,
        output1_scale_scalar=None,
        output1_scale_gate_scalar=None,
        output2_scale_scalar=None,
    )
    if weight_format == W.nvfp4:
        arguments |= dict(
            output1_scale_scalar=factor_z / unit1, output1_scale_gate_scalar=1 / unit1, output2_scale_scalar=1 / unit2
        )
    if model.has_bias_and_clamp:
        arguments |= dict(
            gemm1_bias=model.to_up_gate(experts.gate_up_proj_bias) * unit1[:, None],
            gemm1_alpha=torch.full_like(unit1, experts.alpha),
            gemm1_beta=unit1,  # 1 in real units
            gemm1_clamp_limit=experts.limit * unit1,
            gemm2_bias=experts.down_proj_bias * unit2[:, None],
        )
    return arguments


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_tokens", [1, 37])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_matches_transformers(name, mode, num_tokens, device):
    activation_format, weight_format = MODES[mode]
    model = MODELS[name](device)
    config = model.config
    x = 2 * torch.randn(num_tokens, config.hidden_size, generator=torch.Generator().manual_seed(2)).to(device)
    tokens, x, factor_x = quantize_tokens(x, activation_format)
    experts = expert_arguments(model, weight_format, activation_format, factor_x)
    logits, topk_weights, topk_ids = model.route(x)
    kwargs = dict(
        routing_logits=logits,
        routing_bias=None,
        num_experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        n_group=None,
        topk_group=None,
        intermediate_size=2 * experts["gemm2_weights"].shape[-1],
        local_expert_offset=0,
        local_num_experts=config.num_local_experts,
        routed_scaling_factor=None,
    )
    kwargs |= model.routing | tokens | experts
    replay = torch.empty(topk_ids.shape, dtype=torch.int16, device=device)
    (actual,) = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, routing_replay_out=replay)
    weights = tvmmoe.trtllm_fp4_block_scale_moe(**kwargs, do_finalize=False)[1]

    # By expert: the order of the module's slots is its own.
    expected_weights = torch.zeros_like(logits).scatter(1, topk_ids, topk_weights)
    assert torch.equal(replay.long().sort().values, topk_ids.sort().values)
    assert torch.allclose(weights.float(), expected_weights.gather(1, replay.long()), rtol=2**-8, atol=0)
    assert rel_l2(actual, model.forward(x)) <= TOLERANCE[activation_format]
