# SPDX-License-Identifier: Apache-2.0
"""Kernels between the logits and gemm1 for few pairs, where launches and latencies cost more than the work.

    prologue   route, permute and gather as one kernel. Each CTA routes all tokens and places the pairs of its own; one
               more CTA writes ids and weights, which only finalize reads
    arrange    permute and gather as one kernel, after route. Each CTA reads the choices of all tokens

    grid       num_tokens * ceil(H / 4096) CTAs of 16 warps; a thread gathers 8 columns of the CTA's token. In prologue a CTA
               has 1024 columns, in arrange 2048 where tiles may be thin; a thread then writes a part of the token's rows
    place      a warp a slot: rank = pairs of the expert before this one, first tile = tiles of lower experts, both
               summed over 32 lanes

Rows come out as permute.py makes them.
"""

from tvm.script import tirx as T

from tvmmoe.config import MAX_EXPERTS, MAX_TOP_K, ActivationFormat
from tvmmoe.kernels.sm90a.gather import Chunk, segments_of
from tvmmoe.kernels.sm90a.layout import MAX_ARRANGED_PAIRS, THIN_ROWS
from tvmmoe.kernels.sm90a.permute import rows_per_tile, write_num_tiles
from tvmmoe.kernels.sm90a.route import ENTRIES, Router
from tvmmoe.kernels.sm90a.thin_rows import Window, mark
from tvmmoe.kernels.sm90a.trace import (
    PAST_L1,
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
    load_vec4,
    ptx,
    scalar,
    store_to,
    warp_add_s32,
)  # fmt: skip

WARPS = 16
THREADS = 32 * WARPS
MAX_TOKENS = WARPS  # of prologue: one a warp; two take 1.5 % of 16 tokens' time
COLUMNS = THREADS * 8  # of a CTA whose threads have 8 each
assert MAX_TOKENS * MAX_TOP_K <= MAX_ARRANGED_PAIRS
CHECKED_EARLY = 2  # times COLUMNS of a row, loaded with what the CTA writes
PARTS = 4  # of prologue's: there are few tokens, and what an SM has to store takes longer than that more of them route


def is_small(a):
    """Whether ``prologue`` takes the call (host expression)."""
    return T.And(a.num_tokens <= MAX_TOKENS, a.num_tokens * a.num_experts <= ENTRIES)


def is_medium(a):
    """Whether ``arrange`` takes the call (host expression)."""
    return a.num_tokens * a.top_k <= MAX_ARRANGED_PAIRS


