# SPDX-License-Identifier: Apache-2.0
"""permute: group the (token, slot) pairs of local experts into tiles of ``tile_m`` rows (operator-semantics 7, 8).

    topk_ids                       int32 [num_tokens, top_k]            global expert ids
    expanded_idx_to_permuted_idx   int32 [num_tokens, top_k]            row in expert order; -1: not a local expert
    permuted_idx_to_token_idx      int32 [max_num_tiles, tile_m]        -1: padding
    tile_expert                    int32 [max_num_tiles]                local expert of a tile
    num_tiles                      int32 [1]                            tiles in use, at the front

Local experts ascend; inside an expert, rows follow expanded_idx. A counting sort, serial: its cost is a few
nanoseconds a pair, below one weight row of a GEMM.
"""

from tvm.script import tirx as T

from tvmmoe.config import MAX_EXPERTS


def permute():
    """The definition; the tile height is a size of ``permuted_to_token``."""

    # fmt: off
    @T.prim_func(s_tir=True)
    def definition(topk_ids: T.handle, expanded_to_permuted: T.handle, permuted_to_token: T.handle,
                   tile_expert: T.handle, num_tiles: T.handle, local_expert_offset: T.int32,
                   local_num_experts: T.int32):
        T.func_attr({"tirx.noalias": True})
        num_tokens, top_k, max_num_tiles, tile_m = T.int64(), T.int64(), T.int64(), T.int64()
        IDS = T.match_buffer(topk_ids, (num_tokens, top_k), "int32", align=1)
        TO_PERMUTED = T.match_buffer(expanded_to_permuted, (num_tokens, top_k), "int32", align=1)
        TO_TOKEN = T.match_buffer(permuted_to_token, (max_num_tiles, tile_m), "int32", align=1)
        TILE_EXPERT = T.match_buffer(tile_expert, (max_num_tiles,), "int32", align=1)
        NUM_TILES = T.match_buffer(num_tiles, (1,), "int32", align=1)
        with T.sblock("counting_sort"):
            T.reads(IDS[0:num_tokens, 0:top_k])
            T.writes(TO_PERMUTED[0:num_tokens, 0:top_k], TO_TOKEN[0:max_num_tiles, 0:tile_m],
                     TILE_EXPERT[0:max_num_tiles], NUM_TILES[0])
            next_row = T.sblock_alloc_buffer((MAX_EXPERTS,), "int32")  # first a count, then the next free row
            row_count = T.sblock_alloc_buffer((1,), "int32")
            for e in range(local_num_experts):
                next_row[e] = 0
            for i, k in T.grid(num_tokens, top_k):
                if T.And(local_expert_offset <= IDS[i, k], IDS[i, k] < local_expert_offset + local_num_experts):
                    next_row[IDS[i, k] - local_expert_offset] = next_row[IDS[i, k] - local_expert_offset] + 1
            NUM_TILES[0] = 0
            for e in range(local_num_experts):
                row_count[0] = next_row[e]
                next_row[e] = NUM_TILES[0] * T.Cast("int32", tile_m)
                for tile in range((row_count[0] + T.Cast("int32", tile_m) - 1) // T.Cast("int32", tile_m)):
                    TILE_EXPERT[NUM_TILES[0]] = e
                    for m in range(tile_m):
                        TO_TOKEN[NUM_TILES[0], m] = -1
                    NUM_TILES[0] = NUM_TILES[0] + 1
            for i, k in T.grid(num_tokens, top_k):
                if T.And(local_expert_offset <= IDS[i, k], IDS[i, k] < local_expert_offset + local_num_experts):
                    row_count[0] = next_row[IDS[i, k] - local_expert_offset]
                    next_row[IDS[i, k] - local_expert_offset] = row_count[0] + 1
                    TO_PERMUTED[i, k] = row_count[0]
                    TO_TOKEN[T.Cast("int64", row_count[0]) // tile_m,
                             T.Cast("int64", row_count[0]) % tile_m] = T.Cast("int32", i)
                else:
                    TO_PERMUTED[i, k] = -1
    # fmt: on
    return definition
