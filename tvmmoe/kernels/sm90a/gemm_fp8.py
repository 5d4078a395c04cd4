# SPDX-License-Identifier: Apache-2.0
"""Main loop of both grouped GEMMs on fp8 wgmma: mxfp4 weights times mxfp8 tokens, twice the bf16 rate.

Grid, roles and pipeline are those of gemm.py. What differs:

    tokens       e4m3 bytes, one 128-byte row a K block, block exponents folded in (gather_fp8, requantize_fp8)
    weights      e2m1 -> e4m3 in registers, the block exponent relative to the row's largest folded in by a byte table
    accumulators the tensor core sums one or two K blocks into ``part``, which is added to ``acc`` in float32
    fragments    two sets: while a K block multiplies, the next one is decoded
    epilogue     2^(row's largest - 133) on accumulators, then the token's factor, then as in gemm.py
    scale warps  describe a tile before they copy its scales: each row's largest scale byte, each token's factor, and
                 whether the tile is inside the window; double-buffered in shared memory (info_full, info_empty)

Errors. Let a product be w x with w = e2m1 * 2^(b - largest + 6), x = e4m3 * 2^(block - base).
* Weights: exact while the row's scale bytes differ by at most 14, else the tile is not inside the window. A byte 0 whose
  block holds zeros alone (what encoders make of a zero block) is no scale.
* Tokens: folding relative to the token's base (its largest block exponent) is exact for values that stay e4m3 numbers and
  else off by at most 2^-10, half a subnormal step. The window asks of every block that its largest value stays at least
  7/8 (blocks of an encoder: at most 8 octaves below the base), so no block loses more than 2^-9.8 of its own largest value,
  whatever the weights make of the others; of a block of normal values, 2 percent are that small and 2e-4 of its norm is
  lost. Relative to the token's largest value, 2^-17.8 at most.
* Tensor core: an fp8 wgmma aligns its 32 products and the accumulator to the largest of them and drops what lies below
  2^-13 of that. (A model of just this gives the errors that were measured on the H100: 2.17e-3 for 2.16e-3 without
  promotion, 1.72e-3 for 1.72e-3 with one every 512 columns.) Over K = 4096 it is 1.1e-3 without promotion, 1.8e-4 with one
  every 256 columns and 1.2e-4 every 128. That matters little in the output and much in z: an error that moves a z across a
  midpoint of e4m3 costs a sixteenth of it, and 1.1e-3 becomes 1.5e-2 of the operator's result, 1.2e-4 becomes 2e-3. So gemm1
  promotes every 128 columns, gemm2 every 256 (operator_fp8). Measured on the H100, the operator
  is 1e-3 to 4.6e-3 off the reference, 7e-3 in one small call.

Outside of the window a tile multiplies one scale block at a time: lanes of other blocks feed zeros, the tokens are the
bytes as they came (a token outside of the window is not folded), and each block's sum is added with its exact factor
2^(row's byte + token's byte - 254). Right for every pair of bytes, 255 is NaN, and many times slower. The device chooses, a
tile at a time, from nothing but the operands: deterministic, and safe in a graph.
"""

import functools

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm90a import intrinsics as isa
from tvmmoe.kernels.sm90a import intrinsics_fp8 as fp8
from tvmmoe.kernels.sm90a.gemm import GroupedGemm
from tvmmoe.kernels.sm90a.gemm_config import GemmConfig
from tvmmoe.kernels.sm90a.layout import K_BLOCK
from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import (
    I,
    address,
    assign,
    cast,
    cuda,
    for_,
    if_,
    if_else,
    let,
    load,
    load_vec4,
    ptx,
    regs,
    scalar,
    store,
    u32,
    while_,
)  # fmt: skip

INFO_BUFFERS = 2
EXACT_TOKENS = 64  # that are multiplied at once outside of the window: few registers


