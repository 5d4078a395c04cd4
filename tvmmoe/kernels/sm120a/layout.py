# SPDX-License-Identifier: Apache-2.0
"""Workspace of the sm_120a operator: what the shared stages expect, plus z as gemm2 reads it.

row_token  int32 [rows]                 token of a permuted row, for gemm1's gather; only live rows are written
x          bfloat16 [rows, padded H]    bf16 tokens in K order (sm90a.layout); shares memory with gemm2_output
z          bfloat16 [rows, I]           of gemm1; for bf16 tokens [rows, padded I] in K order
z_value    uint8 [rows, I/2 or I]       e2m1 pairs or e4m3, in column order
z_scale    uint8 [rows, I/16 or I/32]   their block scales
"""

from collections.abc import Callable
from typing import Any

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm90a.layout import PAIRS_PER_CTA, padded
from tvmmoe.workspace import Slice, max_num_tiles, pack


def slices(
    num_tokens: Any,
    top_k: Any,
    hidden_size: Any,
    intermediate_size: Any,
    local_num_experts: Any,
    tile_m: int,
    weight_format: WeightFormat,
    minimum: Callable = min,
) -> tuple[dict[str, Slice], Any]:
    """Slices of the workspace and its size in bytes; ints, or TensorIR expressions with ``minimum=T.min``."""
    pairs = num_tokens * top_k
    num_tiles = max_num_tiles(pairs, local_num_experts, tile_m, minimum)
    rows = num_tiles * tile_m
    per_byte = 2 if weight_format is WeightFormat.nvfp4 else 1  # activations are e2m1 or e4m3
    result, total = pack({
        "topk_ids": pairs * 4,
        "expert_weights": pairs * 2,
        "expanded_idx_to_permuted_idx": pairs * 4,
        "chunk_counts": (pairs + PAIRS_PER_CTA - 1) // PAIRS_PER_CTA * local_num_experts * 4,
        "tile_expert": num_tiles * 4,
        "tile_rows": num_tiles * 4,
        "num_tiles": 4,
        "row_token": rows * 4,
        "row_scale": rows * 4,
        "x": rows * padded(hidden_size) * 2,
        "z": rows * padded(intermediate_size) * 2,
        "z_value": rows * intermediate_size // per_byte,
        "z_scale": rows * intermediate_size // weight_format.block_size,
    })  # fmt: skip
    result["gemm2_output"] = result["x"]
    return result, total


def workspace_bytes(
    num_tokens: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    local_num_experts: int,
    tile_m: int,
    weight_format: WeightFormat,
) -> int:
    """Bytes of workspace that one call needs."""
    sizes = (num_tokens, top_k, hidden_size, intermediate_size, local_num_experts, tile_m)
    return slices(*sizes, weight_format)[1]
