# SPDX-License-Identifier: Apache-2.0
"""Main loop of both grouped GEMMs: FP4 weights times bf16 tokens, operands swapped.

    grid         one persistent CTA an SM; tile = (row block of weights, tile of tile_m tokens of one expert)
    consumers    2 or 4 warpgroups: FP4 -> bf16 in registers (wgmma's A, 64 rows), tokens are B, fp32 accumulators;
                 4 hide the latency of decoding better, 2 have registers for 128 accumulators a thread
    next warp    TMA: weights [rows, 64 bytes] of a K block, tokens [tile_m, 128] with 128-byte swizzle
    last 3 warps cp.async: scale bytes of the tile's rows
    store        bias, activation and scales on accumulators; bf16 through stmatrix.trans; 16-byte row stores

    ks = 1       the warpgroups own different rows: prefill
    ks = 2, 4    that many own the same 64 * mi rows and take alternate K blocks (a stage holds ks), partial sums meet
                 in shared memory: more, smaller tiles for decode

A stage's full barrier counts the TMA bytes, one arrival of the TMA warp and 96 of the scale warps; its empty barrier
one per consumer warp. K past the end is zero on both sides: TMA zero-fills weights and tokens, scale bytes there are
zero. A tile multiplies and loads only as many token columns as its rows need (``widths``).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm90a import intrinsics as isa
from tvmmoe.kernels.sm90a.layout import K_BLOCK
from tvmmoe.kernels.sm90a.trace import (
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
    store,
    store_vec4,
    tensor_map,
    u32,
    while_,
)  # fmt: skip

NUM_CTAS = 132  # SMs of an H100 SXM or H200; fewer SMs still finish, in more than one wave
SMEM_BYTES = 227 * 1024
MAX_STAGES = 16
BARRIER_BYTES = 512
SCALE_LANES = 96  # three warps copy scales


@dataclass(frozen=True)
class GemmConfig:
    """Compile-time choices of one GEMM kernel."""

    weight_format: WeightFormat
    tile_m: int  # tokens of a tile, wgmma's N
    mi: int  # 64-row fragments a warpgroup
    ks: int  # warpgroups that share rows and split K
    warpgroups: int = 2  # consumers

    @property
    def row_groups(self) -> int:
        return self.warpgroups // self.ks

    @property
    def rows(self) -> int:
        """Weight rows of a tile."""
        return 64 * self.mi * self.row_groups

    @property
    def registers(self) -> tuple[int, int]:
        """Of a producer and a consumer thread, summing to what the launch allots: 384 * 168 or 640 * 96.

        More than that never arrives: setmaxnreg.inc waits for registers that the CTA does not have.
        """
        return (40, 232) if self.warpgroups == 2 else (32, 112)

    @property
    def widths(self) -> tuple[int, ...]:
        """wgmma widths, ascending: a tile takes the smallest that holds its rows. Below 64 decoding is the limit."""
        return {96: (64, 96), 256: tuple(range(64, 257, 32))}.get(self.tile_m, (self.tile_m,))

    @property
    def token_box(self) -> int:
        """Token rows of one TMA box."""
        return math.gcd(*self.widths)

    @property
    def scale_bytes(self) -> int:
        """Scale bytes of a row in one K block."""
        return K_BLOCK // self.weight_format.block_size

    @property
    def scale_words(self) -> int:
        """Aligned 4-byte words that cover them wherever they start."""
        return self.scale_bytes // 4 + 1

    @property
    def scale_pitch(self) -> int:
        """Bytes between rows in shared memory, a power of two."""
        return 8 if self.weight_format == WeightFormat.mxfp4 else 16

    @property
    def words_per_group(self) -> int:
        """Words of weights a fragment row that one wgmma group multiplies."""
        return int(__import__('os').environ.get('WPG', 2 if self.tile_m * self.mi <= 16 else 1))

    @property
    def label(self) -> str:
        return f"{self.weight_format.name}_m{self.tile_m}_mi{self.mi}_ks{self.ks}_wg{self.warpgroups}"


class Tile(NamedTuple):
    """Where a CTA works."""

    token_tile: object
    row_block: object
    expert: object
    num_rows: object  # live tokens


class GroupedGemm:
    """Emits one kernel; ``problem`` (gemm1, gemm2) says which rows a tile has and what happens to accumulators."""

    def __init__(self, a, config: GemmConfig, problem):
        self.a, self.c, self.p = a, config, problem
        c = config
        self.x_block, self.w_block = c.tile_m * K_BLOCK * 2, c.rows * K_BLOCK // 2
        self.s_block = c.rows * c.scale_pitch
        self.x_stage, self.w_stage, self.s_stage = (c.ks * n for n in (self.x_block, self.w_block, self.s_block))
        self.chunk_m = min(c.tile_m, 32)  # tokens that pass through shared memory at a time
        self.out_columns = c.mi * 32 * problem.matrices  # of a warpgroup
        self.pitch = self.out_columns * 2 + 16
        self.out_bytes = c.warpgroups * self.chunk_m * self.pitch
        self.partial_words = c.mi * (c.tile_m // 2) * 128 if c.ks > 1 else 0  # of a warpgroup
        self.partial_total = 2 * c.row_groups * (c.ks - 1) * self.partial_words  # two tiles' worth
        free = SMEM_BYTES - BARRIER_BYTES - self.out_bytes - self.partial_total * 4
        self.stages = min(MAX_STAGES, free // (self.x_stage + self.w_stage + self.s_stage))
        self.acc_count = c.tile_m // 2
        assert self.stages >= 2, c
        # Small accumulators leave registers to fetch the epilogue's operands before the main loop.
        self.is_state_early = c.mi * self.acc_count <= 32

    def emit(self) -> None:
        a, c, p = self.a, self.c, self.p
        weight_map = p.weight_map(c)
        token_map = tensor_map(
            address(p.operand), [p.padded_k, a.max_tiles * c.tile_m], [2 * p.padded_k], [64, c.token_box], "bfloat16", 3
        )
        row_blocks = cast(p.num_row_blocks(c), "int32")
        with kernel(T.int32(NUM_CTAS), (c.warpgroups + 1) * 128) as thread:
            self.thread, self.weight_map, self.token_map = thread, weight_map, token_map
            self._allocate()
            ptx.griddepcontrol.wait()
            ptx.griddepcontrol.launch_dependents()
            self.row_blocks = let(row_blocks)
            self.k_steps = let(cast((p.k + K_BLOCK * c.ks - 1) // (K_BLOCK * c.ks), "int32"))
            self.scale_row_bytes = let(cast(p.k // c.weight_format.block_size, "int32"))
            self.is_aligned = let(cast(p.k % K_BLOCK == 0, "int32")) != 0
            self.num_items = let(load("int32", address(a.ws["num_tiles"])) * self.row_blocks)
            self.item = scalar("int32", thread.cta)
            self.stage, self.phase = scalar("int32", T.int32(0)), scalar("uint32", u32(0))
            producer = 4 * c.warpgroups  # first warp of the producers' warpgroup
            with if_(thread.warp >= producer):
                ptx["setmaxnreg.dec.sync.aligned.u32"](c.registers[0])
                with if_(thread.warp == producer):
                    self._produce_operands()
                with if_(thread.warp > producer):
                    self._produce_scales(let(thread.tid - (producer + 1) * 32))
            with if_(thread.warp < producer):
                ptx["setmaxnreg.inc.sync.aligned.u32"](c.registers[1])
                self._consume()

    def _allocate(self) -> None:
        smem, s = Smem(), self.stages
        self.xs = smem.alloc(s * self.x_stage, "uint8", 1024)
        self.ws = smem.alloc(s * self.w_stage, "uint8", 128)
        self.outs = smem.alloc(self.out_bytes, "uint8", 128)
        self.partial = smem.alloc(max(self.partial_total, 1), "float32", 128)
        self.ss = smem.alloc(s * self.s_stage, "uint8", 128)
        self.full, self.empty = smem.alloc(s, "uint64", 8), smem.alloc(s + 1, "uint64", 8)
        smem.commit()
        with if_(self.thread.tid == 0):
            for i in range(s):
                ptx.mbarrier.init.shared.b64(self.full.ptr_to([i]), u32(1 + SCALE_LANES))
                ptx.mbarrier.init.shared.b64(self.empty.ptr_to([i]), u32(4 * self.c.warpgroups))
            ptx.mbarrier.init.shared.b64(self.empty.ptr_to([s]), u32(4 * self.c.warpgroups))
            ptx.fence.mbarrier_init.release.cluster()
            ptx.fence.proxy.async_.shared__cta()
        cuda.cta_sync()

    def _advance(self) -> None:
        assign(self.stage, self.stage + 1)
        with if_(self.stage == self.stages):
            assign(self.stage, T.int32(0))
            assign(self.phase, self.phase ^ u32(1))

    def _tile(self) -> Tile:
        token_tile = let(self.item // self.row_blocks)
        row_block = let(self.item % self.row_blocks)
        offset = let(cast(token_tile, "int64") * 4)
        expert = load("int32", address(self.a.ws["tile_expert"], offset))
        return Tile(token_tile, row_block, expert, load("int32", address(self.a.ws["tile_rows"], offset)))

    # ---------------------------------------------------------------------------------------------------- producers

    def _produce_operands(self) -> None:
        c, full = self.c, self.full
        weights, tokens = T.address_of(self.weight_map), T.address_of(self.token_map)
        with if_(cuda.elect_sync() != u32(0)):
            ptx.prefetch.tensormap(weights)
            ptx.prefetch.tensormap(tokens)
            with while_(self.item < self.num_items):
                tile = self._tile()
                coordinates = self.p.weight_coordinates(c, tile)
                boxes = scalar("int32", T.int32(c.widths[-1] // c.token_box))
                for width in reversed(c.widths[:-1]):
                    with if_(tile.num_rows <= width):
                        assign(boxes, T.int32(width // c.token_box))
                x_bytes = let(boxes * (2 * c.ks * c.token_box * 128))
                with for_(self.k_steps) as step:
                    cuda.mbarrier_wait(self.empty.ptr_to([self.stage]), self.phase ^ u32(1))
                    bar = full.ptr_to([self.stage])
                    ptx.mbarrier.arrive.expect_tx.shared.b64(bar, cast(x_bytes + self.w_stage, "uint32"))
                    for ks in range(c.ks):
                        destination = self.ws.ptr_to([self.stage * self.w_stage + ks * self.w_block])
                        k_byte = (step * c.ks + ks) * (K_BLOCK // 2)
                        isa.tma_load(len(coordinates) + 1, destination, weights, [k_byte, *coordinates], bar, True)
                    with for_(boxes) as box:
                        for half in range(2 * c.ks):
                            offset = self.stage * self.x_stage + half * (self.x_block // 2) + box * (c.token_box * 128)
                            k, row = step * (K_BLOCK * c.ks) + half * 64, tile.token_tile * c.tile_m + box * c.token_box
                            isa.tma_load(2, self.xs.ptr_to([offset]), tokens, [k, row], bar)
                    self._advance()
                assign(self.item, self.item + NUM_CTAS)

    def _produce_scales(self, lane) -> None:
        c, row_bytes = self.c, cast(self.scale_row_bytes, "int64")
        rows = [let(lane + SCALE_LANES * i) for i in range(-(-c.rows // SCALE_LANES))]
        with while_(self.item < self.num_items):
            tile = self._tile()
            expert = let(self.p.scales + cast(tile.expert, "int64") * (self.p.rows_per_expert * row_bytes))
            offsets = [let(self.p.row(c, tile, row) * self.scale_row_bytes) for row in rows]
            with for_(self.k_steps) as step:
                cuda.mbarrier_wait(self.empty.ptr_to([self.stage]), self.phase ^ u32(1))
                for ks in range(c.ks):
                    k_byte = let((step * c.ks + ks) * c.scale_bytes)
                    left = let(self.scale_row_bytes - k_byte)
                    for row, offset in zip(rows, offsets, strict=True):
                        slot = self.ss.ptr_to([self.stage * self.s_stage + ks * self.s_block + row * c.scale_pitch])
                        with if_(row < c.rows):
                            self._copy_scales(slot, expert + cast(offset + k_byte, "int64"), left)
                ptx["cp.async.mbarrier.arrive.noinc.shared.b64"](self.full.ptr_to([self.stage]))
                self._advance()
            assign(self.item, self.item + NUM_CTAS)

    def _copy_scales(self, slot, source, left) -> None:
        """One row's scales of a K block, ``left`` bytes of them before the row ends; zeros after it."""

        def in_one_piece():
            size = T.Select(left > 0, T.int32(self.c.scale_bytes), T.int32(0))
            isa.copy_async(slot, address(source), self.c.scale_bytes, let(size))

        def aligned_words():  # around bytes that start anywhere; consumers add the skew
            start = let(source)
            skew = let(cast(start & T.int64(3), "int32"))
            for word in range(self.c.scale_words):
                size = T.max(T.min(left + skew - 4 * word, T.int32(4)), T.int32(0))
                offset = cast(T.int32(4 * word) - skew, "int64")
                isa.copy_async(T.ptr_byte_offset(slot, 4 * word, "uint8"), address(start, offset), 4, let(size))

        if_else(self.is_aligned, in_one_piece, aligned_words)

    # ---------------------------------------------------------------------------------------------------- consumers

    def _consume(self) -> None:
        c, thread = self.c, self.thread
        self.warpgroup, self.warp4 = let(thread.warp // 4), let(thread.warp % 4)
        self.group, self.quad = let(thread.lane // 4), let(thread.lane % 4)
        self.acc = [regs(self.acc_count, "float32") for _ in range(c.mi)]
        self.fragments = [[regs(8 * c.words_per_group, "uint32") for _ in range(c.mi)] for _ in range(2)]
        self.words = [[regs(4, "uint32") for _ in range(2)] for _ in range(c.mi)]
        self.descriptor_base = let(isa.shared_descriptor_base(self.xs.ptr_to([0])))
        self.k_sub, self.row_group = let(self.warpgroup % c.ks), let(self.warpgroup // c.ks)
        # [mi][r]: fragment rows of this thread, the same in every tile
        self.rows = [[let(self.p.fragment_row(self, mi, r)) for r in range(2)] for mi in range(c.mi)]
        # Bytes between a row's slot and its first scale. Tiles and experts start at multiples of 4 rows, so only the
        # row's number modulo 4 matters; rows clamped into the tensor may read other bytes, their results are dropped.
        self.skews = [let(T.Select(self.is_aligned, T.int32(0), self._skew(r))) for r in range(2)]
        self.turn = scalar("int32", T.int32(0))
        self.previous = scalar("int32", T.int32(self.stages))
        with while_(self.item < self.num_items):
            tile = self._tile()
            state = self.p.begin_tile(self, tile) if self.is_state_early else None
            self._multiply(tile, c.widths)
            self._release_previous()
            assign(self.previous, T.int32(self.stages))
            self._epilogue(tile, state)
            assign(self.item, self.item + NUM_CTAS)

    def _multiply(self, tile: Tile, widths) -> None:
        """Main loop at the smallest of ``widths`` that holds the tile's rows."""

        def main_loop():
            for acc in self.acc:
                for i in range(widths[0] // 2):
                    store(acc, T.float32(0), i)
            with for_(self.k_steps):
                cuda.mbarrier_wait(self.full.ptr_to([self.stage]), self.phase)
                self._multiply_stage(widths[0])
                self._advance()
            ptx.wgmma.wait_group.sync.aligned(0)

        if len(widths) == 1:
            main_loop()
        else:
            if_else(tile.num_rows <= widths[0], main_loop, lambda: self._multiply(tile, widths[1:]))

    def _skew(self, r: int):
        start = self.p.scales + cast(self.p.row_modulo_4(self, r) * self.scale_row_bytes, "int64")
        return cast(start & T.int64(3), "int32")

    def fragment(self, mi: int):
        """Number of this warpgroup's 64-row fragment in the tile."""
        return self.row_group * self.c.mi + mi

    def _load_scales(self):
        c, is_mx = self.c, self.c.weight_format == WeightFormat.mxfp4
        base = self.stage * self.s_stage + self.k_sub * self.s_block
        raw = []
        for i, row in enumerate(row for pair in self.rows for row in pair):
            offset = base + row * c.scale_pitch + self.skews[i % 2] + self.quad * (1 if is_mx else 2)
            raw.append(load("uint8" if is_mx else "uint16", self.ss.ptr_to([offset]), "shared"))
        return raw

    def _multiply_stage(self, width: int) -> None:
        """One K block: 8 MMA steps; a word of weights feeds two, decoded while the previous pair multiplies."""
        c = self.c
        low = let(
            self.descriptor_base + cast(self.stage * (self.x_stage // 16) + self.k_sub * (self.x_block // 16), "uint32")
        )
        low = let(shuffle(low, T.int32(0)))  # ptxas then keeps descriptors in uniform registers: 4 -> 3 instructions an MMA
        raw = self._load_scales()
        for mi in range(c.mi):
            for r in range(2):
                offset = self.rows[mi][r] * (K_BLOCK // 2) + self.quad * 16
                pointer = self.ws.ptr_to([self.stage * self.w_stage + self.k_sub * self.w_block + offset])
                load_vec4(pointer, "shared", into=self.words[mi][r])
        is_mx = c.weight_format == WeightFormat.mxfp4
        multipliers = isa.Ue8m0Multipliers(raw) if is_mx else isa.E4m3Multipliers(raw)
        per_group = c.words_per_group
        for word in range(0, 4, per_group):
            fragments = self.fragments[word // per_group % 2]
            self._decode(word, fragments, multipliers)
            ptx.wgmma.fence.sync.aligned()
            for step in range(2 * per_group):
                j = word * 2 + step
                offset = (j // 4) * (self.x_block // 2) + (j % 4) * 32
                descriptor = isa.shared_descriptor(low + u32(offset >> 4))
                for mi in range(c.mi):
                    isa.wgmma(width, self.acc[mi], [fragments[mi][step * 4 + i] for i in range(4)], descriptor, True)
            ptx.wgmma.commit_group.sync.aligned()
            ptx.wgmma.wait_group.sync.aligned(1)
            if word == 0:  # everything issued for the previous stage has retired
                self._release_previous()
        assign(self.previous, self.stage)

    def _decode(self, word: int, fragments, multipliers) -> None:
        pairs = [(mi, r) for mi in range(self.c.mi) for r in range(2)]
        words = range(self.c.words_per_group)
        for mi, r in pairs:
            for i in words:
                factor = multipliers.first(2 * mi + r, word + i)
                isa.decode_word(self.words[mi][r][word + i], factor, fragments[mi], 8 * i + r)
        if multipliers.is_large is not None:
            with if_(multipliers.is_large):
                for mi, r in pairs:
                    for i in words:
                        isa.decode_word(self.words[mi][r][word + i], u32(isa.TWO_POW_126), fragments[mi], 8 * i + r)
                        isa.scale_again(fragments[mi], multipliers.second(2 * mi + r), 8 * i + r)

    def _release_previous(self) -> None:
        """This warp is done with the previous stage; before the first one that is a barrier nobody waits for."""
        with if_(self.thread.lane == 0):
            ptx.mbarrier.arrive.shared.b64(self.empty.ptr_to([self.previous]), u32(1))

    # ----------------------------------------------------------------------------------------------------- epilogue

    def _epilogue(self, tile: Tile, state) -> None:
        if self.c.ks == 1:
            self._store_tile(tile, state)
            return
        # Warpgroups that share rows take turns in finishing a tile; the others hand over their sums. Two buffers and
        # one barrier a tile are enough: who passes the barrier of tile i + 1 has read the sums of tile i.
        ks, thread = self.c.ks, self.thread.tid % 128
        base = let((self.row_group * 2 + self.turn % 2) * ((ks - 1) * self.partial_words) + thread)
        finisher = let(self.turn % ks)
        accumulators = [(acc, i) for acc in self.acc for i in range(self.acc_count)]
        with if_(self.k_sub != finisher):
            mine = let(base + ((self.k_sub + (ks - 1) - finisher) % ks) * self.partial_words)
            for index, (acc, i) in enumerate(accumulators):
                ptx["st.shared.f32"](self.partial.ptr_to([mine + index * 128]), acc[i])
        ptx["barrier.sync.aligned"](cast(self.row_group + (1 + self.c.warpgroups), "uint32"), u32(128 * ks))
        with if_(self.k_sub == finisher):
            for other in range(ks - 1):
                for index, (acc, i) in enumerate(accumulators):
                    pointer = self.partial.ptr_to([base + (other * self.partial_words + index * 128)])
                    store(acc, acc[i] + load("float32", pointer, "shared"), i)
            self._store_tile(tile, state)
        assign(self.turn, self.turn + 1)

    def _warpgroup_sync(self) -> None:
        cuda.warpgroup_sync(self.warpgroup + 1)

    def _store_tile(self, tile: Tile, state) -> None:
        """Accumulators -> problem's values -> bf16 rows, ``chunk_m`` tokens at a time."""
        c, p = self.c, self.p
        self.out_base = self.warpgroup * (self.chunk_m * self.pitch)
        if state is None:
            state = p.begin_tile(self, tile)
        num_matrices = min(4, p.matrices * (self.chunk_m // 8))
        per_store = num_matrices // p.matrices  # 8-token blocks
        for first in range(0, c.tile_m, self.chunk_m):
            with if_(tile.num_rows > first):
                self._warpgroup_sync()
                for block in range(0, self.chunk_m // 8, per_store):
                    scales = [self._token_scales(tile, first + (block + i) * 8) for i in range(per_store)]
                    for mi in range(c.mi):
                        self._store_matrices(state, mi, first, block, scales, num_matrices)
                self._warpgroup_sync()
                self._copy_rows(tile, first)

    def _token_scales(self, tile: Tile, token: int):
        """Factors of this thread's two tokens of an 8-token block: per-token scale and the decode's 2^NVFP4_SHIFT."""
        if self.c.weight_format == WeightFormat.mxfp4:
            return None
        scales = regs(2, "float32")
        for i in range(2):
            store(scales, T.float32(2.0**isa.NVFP4_SHIFT), i)
        with if_(self.a.per_token_scale != 0):
            row = cast(tile.token_tile * self.c.tile_m + token + self.quad * 2, "int64")
            for i in range(2):
                value = load("float32", address(self.a.ws["row_scale"], (row + i) * 4))
                store(scales, value * T.float32(2.0**isa.NVFP4_SHIFT), i)
        return scales

    def _store_matrices(self, state, mi: int, first: int, block: int, scales, num_matrices: int) -> None:
        p, pairs = self.p, []
        for m in range(num_matrices):
            column = first // 8 + block + m // p.matrices
            values = [
                p.value(self, state, mi, m % p.matrices, [self.acc[mi][column * 4 + 2 * r + i] for r in range(2)],
                        None if scales[m // p.matrices] is None else scales[m // p.matrices][i])
                for i in range(2)
            ]  # fmt: skip
            pair = scalar("uint32")
            ptx["cvt.rn.bf16x2.f32"](pair, values[1], values[0])
            pairs.append(pair)
        matrix = (self.thread.lane // 8) % num_matrices
        token = (block + matrix // p.matrices) * 8 + self.thread.lane % 8
        column = mi * (32 * p.matrices) + self.warp4 * (8 * p.matrices) + (matrix % p.matrices) * 8
        isa.stmatrix_transposed(self.outs.ptr_to([self.out_base + token * self.pitch + column * 2]), pairs)

    def _copy_rows(self, tile: Tile, first: int) -> None:
        chunks = self.out_columns // 8  # of 16 bytes, a row
        per_pass = 128 // chunks
        index = let(self.thread.tid % 128)
        chunk = let(index % chunks)
        for start in range(0, self.chunk_m, per_pass):
            token = let(start + index // chunks)
            column = self.p.out_column(self, tile) + chunk * 8
            inside = T.And(first + token < tile.num_rows, self.p.is_out_column(column))
            if per_pass > self.chunk_m:
                inside = T.And(inside, token < self.chunk_m)
            with if_(inside):
                words = load_vec4(self.outs.ptr_to([self.out_base + token * self.pitch + chunk * 16]), "shared")
                row = cast(tile.token_tile * self.c.tile_m + first + token, "int64")
                store_vec4(address(self.p.out, (row * self.p.out_width + cast(column, "int64")) * 2), words)