class Fp8Gemm(GroupedGemm):
    """Emits one kernel; ``problem`` as for :class:`GroupedGemm`."""

    token_dtype, token_bytes = "uint8", 1

    def __init__(self, a, config: GemmConfig, problem, promoted_blocks: int):
        assert (config.tile_m, config.ks, config.warpgroups, config.k_blocks, config.cluster) == (128, 1, 2, 2, 2), config
        assert config.weight_format == WeightFormat.mxfp4, config
        super().__init__(a, config, problem)
        self.promoted_blocks = promoted_blocks  # K blocks that the tensor core sums: 1 or 2
        self.registers = 56, 224  # 384 * 168 in all: scale warps look at whole rows and take what the sums leave

    def reserved_bytes(self) -> int:
        c = self.c
        info = INFO_BUFFERS * 4 * (c.rows + c.tile_m + 4)
        return fp8.TABLE_BYTES + info + c.warpgroups * c.tile_m * 4 + 5 * 128  # the last for small ones and alignment

    def _allocate_more(self, smem) -> None:
        c = self.c
        self.table = smem.alloc(fp8.TABLE_BYTES, "uint8", 128)
        self.largest = smem.alloc(INFO_BUFFERS * c.rows, "int32", 128)  # scale byte of each row
        self.token_scale = smem.alloc(INFO_BUFFERS * c.tile_m, "float32", 128)
        self.block_bytes = smem.alloc(c.warpgroups * c.tile_m, "uint32", 128)  # tokens' scales of a K block
        self.outside = smem.alloc(INFO_BUFFERS * 4, "int32", 16)  # by scale warp: its part is outside of the window
        self.sign_test = smem.alloc(1, "uint32", 8)
        self.info_full, self.info_empty = (smem.alloc(INFO_BUFFERS, "uint64", 8) for _ in range(2))

    def _initialize(self) -> None:
        with if_(self.thread.tid == 0):
            I.buffer_store(self.sign_test, u32(fp8.SIGN_TEST), [0])
            for i in range(INFO_BUFFERS):
                ptx.mbarrier.init.shared.b64(self.info_full.ptr_to([i]), u32(self.scale_lanes))
                ptx.mbarrier.init.shared.b64(self.info_empty.ptr_to([i]), u32(128 * self.c.warpgroups))
        with if_(self.thread.tid < fp8.TABLE_ENTRIES):
            fp8.write_table_entry(self.table, self.thread.tid)
        self.turn = scalar("int32", T.int32(0))  # tiles that this thread has seen

    def _info(self):
        """(buffer of this tile, parity of its use)."""
        return let(self.turn % INFO_BUFFERS), let(cast(self.turn // INFO_BUFFERS, "uint32") & u32(1))

    # ---------------------------------------------------------------------------------------------------- scale warps

    def _describe(self, tile: Tile, lane, rows, expert, offsets) -> None:
        buffer, parity = self._info()
        cuda.mbarrier_wait(self.info_empty.ptr_to([buffer]), parity ^ u32(1))
        outside = scalar("int32", T.int32(0))
        self._describe_tokens(tile, lane, buffer, outside)
        starts = [let(expert + cast(offset, "int64")) for offset in offsets]
        for row, start in self._of_tile(rows, starts):
            self._describe_row(tile, row, start, buffer, outside)
        is_outside = let(T.cuda.any_sync(u32(0xFFFFFFFF), outside != 0), "int32")
        with if_(lane % 32 == 0):
            I.buffer_store(self.outside, T.Select(is_outside != 0, T.int32(1), T.int32(0)), [buffer * 4 + lane // 32])
        ptx.mbarrier.arrive.shared.b64(self.info_full.ptr_to([buffer]), u32(1))
        assign(self.turn, self.turn + 1)

    def _describe_tokens(self, tile: Tile, lane, buffer, outside) -> None:
        """Factors of the tile's tokens; 0 says that the token is outside of the window."""
        c = self.c
        for first in range(0, c.tile_m, self.scale_lanes):
            token = let(lane + first)
            factor = scalar("float32", T.float32(1))
            with if_(token < tile.num_rows):
                row = cast(tile.token_tile * c.tile_m + token, "int64")
                assign(factor, load("float32", address(self.a.ws["row_scale"], row * 4)))
                with if_(factor == T.float32(0)):
                    assign(outside, T.int32(1))
            with if_(token < c.tile_m):
                I.buffer_store(self.token_scale, factor, [buffer * c.tile_m + token])

    def _describe_row(self, tile: Tile, row, start, buffer, outside) -> None:
        """This lane's row: its largest scale byte, and whether the smallest is too far from it."""
        top, bottom = fp8.byte_extremes(start, self.scale_row_bytes)
        with if_(bottom == 0):
            assign(bottom, self._smallest_scale(tile, row, start))
            with if_(T.And(top == 0, bottom == 255)):  # a row of zeros
                assign(top, T.int32(127))
        with if_(T.Or(top - bottom > fp8.MAX_SPREAD, T.Or(top < fp8.MIN_BASE, top > fp8.MAX_BASE))):
            assign(outside, T.int32(1))
        I.buffer_store(self.largest, top, [buffer * self.c.rows + row])

    def _smallest_scale(self, tile: Tile, row, start):
        """Smallest scale byte of a row; a byte 0 is one only if its block holds other codes than zeros."""
        number = let(cast(tile.expert, "int64") * self.p.rows_per_expert + cast(self.p.row(self.c, tile, row), "int64"))
        weights = let(self.p.weights + number * (self.p.k // 2))
        smallest = scalar("int32", T.int32(255))
        with for_(self.scale_row_bytes) as block:
            byte = let(cast(load("uint8", address(start, cast(block, "int64"))), "int32"))
            with if_(byte == 0):
                words = load_vec4(address(weights, cast(block, "int64") * 16))
                codes = (words[0] | words[1] | words[2] | words[3]) & u32(0x77777777)
                assign(byte, T.Select(codes == u32(0), T.int32(255), T.int32(0)))
            assign(smallest, T.min(smallest, byte))
        return smallest

    # ------------------------------------------------------------------------------------------------------ consumers

    def _consume(self) -> None:
        self._begin_role()
        c, thread = self.c, self.thread
        self.warpgroup, self.warp4 = let(thread.warp // 4), let(thread.warp % 4)
        self.group, self.quad = let(thread.lane // 4), let(thread.lane % 4)
        self.row_group, self.k_sub = self.warpgroup, T.int32(0)
        self.acc, self.part = ([regs(self.acc_count, "float32") for _ in range(c.mi)] for _ in range(2))
        # [K block's parity][word][mi]
        self.fragments = [[[regs(4, "uint32") for _ in range(c.mi)] for _ in range(4)] for _ in range(2)]
        self.words = [[regs(4, "uint32") for _ in range(2)] for _ in range(c.mi)]
        self.descriptor_base = let(isa.shared_descriptor_base(self.xs.ptr_to([0])))
        self._place_rows()
        # From memory it stays in a register; of a constant ptxas makes a new copy for every use.
        self.sign_test_word = load("uint32", self.sign_test.ptr_to([0]), "shared")
        self.scheduler.follow()
        with while_(self.scheduler.is_left):
            tile = self.scheduler.tile
            self.buffer, parity = self._info()
            cuda.mbarrier_wait(self.info_full.ptr_to([self.buffer]), parity)
            flags = [let(self.outside[self.buffer * 4 + warp]) for warp in range(self.scale_lanes // 32)]
            self.is_outside = let(flags[0] | flags[1] | flags[2]) != 0
            for sums in (*self.acc, *self.part):
                for i in range(self.acc_count):
                    store(sums, T.float32(0), i)
            ways = self._multiply_exactly, self._multiply_folded
            if_else(self.is_outside, *(functools.partial(way, tile) for way in ways))
            self._store_tile(tile, None)
            ptx.mbarrier.arrive.shared.b64(self.info_empty.ptr_to([self.buffer]), u32(1))
            assign(self.turn, self.turn + 1)
            self.scheduler.advance()

    def _load_words_of(self, block) -> None:
        self._load_words(let(cast(self.stage * self.w_stage + block * self.w_block, "uint32")))

    def _scale_byte(self, block, row: int, quad):
        """Of scale block ``quad`` of a K block, for the thread's fragment row number ``row``."""
        offset = self.stage * self.s_stage + block * self.c.scale_bytes + (quad - self.quad)
        return load("uint8", let(self.scale_places[row] + cast(offset, "uint32")), "shared")

    # Inside of the window.

    def _multiply_folded(self, tile: Tile) -> None:
        largest = [let(self.largest[self.buffer * self.c.rows + row]) for pair in self.rows for row in pair]
        self.table_offsets = [let((T.int32(fp8.TABLE_ENTRIES - 1) - byte) * 8) for byte in largest]
        self._by_width(tile, self.c.widths, self._multiply_stages)
        for mi in range(self.c.mi):
            for r in range(2):
                # From the offset again, so that the bytes need no registers in the main loop.
                byte = T.int32(fp8.TABLE_ENTRIES - 1) - self.table_offsets[2 * mi + r] // 8
                factor = let(fp8.power_of_two(byte - fp8.TOP_EXPONENT))
                for i in (4 * n + 2 * r + t for n in range(self.c.tile_m // 8) for t in range(2)):
                    store(self.acc[mi], self.acc[mi][i] * factor, i)

    def _multiply_stages(self, width: int) -> None:
        """Main loop."""
        cuda.mbarrier_wait(self.full.ptr_to([self.stage]), self.phase)
        self._decode_block(0)
        with for_(self.k_steps - 1):
            self._multiply_stage(width, is_last=False)
        self._multiply_stage(width, is_last=True)

    def _multiply_stage(self, width: int, is_last: bool) -> None:
        """The K blocks of a stage, the first of them decoded. While one multiplies the next is decoded; while the last one
        does, the first of the next stage, which must be there before this one is released. A block's four steps are one
        wgmma group: ptxas serialises what is cut finer."""
        c, stage, tokens = self.c, let(self.stage), self._stage_descriptor(self.x_block)
        for block in range(c.k_blocks):
            self._issue_block(width, block, tokens + T.uint64(block * self.x_block // 16))
            if block + 1 < c.k_blocks:
                self._decode_block(block + 1)
            else:
                self._advance()
                if not is_last:
                    cuda.mbarrier_wait(self.full.ptr_to([self.stage]), self.phase)
                    self._decode_block(0)
            ptx.wgmma.wait_group.sync.aligned(0)
            if (block + 1) % self.promoted_blocks == 0:
                self._promote(width)
        self._release(stage)

    def _issue_block(self, width: int, block: int, tokens) -> None:
        """Begin to multiply a decoded K block; ``tokens`` is the descriptor of its first ones."""
        ptx.wgmma.fence.sync.aligned()
        for word, fragments in enumerate(self.fragments[block % 2]):
            is_sum = block % self.promoted_blocks + word > 0
            for mi in range(self.c.mi):
                fp8.wgmma(width, self.part[mi], fragments[mi], tokens + T.uint64(word * 32 // 16), is_sum)
        ptx.wgmma.commit_group.sync.aligned()

    def _decode_block(self, block: int) -> None:
        """A K block's weights into the fragments of its parity."""
        self._load_words_of(block)
        tables = [self._table_entry(block, row) for row in range(2 * self.c.mi)]
        for word, fragments in enumerate(self.fragments[block % 2]):
            for mi in range(self.c.mi):
                for r in range(2):
                    fp8.decode_word(self.words[mi][r][word], tables[2 * mi + r], fragments[mi], r, self.sign_test_word)

    def _promote(self, width: int) -> None:
        """The zeros cost nothing; without them ptxas serialises every wgmma (C7511), though the next one overwrites."""
        for acc, part in zip(self.acc, self.part, strict=True):
            for i in range(width // 2):
                store(acc, acc[i] + part[i], i)
                store(part, T.float32(0), i)

    def _table_entry(self, block: int, row: int):
        """Magnitudes at the scale of this thread's scale block of a fragment row."""
        entry = regs(2, "uint32")
        place = self.table_offsets[row] + cast(self._scale_byte(block, row, self.quad), "int32") * 8
        ptx["ld.shared.v2.b32"](entry[0], entry[1], self.table.ptr_to([place]))
        return entry

    # Outside of it.

    def _multiply_exactly(self, tile: Tile) -> None:
        c = self.c
        last_block = let(cast(self.p.padded_k // K_BLOCK, "int32") - 1)
        with for_(self.k_steps) as step:
            cuda.mbarrier_wait(self.full.ptr_to([self.stage]), self.phase)
            descriptor = self._stage_descriptor(self.x_block)
            with for_(c.k_blocks) as block:
                self._fetch_token_scales(tile, let(T.min(step * c.k_blocks + block, last_block)))
                self._load_words_of(block)
                with for_(4) as quad:
                    self._multiply_scale_block(block, quad, descriptor)
            self._release(self.stage)
            self._advance()

    def _fetch_token_scales(self, tile: Tile, block) -> None:
        """Four scale bytes of each of the tile's tokens."""
        c = self.c
        row_bytes = self.p.padded_k // 32
        self._warpgroup_sync()
        token = let(self.thread.tid % 128)  # a thread each
        row = cast(tile.token_tile * c.tile_m + token, "int64")
        word = load("uint32", address(self.a.ws[self.p.operand_scales], row * row_bytes + cast(block * 4, "int64")))
        I.buffer_store(self.block_bytes, word, [self.warpgroup * c.tile_m + token])
        self._warpgroup_sync()

    def _multiply_scale_block(self, block, quad, stage_descriptor) -> None:
        c = self.c
        mine = let(T.Select(self.quad == quad, u32(0xFFFFFFFF), u32(0)))
        rows = [fp8.half_powers(self._scale_byte(block, row, quad)) for row in range(2 * c.mi)]
        shift = let(cast(quad, "uint32") * u32(8))
        for first in range(0, c.tile_m, EXACT_TOKENS):
            for word in range(4):
                fragments = self.fragments[0][0]
                for mi in range(c.mi):
                    for r in range(2):
                        masked = let(self.words[mi][r][word] & mine)  # nibbles 0 are zeros
                        fp8.decode_word(masked, [u32(half) for half in fp8.UNIT_TABLE], fragments[mi], r, self.sign_test_word)
                ptx.wgmma.fence.sync.aligned()
                offset = cast(block, "uint64") * T.uint64(self.x_block // 16) + T.uint64((first * 128 + word * 32) // 16)
                descriptor = stage_descriptor + offset
                for mi in range(c.mi):
                    fp8.wgmma(EXACT_TOKENS, self.part[mi], fragments[mi], descriptor, word > 0)
                ptx.wgmma.commit_group.sync.aligned()
                ptx.wgmma.wait_group.sync.aligned(0)
            for n in range(EXACT_TOKENS // 8):
                self._add_scaled(n, first, rows, shift)

    def _add_scaled(self, n: int, first: int, rows, shift) -> None:
        """Eight tokens of ``part`` times their factors onto ``acc``."""
        c = self.c
        for t in range(2):
            token = self.warpgroup * c.tile_m + (first + n * 8 + t) + self.quad * 2
            early, late = fp8.half_powers(let((self.block_bytes[token] >> shift) & u32(0xFF)))
            for mi in range(c.mi):
                for r in range(2):
                    i = 4 * n + 2 * r + t
                    row_early, row_late = rows[2 * mi + r]
                    # In this order nothing between is larger or smaller than both ends.
                    product = self.part[mi][i] * row_early * early * row_late * late
                    store(self.acc[mi], self.acc[mi][first // 2 + i] + product, first // 2 + i)
                    store(self.part[mi], T.float32(0), i)

    # ------------------------------------------------------------------------------------------------------- epilogue

    def _token_scales(self, tile: Tile, token: int):
        """Factors of this thread's two tokens of an 8-token block; outside of the window they are in the sums."""
        scales = regs(2, "float32")
        for i in range(2):
            factor = self.token_scale[self.buffer * self.c.tile_m + token + self.quad * 2 + i]
            store(scales, T.Select(self.is_outside, T.float32(1), let(factor)), i)
        return [scales[0], scales[1]]
