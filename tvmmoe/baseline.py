# SPDX-License-Identifier: Apache-2.0
"""The operator with torch alone, as one would write it without FP4 kernels: what benchmark and demo compare with."""

from typing import Any

import torch

from tvmmoe import reference
from tvmmoe.config import ActivationType

ROUTING = ("top_k", "routing_method_type", "n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob")


def route(kwargs: dict[str, Any], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights that the call chooses for other logits."""
    return reference.route_ref(logits, kwargs["routing_bias"], **{name: kwargs[name] for name in ROUTING if name in kwargs})


def dequantize_matmul(dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> torch.Tensor:
    """bfloat16 [T, H]: every active expert's weights to ``dtype``, two matmuls in it, weighted sum.

    Takes the operator's arguments. z is not requantised, so results of mxfp8 and nvfp4 calls differ by that rounding.
    float32 is the faster choice on CPUs that have no bfloat16 arithmetic.
    """
    ids, weights = route(kwargs, kwargs["routing_logits"])
    x = reference.dequantize_hidden_ref(kwargs["hidden_states"], kwargs["hidden_states_scale"])
    if kwargs.get("per_token_scale") is not None:
        x = x * kwargs["per_token_scale"][:, None]
    x = x.to(dtype)
    out = torch.zeros(len(x), x.shape[1], device=x.device)
    for e in range(kwargs["local_num_experts"]):
        token, slot = (ids == e + kwargs["local_expert_offset"]).nonzero(as_tuple=True)
        if len(token):
            y = _expert(kwargs, e, x[token])
            out.index_add_(0, token, y.float() * weights[token, slot, None].float())
    return out.bfloat16()


def _expert(kwargs: dict[str, Any], e: int, x: torch.Tensor) -> torch.Tensor:
    def of(name: str, default: float | None = None) -> Any:
        return default if kwargs[name] is None else kwargs[name][e]

    def linear(rows: torch.Tensor, gemm: str) -> torch.Tensor:
        weight = reference.dequantize_weight_ref(kwargs[f"{gemm}_weights"][e], kwargs[f"{gemm}_weights_scale"][e])
        acc = rows @ weight.to(rows.dtype).T
        return acc if kwargs[f"{gemm}_bias"] is None else acc + kwargs[f"{gemm}_bias"][e]

    activation = ActivationType(kwargs.get("activation_type", ActivationType.Swiglu))
    acc = linear(x, "gemm1")
    up, gate = acc.chunk(2, dim=-1) if activation.is_gated else (acc, None)
    z = reference.activation_ref(
        up,
        gate,
        activation,
        scale=of("output1_scale_scalar", 1.0),
        scale_gate=of("output1_scale_gate_scalar", 1.0),
        alpha=of("gemm1_alpha"),
        beta=of("gemm1_beta"),
        clamp_limit=of("gemm1_clamp_limit"),
    )
    return linear(z.to(x.dtype), "gemm2") * of("output2_scale_scalar", 1.0)