def prologue(a, form: ActivationFormat, tile_m: int, step: int) -> None:
    """Emit the kernel for one activation format."""
    segments = segments_of(a, COLUMNS // PARTS)
    with kernel(f"prologue_{form.name}", cast(a.num_tokens * segments + 1, "int32"), THREADS) as thread:
        smem = Smem()
        router = Router(a, smem, MAX_TOKENS, THREADS)
        placement = Placement(a, smem, thread, tile_m, step, MAX_TOKENS * MAX_TOP_K)
        window = Window(smem, thread) if a.has_thin_tiles else None
        smem.commit()
        num_tokens = let(cast(a.num_tokens, "int32"))
        token = let(thread.cta // cast(segments, "int32"))  # num_tokens for the CTA that writes ids and weights
        segment = let(thread.cta % cast(segments, "int32"))
        is_first = T.And(segment == 0, token < num_tokens)
        rows = Rows(a, form, window, thread, let(T.min(token, num_tokens - 1)), segment, is_first, PARTS)
        placement.clear()
        rows.clear()
        ptx.griddepcontrol.wait()
        ptx.griddepcontrol.launch_dependents()
        router.begin(thread, T.int32(0), num_tokens)
        rows.load("global")
        router.write_keys()
        cuda.cta_sync()
        with if_(thread.warp < num_tokens):
            expert, share = router.choose(thread.warp)
            with if_(token == num_tokens):
                router.write(thread.warp, expert, router.weigh(router.score(thread.warp, expert), share))
            with if_(thread.lane < router.top_k):
                placement.put(thread.warp * router.top_k + thread.lane, expert)
        cuda.cta_sync()
        with if_(token < num_tokens):
            placement.place(token, segment == 0)
        rows.check()
        cuda.cta_sync()
        with if_(token < num_tokens):
            rows.write(placement)


def arrange(a, form: ActivationFormat, tile_m: int, step: int) -> None:
    """Emit the kernel for one activation format."""
    num_parts = 2 if a.has_thin_tiles else 1  # whose rows are stored twice (one of 32 experts, T=16 -1 %)
    segments = segments_of(a, COLUMNS // num_parts)
    with kernel(f"arrange_{form.name}", cast(a.num_tokens * segments, "int32"), THREADS) as thread:
        smem = Smem()
        placement = Placement(a, smem, thread, tile_m, step, MAX_ARRANGED_PAIRS)
        window = Window(smem, thread) if a.has_thin_tiles else None
        smem.commit()
        token, segment = let(thread.cta // cast(segments, "int32")), let(thread.cta % cast(segments, "int32"))
        rows = Rows(a, form, window, thread, token, segment, segment == 0, num_parts)
        rows.load(PAST_L1)  # route started after everything that writes it had ended
        placement.clear()
        rows.clear()
        cuda.cta_sync()
        ptx.griddepcontrol.wait()
        ptx.griddepcontrol.launch_dependents()
        num_pairs = let(cast(a.num_tokens * a.top_k, "int32"))
        pairs = [let(i * THREADS + thread.tid) for i in range(MAX_ARRANGED_PAIRS // THREADS)]
        experts = [scalar("int32") for _ in pairs]
        for pair, expert in zip(pairs, experts, strict=True):
            with if_(pair < num_pairs):
                assign(expert, load("int32", address(a.ws["topk_ids"], cast(pair, "int64") * 4)))
        for pair, expert in zip(pairs, experts, strict=True):
            with if_(pair < num_pairs):
                placement.put(pair, expert)
        cuda.cta_sync()
        placement.place(token, segment == 0)
        rows.check()
        cuda.cta_sync()
        rows.write(placement)


class Rows:
    """A token's rows as far as a CTA writes them, of thin tiles also as columns (thin_rows.py) if there is a ``window``."""

    def __init__(
        self, a, form: ActivationFormat, window: Window | None, thread, token, segment, is_first, num_parts: int = 1
    ):
        self.a, self.form, self.window, self.thread, self.is_first = a, form, window, thread, is_first
        self.chunk = Chunk(a, form, token, segment, thread, COLUMNS // num_parts, num_parts)
        num_early = 0 if window is None else CHECKED_EARLY  # by the CTA of the first segment, which looks at all columns
        self.early = [Chunk(a, form, token, T.int32(i), thread, COLUMNS) for i in range(num_early)]

    def clear(self) -> None:
        """The CTA synchronises before :meth:`check`."""
        if self.window is not None:
            self.window.clear()

    def load(self, space: str) -> None:
        self.chunk.load(space)
        if self.window is not None:
            with if_(self.is_first):
                for chunk in self.early:
                    chunk.load(space)

    def check(self) -> None:
        """Whether the token has values outside of the window. The CTA synchronises before :meth:`write`."""
        if self.window is None:
            return
        num_early = len(self.early)
        with if_(self.is_first):
            for chunk in self.early:
                self.window.check(chunk.encoded.pairs())
            with for_(T.max(cast(segments_of(self.a, COLUMNS), "int32") - num_early, T.int32(0))) as i:
                chunk = Chunk(self.a, self.form, self.chunk.token, i + num_early, self.thread, COLUMNS)
                chunk.load()
                self.window.check(chunk.encoded.pairs())

    def write(self, placement: "Placement") -> None:
        if self.window is None:
            self.chunk.write(placement.row)
            return
        slot = self.thread.tid
        with if_(T.And(self.is_first, slot < placement.top_k)):
            with if_(T.And(placement.row(slot) >= 0, placement.is_thin(slot))):
                mark(self.a.ws["x_outside"], placement.row(slot), self.window.is_outside())
        self.chunk.write(placement.row, placement.is_thin)


class Placement:
    """Rows of one token's pairs, from the experts of all pairs."""

    def __init__(self, a, smem: Smem, thread, tile_m: int, step: int, max_pairs: int):
        """``step`` as for :func:`rows_per_tile`."""
        self.a, self.thread, self.tile_m, self.step = a, thread, tile_m, step
        self._experts = smem.alloc(max_pairs, "int32", 128)  # local; -1: another rank's
        self._counts = smem.alloc(MAX_EXPERTS, "int32", 128)  # pairs of every local expert
        self._rows = smem.alloc(MAX_TOP_K, "int32", 128)
        self._are_thin = smem.alloc(MAX_TOP_K, "int32", 128) if a.has_thin_tiles else None
        self.num_local = let(cast(a.local_num_experts, "int32"))
        self.top_k = let(cast(a.top_k, "int32"))

    def clear(self) -> None:
        """Zero the counts; the CTA synchronises before :meth:`put`."""
        with for_((self.num_local + THREADS - 1) // THREADS) as i:
            I.buffer_store(self._counts, T.int32(0), [i * THREADS + self.thread.tid])

    def put(self, pair, expert) -> None:
        """Note a pair's expert; the CTA synchronises before :meth:`place`."""
        local = let(expert - cast(self.a.local_expert_offset, "int32"))
        is_local = T.And(local >= 0, local < self.num_local)
        I.buffer_store(self._experts, T.Select(is_local, local, T.int32(-1)), [pair])
        with if_(is_local):
            I.evaluate(T.cuda.atomic_add(self._counts.ptr_to([local]), T.int32(1)))

    def row(self, slot):
        """Row of a slot of the token, -1 for another rank's; the CTA synchronises after :meth:`place`."""
        return self._rows[slot]

    def is_thin(self, slot):
        """Whether that row's tile is thin."""
        return self._are_thin[slot] != 0

    def place(self, token, is_writer) -> None:
        """Place the token's pairs, a warp a slot; a writer also stores their results."""
        with for_((self.top_k + WARPS - 1) // WARPS) as i:
            slot = let(i * WARPS + self.thread.warp)
            with if_(slot < self.top_k):
                pair = let(token * self.top_k + slot)
                mine = let(self._experts[pair])
                rank, first_tile = self._rank(pair, mine), self._tiles_below(mine)
                rows = let(T.max(self._counts[T.max(mine, 0)], 1))  # another rank's pair divides by its share, too
                share = let(rows_per_tile(rows, self.tile_m, self.step))
                tile = let(first_tile + rank // share)
                row = let(T.Select(mine >= 0, tile * self.tile_m + rank % share, T.int32(-1)))
                live = let(T.min(rows - rank // share * share, share))  # of the tile
                with if_(self.thread.lane == 0):
                    I.buffer_store(self._rows, row, [slot])
                    if self.a.has_thin_tiles:
                        I.buffer_store(self._are_thin, cast(live <= THIN_ROWS, "int32"), [slot])
                    with if_(is_writer):
                        self._write(pair, mine, row, tile, rank % share == 0, live)
        with if_(T.And(self.thread.cta == 0, self.thread.warp == WARPS - 1)):
            num_tiles = self._tiles_below(self.num_local)
            with if_(self.thread.lane == 0):
                write_num_tiles(self.a, num_tiles)

    def _rank(self, pair, mine):
        """Pairs before ``pair`` with the same expert; every lane gets the sum."""
        count = scalar("int32", T.int32(0))
        with for_((pair + 127) // 128) as i:
            first = let((i * 32 + self.thread.lane) * 4)
            experts = load_vec4(self._experts.ptr_to([first]), "shared")
            for j in range(4):
                is_before = T.And(cast(experts[j], "int32") == mine, first + j < pair)
                assign(count, count + cast(is_before, "int32"))
        return warp_add_s32(count)

    def _tiles_below(self, expert):
        """Tiles of the local experts below ``expert``; every lane gets the sum."""
        count = scalar("int32", T.int32(0))
        with for_((expert + 31) // 32) as i:
            e = let(i * 32 + self.thread.lane)
            with if_(e < expert):
                assign(count, count + (self._counts[e] + self.tile_m - 1) // self.tile_m)
        return warp_add_s32(count)

    def _write(self, pair, expert, row, tile, begins_tile, live) -> None:
        a = self.a
        store_to("int32", address(a.result("expanded_idx_to_permuted_idx"), cast(pair, "int64") * 4), row)
        with if_(expert >= 0):
            with if_(begins_tile):
                store_to("int32", address(a.ws["tile_expert"], cast(tile, "int64") * 4), expert)
                store_to("int32", address(a.ws["tile_rows"], cast(tile, "int64") * 4), live)
                if a.has_thin_tiles:
                    for i in range(THIN_ROWS):
                        mark(a.ws["z_outside"], row + i, T.int32(0))
