# SPDX-License-Identifier: Apache-2.0
"""permute: group the (token, slot) pairs of local experts into tiles of ``tile_m`` rows, the same way on every run.

    count     grid ceil(pairs / 1024): a chunk's histogram over local experts -> chunk_counts [chunks, E_loc]
              (skipped when there is one chunk)
    scatter   same grid; thread e sums the histograms before its chunk and all of them, a CTA-wide scan turns counts
              into the first tile of every expert, then thread i places pair i:

        index = pairs of e in earlier chunks + in earlier warps + in earlier lanes (match.any)
        row = tile_m * (first_tile[e] + index // share) + index % share

An expert's tiles share its rows evenly, to whole widths: 540 rows are 192 + 192 + 156, not 256 + 256 + 28, whose
last tile would cost far more than its rows. Tiles up to 32 rows are filled: their widths are 8 apart, so 32 + 8 cost what
24 + 16 do.

Local experts ascend; inside an expert rows follow expanded_idx. The pair on a tile's first row describes the tile.
"""

from tvm.script import tirx as T

from tvmmoe.config import MAX_EXPERTS
from tvmmoe.kernels.sm90a.layout import PAIRS_PER_CTA
from tvmmoe.kernels.sm90a.tile_scheduler import clear_claims
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
    load,
    ptx,
    scalar,
    store_to,
    u32,
)  # fmt: skip

WARPS = PAIRS_PER_CTA // 32
assert MAX_EXPERTS <= PAIRS_PER_CTA  # a thread an expert


