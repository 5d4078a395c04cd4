# SPDX-License-Identifier: Apache-2.0
"""Both grouped GEMMs, FP4 weights times bf16 tokens with operands swapped: roles, loads and the way from tile to tile.

    grid         one persistent CTA an SM; tile = (row block of weights, tile of tile_m tokens of one expert), as
                 tile_scheduler.py hands them out
    consumers    2 or 4 warpgroups: FP4 -> bf16 in registers (the MMA's A, 64 rows), tokens are B, fp32 accumulators:
                 gemm_multiply.py; 4 hide the latency of decoding better, 2 have registers for 128 accumulators a thread
    next warp    TMA: weights [rows, 64 bytes] of a K block, tokens [width, 128 bytes] of all halves of a stage's K blocks (of
                 one at 8 columns and in clusters), with 128-byte swizzle
                 of nvfp4 a stage's scales, too [rows, 16 or 32 bytes], where loads_scales_by_tma and rows are aligned
    last 3 warps (2 in gemm_pair) otherwise scale bytes of the tile's rows by cp.async, up to 16 at a time if aligned; mxfp4's
                 aligned rows in gemm1 at 64 and 96 columns pass through registers, several stages at once
    store        bias, activation and scales on accumulators, then rows of bf16: gemm_epilogue.py

    ks = 1       the warpgroups own different rows: prefill
    ks = 2, 4    that many own the same 64 * mi rows and share the K blocks of a stage, partial sums meet in shared
                 memory: more, smaller tiles for decode

A stage's full barrier counts the TMA bytes, ``operand_arrivals`` of the TMA warp and one of each lane of the scale warps or
for it; its empty barrier one per consumer warp. K past the end is zero on both sides: TMA zero-fills weights and tokens,
scale bytes there are zero. A tile multiplies (``widths``) and loads only as many token columns as its rows need.

A problem that ``knows_tiles`` (gemm2: an earlier kernel than the one before it wrote the tile list) fills the stages of its
first tile with weights before it waits for that kernel, so that DRAM is not idle between the two.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

from tvm.script import tirx as T

from tvmmoe.kernels.sm90a import intrinsics as isa
from tvmmoe.kernels.sm90a.gemm_config import GemmConfig, SharedMemory, shared_memory
from tvmmoe.kernels.sm90a.gemm_epilogue import Epilogue
from tvmmoe.kernels.sm90a.gemm_multiply import Multiply
from tvmmoe.kernels.sm90a.layout import K_BLOCK
from tvmmoe.kernels.sm90a.tile_scheduler import Tile, TileScheduler
from tvmmoe.kernels.sm90a.trace import (
    PAST_L1,
    Smem,
    address,
    assign,
    cast,
    cuda,
    for_,
    if_,
    if_else,
    kernel,
    let,
    load,
    load_vec4,
    ptx,
    regs,
    scalar,
    shuffle,
    store_to,
    tensor_map,
    u32,
    while_,
)  # fmt: skip

SMEM_ADDRESS_BITS = 18  # more than 227 KiB; in a cluster the CTA's rank is at bit 24


class Work(NamedTuple):
    """A problem and what a kernel knows of it from the start."""

    p: object
    weight_map: object
    scale_map: object  # None: no TMA of scales
    token_maps: tuple
    k_steps: object
    scale_row_bytes: object
    is_aligned: object  # rows of scales allow pieces of up to 16 bytes, by TMA if that has a map, else granules are copied
    pitch_of_scales: object

    @property
    def maps(self) -> list:
        """Those that there are."""
        return [tensor for tensor in (self.weight_map, self.scale_map, *self.token_maps) if tensor is not None]


class GroupedGemm(Multiply, Epilogue):
    """Emits one kernel; ``problem`` (gemm1, gemm2) says which rows a tile has and what happens to accumulators."""

    scale_lanes = 96  # three warps copy scales
    initializing_thread = 0  # of barriers
    operand_arrivals = 1  # of the TMA warp at a stage's full barrier
    block_step = 1  # from one of a warpgroup's K blocks in a stage to its next one
    token_dtype, token_bytes = "bfloat16", 2  # of the operand; its rows are 2 * padded_k bytes apart in any case

    def __init__(self, a, config: GemmConfig, problem):
        self.a, self.c, self.p = a, config, problem
        c = config
        memory = self._divide_memory(problem)
        self.x_block, self.w_block, self.s_stage, self.pitch, self.partial_words, self.stages, self.chunk_m = memory
        self.x_stage, self.w_stage = c.k_blocks * self.x_block, c.k_blocks * self.w_block
        self.per_warpgroup = c.k_blocks // c.ks  # K blocks of a stage that one warpgroup multiplies
        self.first_block = self.per_warpgroup  # from a warpgroup's first one to the next warpgroup's
        self.partial_total = c.partial_buffers * self.partial_words
        self.out_bytes = self.chunk_m * c.warpgroups * self.pitch
        self.acc_count = c.tile_m // 2
        assert self.stages >= 2, c
        assert c.stage_scale_bytes % c.scale_granule == 0, c  # a row's skew is the same in every stage
        # _token_bytes, _token_map and _multiply each choose a tile's width, and pieces start at whole atoms of the swizzle.
        assert c.widths == tuple(range(c.widths[0], c.tile_m + 1, c.width_step)), c
        assert c.widths[0] % c.width_step == c.width_step % 8 == 0, c
        self.registers = c.registers
        # Not in gemm2, whose tiles have few stages: what loads too late there costs more than it saves.
        self.held_stages = 1 if problem.knows_tiles else c.held_scale_stages
        self.piece = min(16, self.held_stages * c.stage_scale_bytes)  # bytes of a copy of scales
        self.scheduler = self._scheduler()

    def _divide_memory(self, problem) -> SharedMemory:
        return shared_memory(self.c, problem.matrices, self.token_bytes, self.reserved_bytes())

    def _scheduler(self) -> TileScheduler:
        return TileScheduler(self.a, self.c, self.p.number)

    @property
    def has_scale_map(self) -> bool:
        """Whether TMA loads scales where rows are aligned; scale warps then do nothing."""
        return self.c.loads_scales_by_tma

    def reserved_bytes(self) -> int:
        """Shared memory that a subclass allocates in :meth:`_allocate_more`."""
        return 0

    def emit(self) -> None:
        c, p = self.c, self.p
        maps, row_blocks = self._maps(p), self._row_blocks(p)
        with self._kernel(p.name):
            self._allocate()
            if not p.knows_tiles:
                ptx.griddepcontrol.wait()
            k_steps = self._k_steps(p)
            self.scheduler.begin(row_blocks, not p.knows_tiles)
            self._use(self._begin(p, *maps, k_steps))
            self._run_roles()
            if c.cluster > 1:  # whose CTAs still write here
                cuda.cluster_sync()

    def _maps(self, p):
        """Tensor maps of weights, their scales and tokens: host expressions."""
        c, scales = self.c, None
        if self.has_scale_map:  # unused where rows or base are not of whole 16 bytes, but must be legal
            row = T.max(p.k // c.weight_format.block_size & T.int64(-16), T.int64(16))
            scales = p.row_map(c, p.scales & T.int64(-16), row, c.stage_scale_bytes)
        return p.row_map(c, p.weights, p.k // 2, K_BLOCK // 2), scales, self._token_maps(p)

    def _token_maps(self, p) -> tuple:
        """A map for each width, whose box is a stage's columns; or one for boxes of ``width_step`` rows of 128 bytes."""
        c, row, rows = self.c, 128 // self.token_bytes, self.a.max_tiles * self.c.tile_m
        encode = functools.partial(tensor_map, address(p.operand), dtype=self.token_dtype, swizzle=3)
        if not c.loads_columns_at_once:
            return (encode([p.padded_k, rows], [2 * p.padded_k], [row, c.width_step]),)
        dims, strides = [row, rows, p.padded_k // row], [2 * p.padded_k, T.int64(128)]
        return tuple(encode(dims, strides, [row, width, self.token_pieces]) for width in c.widths)

    def _x_piece(self, width: int) -> int:
        """Bytes from one 128-byte piece of a stage's tokens to the next."""
        return 128 * (width if self.c.loads_columns_at_once else self.c.tile_m)

    @property
    def token_pieces(self) -> int:
        """Pieces of 128 bytes that a stage has of a token."""
        return self.token_bytes * self.c.k_blocks

    def _row_blocks(self, p):
        """Row blocks of a cluster: a host expression."""
        return cast((p.num_row_blocks(self.c) + (self.c.cluster - 1)) // self.c.cluster, "int32")

    @contextlib.contextmanager
    def _kernel(self, name: str) -> Iterator[None]:
        c = self.c
        num_threads = (c.warpgroups + 1) * 128
        with kernel(name, T.int32(self.scheduler.num_ctas), num_threads, cluster=c.cluster) as self.thread:
            yield

    def _k_steps(self, p):
        k_stage = K_BLOCK * self.c.k_blocks
        return let((cast(p.k, "int32") + (k_stage - 1)) // k_stage)

    def _begin(self, p, weight_map, scale_map, token_maps, k_steps) -> Work:
        c, row_bytes = self.c, p.k // self.c.weight_format.block_size
        scale_row_bytes = let(cast(row_bytes, "int32"))
        misaligned = (row_bytes | p.scales) & T.int64(self.piece - 1)
        is_aligned = let(cast(misaligned == 0, "int32")) != 0
        pitch = let(T.Select(is_aligned, T.int32(c.stage_scale_bytes), T.int32(c.scale_pitch)))
        return Work(p, weight_map, scale_map, token_maps, k_steps, scale_row_bytes, is_aligned, pitch)

    def _use(self, work: Work) -> None:
        """Go on with this problem: while tracing, its fields are attributes."""
        self.work = work
        for name, value in work._asdict().items():
            setattr(self, name, value)

    def _run_roles(self) -> None:
        thread, producer = self.thread, 4 * self.c.warpgroups  # first warp of the producers' warpgroup
        with if_(thread.warp >= producer):
            ptx["setmaxnreg.dec.sync.aligned.u32"](self.registers[0])
            with if_(thread.warp == producer):
                self._produce_operands()
            copies = thread.warp > producer
            if self.scale_map is not None:
                copies = T.And(copies, T.Not(self.is_aligned))
            with if_(copies):
                self._produce_scales(let(thread.tid - (producer + 1) * 32))
        with if_(thread.warp < producer):
            ptx["setmaxnreg.inc.sync.aligned.u32"](self.registers[1])
            if self.p.knows_tiles:
                ptx.griddepcontrol.wait()
            ptx.griddepcontrol.launch_dependents()
            self._consume()

    def _allocate(self) -> None:
        smem, s = Smem(), self.stages
        self.xs = smem.alloc(s * self.x_stage, "uint8", 1024)
        self.ws = smem.alloc(s * self.w_stage, "uint8", 128)
        self._allocate_results(smem)
        self.ss = smem.alloc(s * self.s_stage, "uint8", 128)
        self.full, self.empty = smem.alloc(s, "uint64", 8), smem.alloc(s + 1, "uint64", 8)
        self.scheduler.allocate(smem, self.thread)
        self._allocate_more(smem)
        smem.commit()
        self._initialize()
        self.scheduler.initialize()
        with if_(self.thread.tid == self.initializing_thread):
            releases = u32(4 * self.c.warpgroups * self.c.cluster)
            for i in range(s):
                ptx.mbarrier.init.shared.b64(self.full.ptr_to([i]), u32(self.operand_arrivals + self.scale_lanes))
                ptx.mbarrier.init.shared.b64(self.empty.ptr_to([i]), releases)
            ptx.mbarrier.init.shared.b64(self.empty.ptr_to([s]), releases)
            ptx.fence.mbarrier_init.release.cluster()
            ptx.fence.proxy.async_.shared__cta()
        cuda.cta_sync()
        if self.c.cluster > 1:
            cuda.cluster_sync()

    def _allocate_results(self, smem: Smem) -> None:
        """What the epilogue needs."""
        self.outs = smem.alloc(self.out_bytes, "uint8", 128)
        self.partial = smem.alloc(max(self.partial_total, 1), "float32", 128)

    def _allocate_more(self, smem: Smem) -> None:
        """What only this way of multiplying needs: the factors of decode_word."""
        factors = isa.SHIFT_FACTORS if self.c.decodes_by_multiplying else ()
        self.shift_factors = smem.alloc(32 * len(factors), "uint32", 8) if factors else None

    def _initialize(self) -> None:
        """Write it, before the CTA synchronises."""
        if self.shift_factors is not None:
            with if_(self.thread.warp == 0):
                for i, factor in enumerate(isa.SHIFT_FACTORS):
                    store_to("uint32", self.shift_factors.ptr_to([32 * i + self.thread.lane]), u32(factor), "shared")

    def _advance(self) -> None:
        assign(self.stage, self.stage + 1)
        with if_(self.stage == self.stages):
            assign(self.stage, T.int32(0))
            assign(self.phase, self.phase ^ u32(1))

    # ---------------------------------------------------------------------------------------------------- producers

    def _begin_role(self) -> None:
        """Pipeline state of one role: what all of them shared would not stay in uniform registers."""
        self.stage, self.phase = scalar("int32", T.int32(0)), scalar("uint32", u32(0))

    def _set_policy(self) -> None:
        c = self.c
        self.policy = None
        if c.is_streamed and c.tile_m > 16:  # beside 32 columns what follows costs 3 %
            self.policy = T.uint64(isa.EVICT_FIRST)
        elif c.is_streamed:
            # Rows that start inside a 64-byte piece share it with the next K block: that must stay until then.
            is_whole = (self.p.k // 2) & T.int64(63) == T.int64(0)
            self.policy = let(T.Select(is_whole, T.uint64(isa.EVICT_FIRST), T.uint64(isa.EVICT_NORMAL)))

    def _produce_operands(self) -> None:
        self._set_policy()
        self._begin_role()
        if self.c.is_issued_by_warp:
            self._issue_loads(self.thread.lane == 0)
        else:
            with if_(cuda.elect_sync() != u32(0)):
                self._issue_loads(T.bool(True))

    @staticmethod
    def _prefetch_maps(work: Work) -> None:
        for tensor in work.maps:
            ptx.prefetch.tensormap(T.address_of(tensor))

    def _issue_loads(self, is_issuer) -> None:
        c = self.c
        with if_(is_issuer):
            self._prefetch_maps(self.work)
        tiles = self.scheduler
        tiles.lead(is_issuer, PAST_L1 if self.p.knows_tiles else "global")
        early = scalar("int32", T.int32(0))  # stages whose weights are on their way
        if self.p.knows_tiles:
            with if_(tiles.is_left):
                tile = tiles.tile
                coordinates, x_bytes = self.p.row_coordinates(c, tile), self._token_bytes(tile)
                assign(early, T.min(self.k_steps, T.int32(self.stages)))
                with for_(early) as step:
                    with if_(is_issuer):
                        self._load_weights(step, step, coordinates, x_bytes)
            ptx.griddepcontrol.wait()
            tiles.announce_first(is_issuer)
        with while_(tiles.is_left):
            self._load_tile(is_issuer, early)

    def _load_tile(self, is_issuer, early) -> None:
        """Load the tile, whose first ``early`` stages have their weights, and announce the next one."""
        tiles, tile = self.scheduler, self.scheduler.tile
        coordinates, x_bytes = self.p.row_coordinates(self.c, tile), self._token_bytes(tile)
        token_map = self._token_map(x_bytes)
        # The answer takes as long as loads do; asked earlier, a slow CTA would take a tile that others wait for.
        claiming = let(T.max(self.k_steps - (self.stages + 2), T.int32(0)))
        with for_(self.k_steps) as step:

            def wait_and_load(step=step):
                self._wait_for_room()
                with if_(is_issuer):
                    self._load_weights(self.stage, step, coordinates, x_bytes)

            if_else(early > 0, lambda: assign(early, early - 1), wait_and_load)
            with if_(is_issuer):
                self._load_tokens(tile, step, x_bytes, token_map)
            with if_(step == claiming):
                tiles.claim(is_issuer)
            self._advance()
        tiles.announce(is_issuer)

    def _wait_for_room(self) -> None:
        """Until the stage may be written by TMA, which is another proxy than that which read it (in this CTA: what TMA writes
        in others of a cluster is ordered by their barriers alone)."""
        cuda.mbarrier_wait(self.empty.ptr_to([self.stage]), self.phase ^ u32(1))
        ptx.fence.proxy.async_.shared__cta()

    def _load_weights(self, stage, step, coordinates, x_bytes) -> None:
        """A stage's boxes of weights and, by TMA, of scales; its barrier expects ``x_bytes`` of tokens, too."""
        c, bar = self.c, self.full.ptr_to([stage])
        num_bytes = x_bytes + self.w_stage
        if self.scale_map is not None:
            num_bytes += T.Select(self.is_aligned, T.int32(c.rows * c.stage_scale_bytes), T.int32(0))
        ptx.mbarrier.arrive.expect_tx.shared.b64(bar, cast(num_bytes, "uint32"))
        for block in range(c.k_blocks):
            destination = self.ws.ptr_to([stage * self.w_stage + block * self.w_block])
            place = [(step * c.k_blocks + block) * (K_BLOCK // 2), *coordinates]
            isa.tma_load(len(place), destination, T.address_of(self.weight_map), place, bar, self.policy)
        if self.scale_map is not None:
            with if_(self.is_aligned):
                place = [step * c.stage_scale_bytes, *coordinates]
                isa.tma_load(len(place), self.ss.ptr_to([stage * self.s_stage]), T.address_of(self.scale_map), place, bar)
                ptx.mbarrier.arrive.shared.b64(bar, u32(self.scale_lanes))

    def _token_map(self, x_bytes):
        """Address of the map for a tile whose stages have so many bytes of tokens."""
        pointer = T.address_of(self.token_maps[-1])
        for width, tensor in reversed(list(zip(self.c.widths, self.token_maps[:-1], strict=False))):
            pointer = T.Select(x_bytes == width * (self.token_pieces * 128), T.address_of(tensor), pointer)
        return let(pointer)

    def _load_tokens(self, tile: Tile, step, x_bytes, token_map) -> None:
        """A stage's token boxes; the CTAs of a cluster share them, and all get all."""
        c, rank, box = self.c, self.scheduler.rank, self.c.width_step
        first = tile.token_tile * c.tile_m
        if c.loads_columns_at_once:
            self._load_box(token_map, 0, [0, first, step * self.token_pieces])
            return

        def load_rows(row) -> None:
            for piece in range(self.token_pieces):
                k = (step * self.token_pieces + piece) * (128 // self.token_bytes)
                self._load_box(token_map, piece * c.tile_m + row, [k, first + row])

        if c.has_one_width and c.cluster == 1:
            load_rows(0)
            return
        num_boxes = x_bytes // (self.token_pieces * 128 * box)
        with for_((num_boxes + (c.cluster - 1 - rank)) // c.cluster) as turn:
            load_rows((turn * c.cluster + rank) * box)

    def _load_box(self, token_map, row, place) -> None:
        """A box to a row of 128 bytes in the stage."""
        target = self.xs.ptr_to([self.stage * self.x_stage + row * 128]), token_map
        barrier = self.full.ptr_to([self.stage])
        if self.c.cluster > 1:
            isa.tma_load_to_cluster(len(place), *target, place, barrier, self.c.cluster)
        else:
            isa.tma_load(len(place), *target, place, barrier)

    def _token_bytes(self, tile: Tile):
        """Bytes of token columns that a stage of this tile loads."""
        c = self.c
        rows = (T.max(tile.num_rows, c.widths[0]) + (c.width_step - 1)) // c.width_step * c.width_step
        return let(rows * (self.token_pieces * 128))

    def _produce_scales(self, lane) -> None:
        self._begin_role()
        if self.p.knows_tiles:
            ptx.griddepcontrol.wait()
        self.scheduler.follow()
        self._copy_scales_of_tiles(lane)

    def _copy_scales_of_tiles(self, lane) -> None:
        c, row_bytes = self.c, cast(self.scale_row_bytes, "int64")
        rows = [let(lane + self.scale_lanes * i) for i in range(-(-c.rows // self.scale_lanes))]
        with while_(self.scheduler.is_left):
            tile = self.scheduler.tile
            expert = let(self.p.scales + cast(tile.expert, "int64") * (self.p.rows_per_expert * row_bytes))
            offsets = [let(self.p.row(c, tile, row) * self.scale_row_bytes) for row in rows]
            slots = [let(row * self.pitch_of_scales) for row in rows]
            self._describe(tile, lane, rows, expert, offsets)
            starts = [expert + cast(offset, "int64") for offset in offsets]
            copy = functools.partial(self._copy_scales_of_tile, rows, slots, starts)
            if self.scale_map is not None:
                copy(self._copy_granules)
            elif self.held_stages == 1:
                copy(self._copy_scales)
            else:
                hold = functools.partial(self._pass_scales_of_tile, rows, slots, starts)
                if_else(self.is_aligned, hold, lambda: copy(self._copy_granules))
            self.scheduler.advance()

    def _describe(self, tile: Tile, lane, rows, expert, offsets) -> None:
        """What a subclass lets the scale warps find out about a tile before they copy the scales of its rows.

        Those of this lane's ``rows`` lie ``offsets`` bytes past the address ``expert``.
        """

    def _copy_scales_of_tile(self, rows, slots, starts, copy) -> None:
        with for_(self.k_steps) as step:
            cuda.mbarrier_wait(self.empty.ptr_to([self.stage]), self.phase ^ u32(1))
            copy(step, rows, slots, starts)
            ptx["cp.async.mbarrier.arrive.noinc.shared.b64"](self.full.ptr_to([self.stage]))
            self._advance()

    def _pass_scales_of_tile(self, rows, slots, starts) -> None:
        """The same to the same places through registers: 16 bytes of a row are loaded at once, while stages are full. Rows
        are aligned, so such pieces, and with them stages, come out even."""
        num_words = self.c.stage_scale_bytes // 4
        held = [regs(4, "uint32") for _ in rows]
        with for_(self.k_steps // self.held_stages) as piece:
            for row, start, words in self._of_tile(rows, starts, held):
                load_vec4(address(start, cast(piece * 16, "int64")), into=words)
            for first in range(0, 4, num_words):
                cuda.mbarrier_wait(self.empty.ptr_to([self.stage]), self.phase ^ u32(1))
                for _, slot, words in self._of_tile(rows, slots, held):
                    place = self.ss.ptr_to([self.stage * self.s_stage + slot])
                    isa.store_words(place, [words[first + i] for i in range(num_words)])
                ptx.mbarrier.arrive.shared.b64(self.full.ptr_to([self.stage]), u32(1))
                self._advance()

    def _of_tile(self, rows, *others):
        """A lane's rows, each with what else is known of it, inside of a branch where not every lane has that many."""
        for i, of_row in enumerate(zip(rows, *others, strict=True)):
            with contextlib.nullcontext() if self.scale_lanes * (i + 1) <= self.c.rows else if_(of_row[0] < self.c.rows):
                yield of_row

    def _copy_scales(self, step, rows, slots, starts) -> None:
        """Rows' scales of a stage into their slots, from rows that begin at ``starts``; zeros where they have ended."""
        ways = self._copy_pieces, self._copy_granules
        if_else(self.is_aligned, *(functools.partial(way, step, rows, slots, starts) for way in ways))

    def _copy_pieces(self, step, rows, slots, starts) -> None:
        for slot, source, left in self._places(step, rows, slots, starts):
            for offset in range(0, self.c.stage_scale_bytes, self.piece):
                size = let(T.Select(left > offset, T.int32(self.piece), T.int32(0)))
                isa.copy_async(T.ptr_byte_offset(slot, offset, "uint8"), address(source, offset), self.piece, size)

    def _copy_granules(self, step, rows, slots, starts) -> None:
        """Around bytes that start anywhere; consumers add the skew."""
        granule, pitch = self.c.scale_granule, self.c.scale_pitch

        def copy(is_whole: bool) -> None:
            for slot, source, left in self._places(step, rows, slots, starts):
                start = let(source)
                aligned = let(start & T.int64(-granule))
                end = None if is_whole else let(left + cast(start & T.int64(granule - 1), "int32"))
                for offset in range(0, pitch, granule):
                    size = T.int32(granule) if is_whole else T.max(T.min(end - offset, T.int32(granule)), T.int32(0))
                    isa.copy_async(T.ptr_byte_offset(slot, offset, "uint8"), address(aligned, offset), granule, let(size))

        if granule == 4:
            copy(is_whole=False)
        else:  # most stages need no look at where rows end, which took more instructions than the copies
            left = self.scale_row_bytes - step * self.c.stage_scale_bytes
            if_else(left >= pitch, lambda: copy(is_whole=True), lambda: copy(is_whole=False))

    def _places(self, step, rows, slots, starts):
        """For each row of this lane: where its scales of a stage go and come from, and how many are left."""
        k_byte = let(step * self.c.stage_scale_bytes)
        left = let(self.scale_row_bytes - k_byte)
        for _, slot, start in self._of_tile(rows, slots, starts):
            yield self.ss.ptr_to([self.stage * self.s_stage + slot]), start + cast(k_byte, "int64"), left

    # ---------------------------------------------------------------------------------------------------- consumers

    def _consume(self) -> None:
        self._begin_role()
        self._allot()
        self._place_rows()
        self.turn = scalar("int32", T.int32(0))
        self.scheduler.follow()
        self._multiply_tiles()

    def _allot(self) -> None:
        """Registers of a consumer, and its place among them."""
        c, thread = self.c, self.thread
        self.warpgroup, self.warp4 = let(thread.warp // 4), let(thread.warp % 4)
        self.group, self.quad = let(thread.lane // 4), let(thread.lane % 4)
        self.factors = None
        if c.decodes_by_multiplying:
            self.factors = [load("uint32", self.shift_factors.ptr_to([32 * i + thread.lane]), "shared") for i in range(2)]
        self.k_sub, self.row_group = let(self.warpgroup % c.ks), let(self.warpgroup // c.ks)
        self.acc = [regs(self.acc_count, "float32") for _ in range(c.mi)]
        self._allot_operands()

    def _place_rows(self) -> None:
        """Where this thread's rows and their scales are in a stage."""
        c = self.c
        # [mi][r]: fragment rows of this thread, the same in every tile
        first = let(self.p.first_row(self))
        self.rows = [[first + offset for offset in pair] for pair in self._row_offsets()]
        # Bytes between a row's slot and its first scale. Tiles and experts start at multiples of 8 rows, so only the
        # row's number modulo 8 matters; rows clamped into the tensor may read other bytes, their results are dropped.
        skews = [let(T.Select(self.is_aligned, T.int32(0), self._skew(r))) for r in range(2)]
        # Addresses in the first stage: of the first row's first words of this thread, and of each row's scales. ptxas would
        # compute them again for every K block if they did not come from a shuffle.
        words = self.k_sub * (self.first_block * self.w_block) + first * (K_BLOCK // 2) + self.quad * 16
        self.word_place = self._kept(cuda.cvta_generic_to_shared(self.ws.ptr_to([words])))
        scales = let(self.k_sub * (self.first_block * c.scale_bytes) + self.quad * (c.scale_bytes // 4))
        self.scale_places = [
            self._kept(cuda.cvta_generic_to_shared(self.ss.ptr_to([row * self.pitch_of_scales + skew + scales])))
            for pair in self.rows for row, skew in zip(pair, skews, strict=True)
        ]

    def _skew(self, r: int):
        start = self.p.scales + cast(self.p.row_modulo_8(self, r) * self.scale_row_bytes, "int64")
        return cast(start & T.int64(self.c.scale_granule - 1), "int32")

    @property
    def out_columns(self) -> int:
        """Of a warpgroup."""
        return self.c.mi * 32 * self.p.matrices

    def fragment(self, mi: int):
        """Number of this warpgroup's 64-row fragment in the tile."""
        return self.row_group * self.c.mi + mi

    def _row_offsets(self) -> list[list[int]]:
        """[mi][r]: from this thread's first fragment row to the others."""
        per_fragment, to_other = self.p.row_steps(self.c)
        return [[mi * per_fragment + r * to_other for r in range(2)] for mi in range(self.c.mi)]

    def _kept(self, value):
        """``value``, in a register that ptxas cannot compute again."""
        return let(shuffle(let(value), self.thread.lane))

    def _early_expert(self, tile: Tile):
        """The tile's expert, for addresses of what the epilogue needs, which arrives under the main loop.

        ptxas moves what it takes for uniform into uniform registers at once, and so waits for it before the main loop: 7 % of
        gpt-oss at 16 columns. So a zero is added that it cannot know: the upper bits of an address in shared memory, which
        came from a shuffle by lane and so may differ between lanes.
        """
        assert self.c.cluster == 1, self.c
        zero = self.scale_places[0] >> u32(SMEM_ADDRESS_BITS)
        return let(cast(tile.expert + cast(zero, "int32"), "int64"))

    def _release(self, stage) -> None:
        """Tell whoever writes into a stage that this warp is done with it: every CTA of the cluster."""
        lane, barrier = self.thread.lane, self.empty.ptr_to([stage])
        if self.c.cluster > 1:
            with if_(lane < self.c.cluster):
                isa.arrive_in_cluster(barrier, lane)
        else:
            with if_(lane == 0):
                ptx.mbarrier.arrive.shared.b64(barrier, u32(1))
