# SPDX-License-Identifier: Apache-2.0
"""prologue: route, permute and gather as one kernel for a few tokens, where three launches cost more than the work.

    grid     num_tokens * ceil(H / 2048) CTAs of 8 warps; each CTA routes and places all tokens, CTA 0 writes the results
    route    warp w takes token w
    place    thread i takes pair i and compares it with every other: its rank and count inside its expert, then the tiles
             of lower experts. Rows come out as permute.scatter makes them.
    gather   a thread takes 8 columns of the CTA's token
"""

from tvm.script import tirx as T

from tvmmoe.config import ActivationFormat
from tvmmoe.kernels.sm90a.gather import Chunk, segments_of
from tvmmoe.kernels.sm90a.permute import rows_per_tile
from tvmmoe.kernels.sm90a.route import Router
from tvmmoe.kernels.sm90a.trace import (
    I,
    Smem,
    address,
    assign,
    cast,
    cuda,
    for_,
    if_,
    kernel,
    let,
    ptx,
    scalar,
    store_to,
)  # fmt: skip

MAX_TOKENS = 8  # a warp each
MAX_PAIRS = 128
THREADS = 32 * MAX_TOKENS
COLUMNS = THREADS * 8


def is_small(a):
    """Whether the kernel takes the call (host expression)."""
    return T.And(a.num_tokens <= MAX_TOKENS, a.num_tokens * a.top_k <= MAX_PAIRS)


def prologue(a, form: ActivationFormat, tile_m: int) -> None:
    """Emit the kernel for one activation format."""
    segments = segments_of(a, COLUMNS)
    with kernel(f"prologue_{form.name}", cast(a.num_tokens * segments, "int32"), THREADS) as thread:
        smem = Smem()
        router = Router(smem, MAX_TOKENS)
        experts, tiles, rows = (smem.alloc(MAX_PAIRS, "int32", 128) for _ in range(3))
        smem.commit()
        token = let(thread.cta // cast(segments, "int32"))
        chunk = Chunk(a, form, token, thread.cta % cast(segments, "int32"), thread, COLUMNS)
        ptx.griddepcontrol.wait()
        ptx.griddepcontrol.launch_dependents()
        chunk.load()
        top_k = let(cast(a.top_k, "int32"))
        with if_(thread.warp < cast(a.num_tokens, "int32")):
            t = router.token(a, thread.warp, thread)
            expert, weight = t.route()
            with if_(thread.cta == 0):
                t.write(expert, weight)
            with if_(thread.lane < top_k):
                local = let(expert - cast(a.local_expert_offset, "int32"))
                is_local = T.And(local >= 0, local < cast(a.local_num_experts, "int32"))
                I.buffer_store(experts, T.Select(is_local, local, T.int32(-1)), [thread.warp * top_k + thread.lane])
        cuda.cta_sync()
        _place(a, thread, experts, tiles, rows, let(cast(a.num_tokens, "int32") * top_k), tile_m)
        cuda.cta_sync()
        chunk.write(lambda k: rows[token * top_k + k])


def _place(a, thread, experts, tiles, rows, num_pairs, tile_m: int) -> None:
    """Fill ``rows`` with every pair's row, -1 for other ranks' experts; CTA 0 describes the tiles."""
    pair, mine = let(thread.tid), scalar("int32", T.int32(-1))
    rank, count = scalar("int32", T.int32(0)), scalar("int32", T.int32(0))
    with if_(pair < num_pairs):
        assign(mine, experts[pair])
        with for_(num_pairs) as other:
            same = let(cast(experts[other] == mine, "int32"))
            assign(count, count + same)
            assign(rank, rank + T.Select(other < pair, same, T.int32(0)))
        is_first = T.And(mine >= 0, rank == 0)
        I.buffer_store(tiles, T.Select(is_first, (count + tile_m - 1) // tile_m, T.int32(0)), [pair])
    cuda.cta_sync()
    first_tile, num_tiles, row = scalar("int32", T.int32(0)), scalar("int32", T.int32(0)), scalar("int32", T.int32(-1))
    with if_(pair < num_pairs):
        with for_(num_pairs) as other:
            others = let(tiles[other])
            assign(num_tiles, num_tiles + others)
            assign(first_tile, first_tile + T.Select(experts[other] < mine, others, T.int32(0)))
        share = let(rows_per_tile(count, tile_m))
        tile = let(first_tile + rank // share)
        with if_(mine >= 0):
            assign(row, tile * tile_m + rank % share)
        I.buffer_store(rows, row, [pair])
        with if_(thread.cta == 0):
            store_to("int32", address(a.result("expanded_idx_to_permuted_idx"), cast(pair, "int64") * 4), row)
            with if_(pair == 0):
                store_to("int32", address(a.ws["num_tiles"]), num_tiles)
            with if_(mine >= 0):
                token = let(pair // cast(a.top_k, "int32"))
                store_to("int32", address(a.ws["permuted_idx_to_token"], cast(row, "int64") * 4), token)
            with if_(T.And(mine >= 0, rank % share == 0)):
                store_to("int32", address(a.ws["tile_expert"], cast(tile, "int64") * 4), mine)
                live = let(T.min(count - rank, share))
                store_to("int32", address(a.ws["tile_rows"], cast(tile, "int64") * 4), live)