def num_chunks(a):
    """CTAs of both kernels (host expression)."""
    return cast((a.num_tokens * a.top_k + PAIRS_PER_CTA - 1) // PAIRS_PER_CTA, "int32")


def _local_expert(a, pair):
    """Local expert of a pair; -1: another rank's, or past the end."""
    e = scalar("int32", T.int32(-1))
    with if_(pair < a.num_tokens * a.top_k):
        assign(e, load("int32", address(a.ws["topk_ids"], pair * 4)) - cast(a.local_expert_offset, "int32"))
        with if_(T.Or(e < 0, e >= cast(a.local_num_experts, "int32"))):
            assign(e, T.int32(-1))
    return e


def permute(a, tile_m: int, step: int) -> None:
    """Emit the kernels that a call needs; ``step`` as for :func:`rows_per_tile`."""
    with if_(a.num_tokens * a.top_k > PAIRS_PER_CTA):
        _count(a)
    _scatter(a, tile_m, step)


def _count(a) -> None:
    """Emit the histogram kernel."""
    with kernel("count", num_chunks(a), PAIRS_PER_CTA) as thread:
        smem = Smem()
        counts = smem.alloc(MAX_EXPERTS, "int32")
        smem.commit()
        ptx.griddepcontrol.wait()
        ptx.griddepcontrol.launch_dependents()
        I.buffer_store(counts, T.int32(0), [thread.tid])
        cuda.cta_sync()
        e = _local_expert(a, let(cast(thread.cta, "int64") * PAIRS_PER_CTA + cast(thread.tid, "int64")))
        with if_(e >= 0):
            I.evaluate(T.cuda.atomic_add(counts.ptr_to([e]), T.int32(1)))
        cuda.cta_sync()
        with if_(cast(thread.tid, "int64") < a.local_num_experts):
            slot = cast(thread.cta, "int64") * a.local_num_experts + cast(thread.tid, "int64")
            store_to("int32", address(a.ws["chunk_counts"], slot * 4), let(counts[thread.tid]))


def _rank_in_warp(e, lane):
    """(pairs of the same expert in lower lanes, pairs of it in the warp)."""
    peers = scalar("uint32")
    ptx["match.any.sync.b32"](peers, cast(e, "uint32"), u32(0xFFFFFFFF))
    below = (u32(1) << cast(lane, "uint32")) - u32(1)
    return let(cast(T.popcount(peers & below), "int32")), let(cast(T.popcount(peers), "int32"))


def _exclusive_scan(value, thread, sums):
    """(sum of ``value`` over lower threads, sum over the CTA)."""
    inclusive = let(value)
    for step in (1, 2, 4, 8, 16):
        other = scalar("int32")
        ptx["shfl_sync.up.b32"](other, inclusive, u32(step), u32(0), u32(0xFFFFFFFF))
        with if_(thread.lane >= step):
            assign(inclusive, inclusive + other)
    with if_(thread.lane == 31):
        I.buffer_store(sums, inclusive, [thread.warp])
    cuda.cta_sync()
    before, total = scalar("int32", T.int32(0)), scalar("int32", T.int32(0))
    for warp in range(WARPS):
        part = let(sums[warp])
        assign(before, before + T.Select(thread.warp > warp, part, T.int32(0)))
        assign(total, total + part)
    return let(before + inclusive - value), total


def rows_per_tile(rows, tile_m: int, step: int):
    """Rows of each of an expert's tiles but the last, a multiple of ``step``, what tiles' widths differ by."""
    if tile_m <= 32:
        return T.int32(tile_m)
    tiles = (rows + tile_m - 1) // tile_m
    return ((rows + tiles - 1) // tiles + (step - 1)) // step * step


def write_num_tiles(a, num_tiles) -> None:
    """Complete the tile list, by one thread; where GEMMs claim tiles, none has been claimed yet."""
    store_to("int32", address(a.ws["num_tiles"]), num_tiles)
    if "claims" in a.ws:
        clear_claims(a)


def _scatter(a, tile_m: int, step: int) -> None:
    """Emit the placing kernel."""
    with kernel("scatter", num_chunks(a), PAIRS_PER_CTA) as thread:
        smem = Smem()
        warp_counts = smem.alloc(WARPS * MAX_EXPERTS, "uint16", 128)
        first_row, chunk_first, totals, sums = (smem.alloc(n, "int32", 128) for n in (MAX_EXPERTS,) * 3 + (WARPS,))
        smem.commit()
        ptx.griddepcontrol.wait()
        ptx.griddepcontrol.launch_dependents()
        num_local = let(cast(a.local_num_experts, "int32"))
        with for_((num_local * WARPS + PAIRS_PER_CTA - 1) // PAIRS_PER_CTA) as i:
            I.buffer_store(warp_counts, T.uint16(0), [i * PAIRS_PER_CTA + thread.tid])
        cuda.cta_sync()
        pair = let(cast(thread.cta, "int64") * PAIRS_PER_CTA + cast(thread.tid, "int64"))
        e = _local_expert(a, pair)
        rank, peers = _rank_in_warp(e, thread.lane)
        with if_(T.And(e >= 0, rank == 0)):
            I.buffer_store(warp_counts, cast(peers, "uint16"), [thread.warp * num_local + e])
        cuda.cta_sync()
        total, before = _expert_totals(a, thread, warp_counts, num_local)
        tiles = let((total + tile_m - 1) // tile_m)
        first_tile, num_tiles = _exclusive_scan(tiles, thread, sums)
        I.buffer_store(first_row, first_tile * tile_m, [thread.tid])
        I.buffer_store(chunk_first, before, [thread.tid])
        I.buffer_store(totals, total, [thread.tid])
        with if_(T.And(thread.cta == 0, thread.tid == 0)):
            write_num_tiles(a, num_tiles)
        cuda.cta_sync()
        row = scalar("int32", T.int32(-1))
        with if_(e >= 0):
            index = let(chunk_first[e] + cast(warp_counts[thread.warp * num_local + e], "int32") + rank)
            rows = let(totals[e])
            share = let(rows_per_tile(rows, tile_m, step))
            assign(row, first_row[e] + index // share * tile_m + index % share)
            with if_(index % share == 0):
                tile = let(cast(row // tile_m, "int64"))
                store_to("int32", address(a.ws["tile_expert"], tile * 4), e)
                store_to("int32", address(a.ws["tile_rows"], tile * 4), let(T.min(rows - index, share)))
        with if_(pair < a.num_tokens * a.top_k):
            store_to("int32", address(a.result("expanded_idx_to_permuted_idx"), pair * 4), row)


def _expert_totals(a, thread, warp_counts, num_local):
    """Thread e: pairs of expert e in all chunks and in earlier ones; turns warp_counts into prefixes over warps."""
    total, before = scalar("int32", T.int32(0)), scalar("int32", T.int32(0))
    with if_(thread.tid < num_local):
        local = scalar("int32", T.int32(0))
        for first in range(0, WARPS, WARPS // 2):  # loads of a half come before its stores
            places = [warp * num_local + thread.tid for warp in range(first, first + WARPS // 2)]
            for place, here in [(place, let(cast(warp_counts[place], "int32"))) for place in places]:
                I.buffer_store(warp_counts, cast(local, "uint16"), [place])
                assign(local, local + here)
        chunks = let(num_chunks(a))
        assign(total, local)
        with if_(chunks > 1):
            assign(total, T.int32(0))
            with for_(chunks) as chunk:
                slot = cast(chunk, "int64") * a.local_num_experts + cast(thread.tid, "int64")
                part = load("int32", address(a.ws["chunk_counts"], slot * 4))
                assign(total, total + part)
                assign(before, before + T.Select(chunk < thread.cta, part, T.int32(0)))
    return total, before
