# SPDX-License-Identifier: Apache-2.0
"""What a call computes: enums of methods and formats, and :class:`Problem`, a validated call without its tensors."""

from dataclasses import dataclass, fields
from enum import IntEnum

import torch

MAX_EXPERTS = 1024
MAX_TOP_K = 32
MAX_SIZE = (1 << 17) - 32  # of H and I: scale bytes of an expert have 31 bits


class _Named(IntEnum):
    """Enum whose repr evaluates back and says the name, never the number."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    __str__ = __repr__
    __hash__ = int.__hash__  # Enum's is a Python function; a call hashes several


class RoutingMethodType(_Named):
    """How top_k experts and their weights come from the logits x of one token.

    S are the chosen experts, b is ``routing_bias``, sig the sigmoid, r ``routed_scaling_factor``. Of equal keys the
    lower expert id wins. Weights are rounded to bfloat16.

    ================ ==================== ==================================================================
    member           selection key        weight of a chosen expert i
    ================ ==================== ==================================================================
    Default          softmax(x)           softmax(x)_i over all experts
    Renormalize      x                    softmax over S of x
    DeepSeekV3       sig(x) + b           r * sig(x_i) / (sum over S of sig(x) + 1e-20); experts in groups
    Llama4           x, top_k = 1         sig(x_i)
    RenormalizeNaive x                    as Renormalize
    TopK             x                    x_i
    SigmoidRenorm    sig(x)               sig(x_i) / sum over S of sig(x); sig(x_i) unless ``norm_topk_prob``
    MiniMax2         sig(x) + b           as DeepSeekV3, never in groups
    Sigmoid          sig(x)               sig(x_i)
    TopKSigmoid      x                    sig(x_i)
    ================ ==================== ==================================================================
    """

    Default = 0
    Renormalize = 1
    DeepSeekV3 = 2
    Llama4 = 3
    RenormalizeNaive = 4
    TopK = 5
    SigmoidRenorm = 6
    MiniMax2 = 7
    Sigmoid = 8
    TopKSigmoid = 9


class ActivationType(_Named):
    """What stands between the two GEMMs: z from u (up) and g (gate), or from the only half a.

    ========  ==================================================================================
    Swiglu    (u + beta) * g * sigmoid(alpha * g)
    Geglu     (u + beta) * g * Phi(alpha * g), Phi the normal distribution function (erf)
    Relu2     max(a, 0)^2
    Identity  a
    ========  ==================================================================================

    The gated ones clamp first: u to [-limit, limit], g to at most limit. 7 is the documented value of Identity, 9 is
    FlashInfer's: ``ActivationType(9)`` is Identity too.
    """

    Swiglu = 3
    Geglu = 4
    Relu2 = 6
    Identity = 7

    @classmethod
    def _missing_(cls, value: object) -> "ActivationType | None":
        return cls.Identity if value == 9 else None

    @property
    def is_gated(self) -> bool:
        """Whether gemm1 has two halves of rows, [up; gate]."""
        return self is ActivationType.Swiglu or self is ActivationType.Geglu


class ActivationFormat(_Named):
    """Format of ``hidden_states``, and of the intermediate z.

    ======  ========================================================================
    bf16    bfloat16 [T, H]
    mxfp8   float8_e4m3fn [T, H], one ue8m0 scale per 32 columns
    nvfp4   e2m1 in uint8 [T, H/2], one e4m3 scale per 16 columns
    ======  ========================================================================
    """

    bf16 = 0
    mxfp8 = 1
    nvfp4 = 2


class WeightFormat(_Named):
    """Format of both weights, e2m1 in uint8: mxfp4 has a ue8m0 scale per 32 columns, nvfp4 an e4m3 scale per 16."""

    mxfp4 = 0
    nvfp4 = 1

    @property
    def block_size(self) -> int:
        """Columns that share a scale."""
        return 16 if self is WeightFormat.nvfp4 else 32


@dataclass(frozen=True)
class Problem:
    """A validated call without its tensors: what a kernel is selected by, and the integers that it is called with.

    The repr evaluates back, so that it can be pasted from a bug report. ``n_group`` and ``topk_group`` are 0 unless
    experts are selected in groups; ``enable_pdl`` and ``routed_scaling_factor`` have their defaults filled in.
    """

    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    local_expert_offset: int
    local_num_experts: int
    n_group: int
    topk_group: int
    output_hidden_size: int
    routing_method: RoutingMethodType
    activation: ActivationType
    activation_format: ActivationFormat
    weight_format: WeightFormat
    routed_scaling_factor: float
    norm_topk_prob: bool
    do_finalize: bool
    enable_pdl: bool
    has_per_token_scale: bool
    device: torch.device

    def __repr__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        device = f"torch.device({str(values.pop('device'))!r})"
        return f"Problem({', '.join(f'{name}={value!r}' for name, value in values.items())}, device={device})"
