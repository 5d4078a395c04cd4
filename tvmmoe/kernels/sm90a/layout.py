# SPDX-License-Identifier: Apache-2.0
"""Operand order and workspace of the Hopper operator: plain arithmetic shared by the kernels and the run time.

K order of an activation operand. In a block of 128 columns, lane q of a quad owns the weight bytes of
k = 32q .. 32q + 31, one 16-byte load per row. MMA step j (k16) takes word j//2 of them and the nibbles p = 2(j%2) + h
and p + 4, which one mask and one multiply turn into a bf16 pair. So MMA position

    i = 16 j + 8 h + 2 q + b    (j < 8, h < 2, q < 4, b < 2)    is column    k = 32 q + 8 (j//2) + 2 (j%2) + h + 4 b

and whoever writes an activation (gather, gemm1) writes it in this order, with rows padded to whole blocks by zeros. Those of
up to four tokens have an order of their own (single_row.py), tiles of one or two rows both (thin_rows.py).
"""

from collections.abc import Callable
from typing import Any

from tvmmoe.config import WeightFormat
from tvmmoe.workspace import Slice, max_num_tiles, pack

K_BLOCK = 128
FEW_TOKENS = 4  # of gemm_pair
MAX_FEW_PAIRS = 32  # of such a call, a lane each
FEW_ROWS = 8  # of a tile as results number them
COLUMNS_BYTES = 512  # of two columns of tokens, a K block of them as by_scale_block.py takes it
THIN_TILE_M = 8  # the tiles that may be thin: those with so few rows that thin_tiles.py multiplies them
THIN_ROWS = 2
MAX_ARRANGED_PAIRS = 2048  # (token, slot) pairs of prologue and arrange, which alone write x as thin tiles take it
PAIRS_PER_CTA = 1024  # of permute: (token, slot) pairs that one CTA ranks


def k_of_position(position: int) -> int:
    """Column of a 128-block that sits at ``position`` of the operand."""
    j, h, q, b = position // 16, position // 8 % 2, position // 2 % 4, position % 2
    return 32 * q + 8 * (j // 2) + 2 * (j % 2) + h + 4 * b


def column_offset(word: Any, column: Any, lane: Any) -> Any:
    """Bytes from a K block of two columns (by_scale_block.py) to 8 of K in one of them, of a word of a quad's lane."""
    return word * (COLUMNS_BYTES // 4) + column * (COLUMNS_BYTES // 8) + lane * 16


def padded(columns: Any) -> Any:
    """Columns rounded up to whole K blocks."""
    return (columns + K_BLOCK - 1) // K_BLOCK * K_BLOCK


def slices(
    num_tokens: Any,
    top_k: Any,
    hidden_size: Any,
    intermediate_size: Any,
    local_num_experts: Any,
    tile_m: int,
    minimum: Callable = min,
) -> tuple[dict[str, Slice], Any]:
    """Slices of the workspace and its size in bytes.

    Takes ints, or TensorIR expressions with ``minimum=T.min``. ``x`` (operand of gemm1) and ``gemm2_output`` share
    memory: the first is dead when the second is written.
    """
    pairs = num_tokens * top_k
    num_tiles = max_num_tiles(pairs, local_num_experts, tile_m, minimum)
    rows = num_tiles * tile_m
    few_tokens = minimum(num_tokens, FEW_TOKENS)
    thin_tiles = num_tiles if tile_m == THIN_TILE_M else 0
    num_chunks = (pairs + PAIRS_PER_CTA - 1) // PAIRS_PER_CTA
    result, total = pack({
        "topk_ids": pairs * 4,
        "expert_weights": pairs * 2,
        "expanded_idx_to_permuted_idx": pairs * 4,
        "chunk_counts": num_chunks * local_num_experts * 4,
        "tile_expert": num_tiles * 4,
        "tile_rows": num_tiles * 4,
        "num_tiles": 4,
        "claims": 2 * 4,  # of both GEMMs: claims that were made, those past the end included
        "row_scale": rows * 4,
        "x": rows * padded(hidden_size) * 2,
        "z": rows * padded(intermediate_size) * 2,
        "x_scale": rows * padded(hidden_size) // 32,
        "z_scale": rows * padded(intermediate_size) // 32,
        "z_blocks": MAX_FEW_PAIRS * 4,
        "few_x": few_tokens * padded(hidden_size) // K_BLOCK * COLUMNS_BYTES,
        "few_z": few_tokens * top_k * padded(intermediate_size) // K_BLOCK * COLUMNS_BYTES,
        "x_outside": thin_tiles * THIN_ROWS * 4,
        "z_outside": thin_tiles * THIN_ROWS * 4,
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
    weight_format: WeightFormat | None = None,
) -> int:
    """Bytes of workspace that one call needs; ``weight_format`` matters on other targets only."""
    return slices(num_tokens, top_k, hidden_size, intermediate_size, local_num_experts, tile_m)[1]
