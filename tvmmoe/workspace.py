# SPDX-License-Identifier: Apache-2.0
"""Sizes of intermediates. Plain arithmetic that the run time (ints) and the builders (expressions) share."""

from collections.abc import Callable
from typing import Any, NamedTuple

ALIGNMENT = 128


def max_num_tiles(num_pairs: Any, local_num_experts: Any, tile_m: int, minimum: Callable = min) -> Any:
    """Most tiles of ``tile_m`` rows that ``num_pairs`` (token, slot) pairs can fill over ``local_num_experts`` experts.

    The worst case gives every expert one row first and fills tiles with the rest.
    """
    occupied = minimum(num_pairs, local_num_experts)
    return occupied + (num_pairs - occupied) // tile_m


def usual_num_tiles(
    num_pairs: Any, local_num_experts: Any, num_experts: Any, tile_m: int, minimum: Callable = min
) -> Any:
    """Most tiles where the local experts have their share of all pairs: what grids are made for whose CTAs go on to another
    tile where there are more. The same as :func:`max_num_tiles` where all experts are local."""
    share = num_pairs * local_num_experts // num_experts
    return minimum(max_num_tiles(num_pairs, local_num_experts, tile_m, minimum), local_num_experts + share // tile_m)


class Slice(NamedTuple):
    """One intermediate inside the workspace."""

    offset: Any
    num_bytes: Any


def pack(sizes: dict[str, Any]) -> tuple[dict[str, Slice], Any]:
    """Aligned slices of these numbers of bytes, one after another, and the bytes that they take together."""
    slices, offset = {}, 0
    for name, num_bytes in sizes.items():
        slices[name] = Slice(offset, num_bytes)
        offset = offset + (num_bytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return slices, offset


def cpu_slices(
    num_tokens: Any,
    top_k: Any,
    hidden_size: Any,
    intermediate_size: Any,
    local_num_experts: Any,
    tile_m: int,
    minimum: Callable = min,
    maximum: Callable = max,
) -> tuple[dict[str, Slice], Any]:
    """Slices of the CPU operator's workspace and its total size in bytes."""
    pairs = num_tokens * top_k
    num_tiles = max_num_tiles(pairs, local_num_experts, tile_m, minimum)
    rows = num_tiles * tile_m
    return pack({
        "topk_ids": pairs * 4,
        "expert_weights": pairs * 2,
        "expanded_idx_to_permuted_idx": pairs * 4,
        "permuted_idx_to_token_idx": rows * 4,
        "tile_expert": num_tiles * 4,
        "num_tiles": 4,
        "neutral": (2 * intermediate_size + hidden_size + 2) * 4,
        "row_scale": rows * 4,
        "operand": rows * maximum(hidden_size, intermediate_size) * 4,  # of gemm1, then of gemm2
        "z": rows * intermediate_size * 2,
        "gemm2_output": rows * hidden_size * 2,
    })  # fmt: skip
