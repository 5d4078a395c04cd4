# SPDX-License-Identifier: Apache-2.0
"""Main loop of a grouped GEMM's consumers: words of weights -> bf16 fragments -> tensor core.

    wgmma       a warpgroup multiplies; tokens are read from shared memory once for its four warps
    mma.sync    8 columns: every warp reads the tokens itself (ldmatrix), but waits for no other one, needs no descriptors and
                decodes while it multiplies. Of a K block's 190 issue slots wgmma's were 24, and a fifth of the time was
                spent waiting for the slowest of the four warps (ncu, H200).

Both take the same fragments: 16 rows a warp, K in the order of layout.py.
"""

import functools

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm80.intrinsics import load_matrices, mma
from tvmmoe.kernels.sm90a import intrinsics as isa
from tvmmoe.kernels.sm90a.layout import K_BLOCK
from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import (
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
    shuffle,
    store,
    u32,
    while_,
)  # fmt: skip


class Multiply:
    """The part of :class:`tvmmoe.kernels.sm90a.gemm.GroupedGemm` that goes from tile to tile, up to the epilogue."""

    def _allot_operands(self) -> None:
        """Registers and addresses of the operands."""
        c = self.c
        if c.multiplies_by_warp:
            self._place_tokens()
            return
        self.previous = scalar("int32", T.int32(self.stages))
        self.words = [[regs(4, "uint32") for _ in range(2)] for _ in range(c.mi)]
        self.fragments = [[regs(8 * c.words_per_group, "uint32") for _ in range(c.mi)] for _ in range(1 + c.is_overlapped)]
        self.descriptor_base = let(isa.shared_descriptor_base(self.xs.ptr_to([0])))

    def _multiply_tiles(self) -> None:
        with while_(self.scheduler.is_left):
            if self.may_lack_rows:
                has_rows = self.p.is_out_column(self.p.out_column(self, self.scheduler.tile))
                if_else(has_rows, self._compute_tile, self._pass_over_tile)
            else:
                self._compute_tile()
            self.scheduler.advance()

    @property
    def may_lack_rows(self) -> bool:
        """Whether a warpgroup may have no rows in the last row block and then leaves the SM to the others.

        In gemm2: of 2880 rows the last block of 256 has one warpgroup's. gemm1's last columns are spread over all four. Not
        asked where warpgroups split K, and no gain at 256 columns (clusters), at the power limit.
        """
        return self.p.number == 1 and self.c.ks == self.c.cluster == 1

    def _compute_tile(self) -> None:
        c, tile = self.c, self.scheduler.tile
        state = self.p.begin_tile(self, tile, self._early_expert(tile)) if c.loads_state_early else None
        self._multiply(tile)
        self._release_last()
        if c.reads_tile_again:
            self.scheduler.read_again()
        self._epilogue(tile, state)

    def _pass_over_tile(self) -> None:
        """Release the tile's stages as they come."""
        with for_(self.k_steps):
            cuda.mbarrier_wait(self.full.ptr_to([self.stage]), self.phase)
            cuda.warp_sync()  # before one lane tells that all have seen it
            self._release(self.stage)
            self._advance()

    def _by_width(self, tile: Tile, widths, emit) -> None:
        """``emit(width)`` of the smallest of ``widths`` that holds the tile's rows."""
        width, *wider = widths
        if wider:
            if_else(tile.num_rows <= width, lambda: emit(width), lambda: self._by_width(tile, wider, emit))
        else:
            emit(width)

    def _multiply(self, tile: Tile) -> None:
        """Main loop."""

        def main_loop(width: int) -> None:
            for acc in self.acc:
                for i in range(width // 2):
                    store(acc, T.float32(0), i)
            if self.c.multiplies_by_warp:
                self._multiply_stages_by_warp(self._multiply_stage_by_warp)
                return
            with for_(self.k_steps):
                cuda.mbarrier_wait(self.full.ptr_to([self.stage]), self.phase)
                self._multiply_stage(width)
                self._advance()
            ptx.wgmma.wait_group.sync.aligned(0)

        self._by_width(tile, self.c.widths, main_loop)

    def _load_words(self, offset) -> None:
        """Weights of a K block of this thread's rows, ``offset`` bytes past those of the first in the first stage."""
        first = let(self.word_place + offset)
        for offsets, words in zip(self._row_offsets(), self.words, strict=True):
            for rows, into in zip(offsets, words, strict=True):
                load_vec4(first + u32(rows * (K_BLOCK // 2)), "shared", into=into)

    def _load_scales(self, offset) -> list:
        """Scales of this thread's rows, by the same rule."""
        dtype = "uint8" if self.c.weight_format == WeightFormat.mxfp4 else "uint16"
        return [load(dtype, place + offset, "shared") for place in self.scale_places]

    def _multiply_stage(self, width: int) -> None:
        """This warpgroup's K blocks of a stage."""
        c, x_block = self.c, 2 * self._x_piece(width)
        descriptor = self._stage_descriptor(x_block)
        words = let(cast(self.stage, "uint32") * u32(self.w_stage))
        scales = let(cast(self.stage, "uint32") * u32(self.s_stage))
        for block in range(self.per_warpgroup):
            self._load_words(let(words + u32(block * self.w_block)))
            raw = self._load_scales(let(scales + u32(block * c.scale_bytes)))
            self._multiply_block(width, block, raw, descriptor + T.uint64(block * (x_block // 16)))
        assign(self.previous, self.stage)

    def _stage_descriptor(self, x_block: int):
        """Of this warpgroup's first tokens of the stage, which has so many bytes of them a K block.

        Adding to all its 64 bits takes one instruction, making another one of the sum of low words three.
        """
        offset = self.stage * (self.x_stage // 16) + self.k_sub * (self.per_warpgroup * x_block // 16)
        # The same in every lane: after the shuffle ptxas keeps descriptors in uniform registers.
        low = let(shuffle(let(self.descriptor_base + cast(offset, "uint32")), T.int32(0)))
        return let(isa.shared_descriptor(low))

    def _multiply_block(self, width: int, block: int, raw, descriptor) -> None:
        """One K block: 8 MMA steps; a word of weights feeds two, decoded while the previous pair multiplies."""
        c = self.c
        is_mx = c.weight_format == WeightFormat.mxfp4
        multipliers = isa.Ue8m0Multipliers(raw) if is_mx else isa.E4m3Multipliers(raw)
        is_large = isa.any_large(raw) if is_mx else None
        per_group = c.words_per_group
        for word in range(0, 4, per_group):
            fragments = self.fragments[word // per_group % len(self.fragments)]
            self._decode(word, fragments, multipliers, is_large)
            ptx.wgmma.fence.sync.aligned()
            for step in range(2 * per_group):
                j = word * 2 + step
                offset = (j // 4) * self._x_piece(width) + (j % 4) * 32
                tokens = descriptor + T.uint64(offset >> 4)
                for mi in range(c.mi):
                    isa.wgmma(width, self.acc[mi], [fragments[mi][step * 4 + i] for i in range(4)], tokens, True)
            ptx.wgmma.commit_group.sync.aligned()
            ptx.wgmma.wait_group.sync.aligned(len(self.fragments) - 1)
            if block == word == 0:  # everything issued for the previous stage has retired
                self._release_previous()

    def _decode(self, word: int, fragments, multipliers, is_large) -> None:
        pairs = [(mi, r) for mi in range(self.c.mi) for r in range(2)]
        words = range(self.c.words_per_group)
        for mi, r in pairs:
            for i in words:
                factor = multipliers.first(2 * mi + r, word + i)
                isa.decode_word(self.words[mi][r][word + i], factor, fragments[mi], 8 * i + r, self.factors)
        if is_large is not None:
            with if_(is_large):
                for mi, r in pairs:
                    for i in words:
                        isa.decode_word(
                            self.words[mi][r][word + i], u32(isa.TWO_POW_126), fragments[mi], 8 * i + r, self.factors)
                        isa.scale_again(fragments[mi], multipliers.second(2 * mi + r), 8 * i + r)

    def _release_previous(self) -> None:
        """This warp is done with the previous stage; before the first one that is a barrier nobody waits for."""
        self._release(self.previous)

    def _release_last(self) -> None:
        """The tile's last stage, whose results are there; mma.sync has released it."""
        if not self.c.multiplies_by_warp:
            self._release_previous()
            assign(self.previous, T.int32(self.stages))

    # ----------------------------------------------------------------------------------------------------- mma.sync

    def _place_tokens(self) -> None:
        """Addresses of ldmatrix in the first stage, of the K block's even words and its odd ones.

        Lane 8 m + r gives that of matrix m, row r: piece m of token r, 16 bytes of K, which the 128-byte swizzle has put at
        piece m ^ r. Odd words have the pieces from 4 on, at (4 + m) ^ r.
        """
        lane = self.thread.lane
        start = self.k_sub * (self.per_warpgroup * self.x_block) + lane % 8 * 128 + (lane // 8 ^ lane % 8) * 16
        even = self._kept(cuda.cvta_generic_to_shared(self.xs.ptr_to([start])))
        self.token_places = even, self._kept(even ^ u32(64))

    def _multiply_stages_by_warp(self, multiply_stage) -> None:
        """All stages of a tile, by ``multiply_stage(blocks)`` each. Of the last one a K block past the end of K is left out:
        of 2880 columns 1 of 24, 2 % of the operator. By another loop: a branch in this one takes 0.7 % where every K block is
        there; with wgmma it did not pay.
        """
        blocks = range(self.per_warpgroup)

        def multiply(num_stages, blocks) -> None:
            with for_(num_stages):
                cuda.mbarrier_wait(self.full.ptr_to([self.stage]), self.phase)
                multiply_stage(blocks)
                self._advance()

        if len(blocks) == 1:
            multiply(self.k_steps, blocks)
            return
        num_blocks = (cast(self.p.k, "int32") + (K_BLOCK - 1)) // K_BLOCK
        # Past this warpgroup's last one of a stage.
        past_last = self.k_sub * self.first_block + (1 + (self.per_warpgroup - 1) * self.block_step)
        full_stages = let((num_blocks + self.c.k_blocks - past_last) // self.c.k_blocks)
        multiply(full_stages, blocks)
        multiply(self.k_steps - full_stages, blocks[:-1])

    def _multiply_stage_by_warp(self, blocks) -> None:
        """This warp's K ``blocks`` of a stage, which is then free."""
        c, stage = self.c, cast(self.stage, "uint32")
        words, scales = let(self.word_place + stage * u32(self.w_stage)), let(stage * u32(self.s_stage))
        tokens = [let(place + stage * u32(self.x_stage)) for place in self.token_places]
        rows = [row * (K_BLOCK // 2) for pair in self._row_offsets() for row in pair]
        raw = [self._load_scales(scales + u32(block * c.scale_bytes)) for block in blocks]
        weights = [[load_vec4(words + u32(block * self.w_block + row), "shared") for row in rows] for block in blocks]
        for block in blocks:
            columns = self._load_columns([place + u32(block * self.x_block) for place in tokens])
            self._multiply_block_by_warp(weights[block], columns, raw[block])
        cuda.warp_sync()
        self._release(self.stage)

    def _multiply_block_by_warp(self, weights, columns, raw) -> None:
        """One K block, of mxfp4 in one of two ways: with large scale bytes, or without."""
        if self.c.weight_format == WeightFormat.nvfp4:
            self._multiply_words(weights, columns, isa.E4m3Multipliers(raw), False)
            return
        multipliers = isa.Ue8m0Multipliers(raw)
        multiply = functools.partial(self._multiply_words, weights, columns, multipliers)
        if_else(isa.any_large(raw), lambda: multiply(True), lambda: multiply(False))

    def _load_columns(self, places):
        """[word]: the b operands of its two MMA steps in a K block."""
        return [load_matrices(places[word % 2] + u32(word // 2 * (self.x_block // 2))) for word in range(4)]

    def _multiply_words(self, weights, columns, multipliers, is_large: bool) -> None:
        """One K block: 8 MMA steps."""
        for word in range(4):
            for mi in range(self.c.mi):
                fragment = regs(8, "uint32")
                for r in range(2):
                    row = 2 * mi + r
                    factor = u32(isa.TWO_POW_126) if is_large else multipliers.first(row, word)
                    isa.decode_word(weights[row][word], factor, fragment, r, self.factors)
                    if is_large:
                        isa.scale_again(fragment, multipliers.second(row), r)
                for step in range(2):
                    a = [fragment[4 * step + i] for i in range(4)]
                    mma(self.acc[mi], 0, a, [columns[word][2 * step + i] for i in range(2)])
