# SPDX-License-Identifier: Apache-2.0
"""Calling convention of an artifact entry, the one list that builders and the run time share.

``entry(workspace, *POINTERS, *INTS, routed_scaling_factor)``: ``workspace`` is a uint8 tensor (it carries device and
stream), pointers are int64 addresses with 0 for an absent tensor, ints are int64, the factor is a float64. Everything has
been validated before; an entry allocates nothing, synchronises nothing and writes only ``output`` or the three results of
``do_finalize = 0``, ``routing_replay_out`` and the workspace.
"""

ARTIFACT_ABI = 1

POINTERS = (
    "routing_logits",
    "routing_bias",
    "hidden_states",
    "hidden_states_scale",
    "gemm1_weights",
    "gemm1_weights_scale",
    "gemm1_bias",
    "gemm1_alpha",
    "gemm1_beta",
    "gemm1_clamp_limit",
    "gemm2_weights",
    "gemm2_weights_scale",
    "gemm2_bias",
    "output1_scale_scalar",
    "output1_scale_gate_scalar",
    "output2_scale_scalar",
    "per_token_scale",
    "output",
    "routing_replay_out",
    "expert_weights",  # 0: kept in the workspace
    "expanded_idx_to_permuted_idx",  # 0: kept in the workspace
    "gemm2_output",  # 0: kept in the workspace
)

INTS = (
    "num_tokens",
    "hidden_size",
    "intermediate_size",
    "num_experts",
    "top_k",
    "local_expert_offset",
    "local_num_experts",
    "n_group",
    "topk_group",
    "output_hidden_size",
    "routing_method",
    "activation",
    "activation_format",
    "logits_is_bf16",
    "bias_is_bf16",
    "norm_topk_prob",
    "do_finalize",
    "enable_pdl",
)
