# SPDX-License-Identifier: Apache-2.0
"""Grouped GEMMs of 8 columns that multiply thin tiles, of one or two rows, by_scale_block.py's way: of 16 tokens of
Qwen3-235B-A22B 87 % of the tiles that experts have, of gpt-oss-120b 96 %.

Which tile is thin the TMA warp finds out (thin_rows.py), which then loads columns instead of rows, and announces it with the
tile. gemm2 knows its first tile early, but that only after gemm1: so its TMA warp expects a stage's tokens apart from its
weights.
"""

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm90a.by_scale_block import ByScaleBlock, constant_bytes, sum_of_quad
from tvmmoe.kernels.sm90a.gemm import GroupedGemm
from tvmmoe.kernels.sm90a.gemm_config import GemmConfig
from tvmmoe.kernels.sm90a.layout import COLUMNS_BYTES, K_BLOCK, MAX_ARRANGED_PAIRS, THIN_ROWS, THIN_TILE_M
from tvmmoe.kernels.sm90a.thin_rows import BEFORE_SCALE, FIRST_ROW, columns_address, is_outside, mark, to_columns
from tvmmoe.kernels.sm90a.tile_scheduler import Tile, TileScheduler
from tvmmoe.kernels.sm90a.trace import (
    PAST_L1,
    Smem,
    address,
    assign,
    cast,
    if_,
    if_else,
    let,
    load,
    ptx,
    scalar,
    store,
    store_vec4,
    tensor_map,
)  # fmt: skip

COUNT_BITS = 8  # of a tile's rows in the ring


class ThinScheduler(TileScheduler):
    """Tiles, and which of them are thin."""

    def begin(self, row_blocks, is_list_fresh: bool) -> None:
        super().begin(row_blocks, is_list_fresh)
        self.may_be_thin = let(cast(self.a.num_tokens * self.a.top_k <= MAX_ARRANGED_PAIRS, "int32"))
        self.knows_rows = is_list_fresh  # while tracing: whether the kernel that stored them has ended

    def _begin_role(self) -> None:
        super()._begin_role()
        self.is_thin = scalar("int32", T.int32(0))

    def _read_list(self, space: str) -> None:
        super()._read_list(space)
        if self.knows_rows:
            self._look_at_rows()

    def _look_at_rows(self) -> None:
        outside = self.a.ws["x_outside" if self.number == 0 else "z_outside"]
        place = address(outside, cast(self.tile.token_tile, "int64") * (4 * THIN_ROWS))
        marks = load("uint64", place, PAST_L1)  # of both rows
        rows = self.tile.num_rows
        has_outside = T.Select(rows == THIN_ROWS, marks, marks & T.uint64(0xFFFFFFFF)) != T.uint64(0)
        is_thin = T.And(rows <= THIN_ROWS, T.Not(has_outside))
        assign(self.is_thin, T.Select(is_thin, self.may_be_thin, T.int32(0)))

    def announce(self, is_issuer, space: str = "global") -> None:
        if self.knows_rows:
            super().announce(is_issuer, space)
        else:  # the rest is for announce_first
            self._look_up(space)

    def announce_first(self, is_issuer) -> None:
        self.knows_rows = True
        with if_(self.is_left):
            self._look_at_rows()
        self._tell(is_issuer)

    def _place(self):
        words, ring, barrier = super()._place()
        words[-1] = let(words[-1] | cast(self.is_thin << COUNT_BITS, "uint32"))
        return words, ring, barrier

    def read_again(self) -> None:
        super().read_again()
        assign(self.is_thin, self.tile.num_rows >> COUNT_BITS)
        assign(self.tile.num_rows, self.tile.num_rows & ((1 << COUNT_BITS) - 1))


class ThinTiles(ByScaleBlock, GroupedGemm):
    """Emits one kernel, as :class:`GroupedGemm` does."""

    def __init__(self, a, config: GemmConfig, problem):
        assert has_thin_tiles(config), config
        super().__init__(a, config, problem)
        self.operand_arrivals = 2 if problem.knows_tiles else 1

    def _scheduler(self) -> ThinScheduler:
        return ThinScheduler(self.a, self.c, self.p.number)

    def reserved_bytes(self) -> int:
        return constant_bytes(self.c.weight_format)

    def _allocate_more(self, smem: Smem) -> None:
        super()._allocate_more(smem)
        self._allocate_constants(smem)

    def _initialize(self) -> None:
        super()._initialize()
        self._write_constants()

    # ---------------------------------------------------------------------------------------------------- producers

    def _token_maps(self, p) -> tuple:
        """Of rows, and of columns."""
        row = 2 * p.padded_k
        dims = [T.int64(COLUMNS_BYTES // 2), p.padded_k // K_BLOCK, self.a.max_tiles]
        strides, box = [T.int64(COLUMNS_BYTES), THIN_TILE_M * row], [COLUMNS_BYTES // 2, self.c.k_blocks, 1]
        columns = tensor_map(address(p.operand, FIRST_ROW * row), dims, strides, box, self.token_dtype, 0)
        return (*super()._token_maps(p), columns)

    def _token_map(self, x_bytes):
        return T.address_of(self.token_maps[0])

    def _token_bytes(self, tile: Tile):
        return let(T.Select(self.scheduler.is_thin != 0, T.int32(self.c.k_blocks * COLUMNS_BYTES), T.int32(self.x_stage)))

    def _load_weights(self, stage, step, coordinates, x_bytes) -> None:
        super()._load_weights(stage, step, coordinates, T.int32(0) if self.p.knows_tiles else x_bytes)

    def _load_tokens(self, tile: Tile, step, x_bytes, token_map) -> None:
        if self.p.knows_tiles:
            ptx.mbarrier.arrive.expect_tx.shared.b64(self.full.ptr_to([self.stage]), cast(x_bytes, "uint32"))

        def load_columns() -> None:
            self._load_box(T.address_of(self.token_maps[1]), 0, [0, step * self.c.k_blocks, tile.token_tile])

        load_rows = super()._load_tokens
        if_else(self.scheduler.is_thin != 0, load_columns, lambda: load_rows(tile, step, x_bytes, token_map))

    # ---------------------------------------------------------------------------------------------------- consumers

    def _allot_operands(self) -> None:
        super()._allot_operands()
        self._place_columns()

    def _multiply(self, tile: Tile) -> None:
        multiply_rows = super()._multiply
        if_else(self.scheduler.is_thin != 0, self._multiply_columns, lambda: multiply_rows(tile))

    def _multiply_columns(self) -> None:
        """The main loop of a thin tile; its sums then are where those of its rows are otherwise, and in the lanes beside."""
        (sums,) = self.acc
        for i in range(4):
            store(sums, T.float32(0), i)
        self._multiply_stages_by_warp(self._multiply_stage_by_scale_block)
        for i in range(4):
            store(sums, sum_of_quad(sums[i]), i)

    def _add(self, sums, factors) -> None:
        (acc,) = self.acc
        for r, factor in enumerate(factors):
            for i in (2 * r, 2 * r + 1):
                total = let(sums[i] * T.float32(BEFORE_SCALE))
                store(acc, acc[i] + total * factor, i)

    def _copy_rows(self, tile: Tile, first: int) -> None:
        super()._copy_rows(tile, first)
        if self.p.number == 0:
            with if_(T.And(tile.num_rows <= THIN_ROWS, self.scheduler.may_be_thin != 0)):
                self._copy_columns(tile)

    def _copy_columns(self, tile: Tile) -> None:
        """The same results as columns of gemm2."""
        num_words = self.out_columns // 32  # of a K block
        index = let(self.thread.tid % 128 ^ 96)  # by another warp than rows, at the same time
        row, word, lane = let(index // (4 * num_words)), let(index // 4 % num_words), let(index % 4)
        column = let(self.p.out_column(self, tile) + word * 32)
        with if_(T.And(row < tile.num_rows, self.p.is_out_column(column))):
            place = self.out_base + row * self.pitch + word * 64 + lane * 4
            pairs = [load("uint32", self.outs.ptr_to([place + 16 * v]), "shared") for v in range(4)]
            row = let(tile.token_tile * THIN_TILE_M + row)
            block, word = column // K_BLOCK, column % K_BLOCK // 32
            target = columns_address(self.p.out, self.p.out_width, row, block, word, lane)
            store_vec4(target, [to_columns(pair) for pair in pairs])
            with if_(is_outside(pairs)):
                mark(self.a.ws["z_outside"], row, T.int32(1))


def has_thin_tiles(config: GemmConfig) -> bool:
    """Whether kernels of this configuration can be such: not of nvfp4, whose two scales a lane and K block take what is saved
    (gpt-oss-120b T=5 +3 %, T=16 and 64 0; Qwen3-235B T=16 -1, T=64 +1)."""
    return (config.weight_format, config.tile_m) == (WeightFormat.mxfp4, THIN_TILE_M) and config.mi == config.cluster == 1


def grouped_gemm(a, config: GemmConfig, problem) -> None:
    """Emit the kernel of a problem, one that multiplies thin tiles so where the variant has those."""
    (ThinTiles if a.has_thin_tiles else GroupedGemm)(a, config, problem).emit()
