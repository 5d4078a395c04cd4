# SPDX-License-Identifier: Apache-2.0
"""A grouped GEMM whose tiles have a single row of tokens, multiplied as by_scale_block.py says: the two columns are windows
of its exponents. Window w = 0 has the tokens below 1, times 2^126, and w = 1 the others as they are: with every bf16 that
there is, products and sums are those of float32. A single window would lose tokens at one end of their exponents. (Weights
that overflow float32, 2 * 2^127, do not here.)

    x, z      the columns of one row after the other
    warps     16 rows and every ks-th K block each
    results   sums of a tile's rows meet in shared memory; one warp, another one each time, evaluates and stores them
"""

from dataclasses import dataclass

from tvm.script import tirx as T

from tvmmoe.config import ActivationFormat
from tvmmoe.kernels.sm90a import intrinsics as isa
from tvmmoe.kernels.sm90a.by_scale_block import ByScaleBlock, constant_bytes, sum_of_quad
from tvmmoe.kernels.sm90a.gather import pack_bf16
from tvmmoe.kernels.sm90a.gemm1 import Gemm1
from tvmmoe.kernels.sm90a.gemm2 import Gemm2
from tvmmoe.kernels.sm90a.gemm_config import BARRIER_BYTES, SMEM_BYTES, GemmConfig, SharedMemory
from tvmmoe.kernels.sm90a.layout import COLUMNS_BYTES, K_BLOCK, column_offset
from tvmmoe.kernels.sm90a.requantize import amax_bits, round_mxfp8, round_nvfp4
from tvmmoe.kernels.sm90a.tile_scheduler import RowTile
from tvmmoe.kernels.sm90a.trace import (
    Smem,
    address,
    assign,
    bits,
    cast,
    if_,
    let,
    load,
    ptx,
    regs,
    scalar,
    shuffle_xor,
    store,
    store_to,
    tensor_map,
    u32,
)  # fmt: skip

# What window 1 lacks to 2^126: a block's sum (768 at most, of infinitely large tokens) can take the first before its scale, a
# tile's the second. So nothing overflows that would not in float32, and next to nothing turns subnormal.
BEFORE_SCALE, AFTER_SUM = 2.0**118, 2.0**8


def windows_of(pair) -> tuple:
    """A pair of bf16 as the fragments' other factor: (those below 1 times 2^126, the others), zeros elsewhere."""
    is_large = let((((pair & u32(0x7FFF7FFF)) + u32(0x40804080)) >> u32(15)) & u32(0x00010001))
    large = let(is_large * u32(0xFFFF))
    small = scalar("uint32")
    ptx["mul.rn.bf16x2"](small, let(pair & ~large), u32(isa.TWO_POW_126))
    return small, let(pair & large)


class RowGemm1(Gemm1):
    """gemm1 of a gated activation, whose tiles are 32 neighbouring columns, up rows and gate rows: a scale block, so that
    activations of another ``form`` than bf16 are rounded (requantize.py) before they are stored, by the lanes of a warp."""

    def __init__(self, a, form: ActivationFormat):
        super().__init__(a, is_gated=True)
        self.form, self.operand, self.out = form, a.ws["few_x"], a.ws["few_z"]
        self.num_token_rows = a.num_tokens  # of the operand

    def row_map(self, c: GemmConfig, base, row, box_bytes: int):
        size = self.a.intermediate_size
        dims, strides = [row, size, self.a.local_num_experts * self.halves], [row, size * row]
        box = [box_bytes, self.columns(c), self.halves]
        return tensor_map(address(base), dims, strides, box, "uint8", 0, c.l2_promotion)

    def row_coordinates(self, c: GemmConfig, tile: RowTile):
        return [let(tile.row_block * self.columns(c)), let(tile.expert * self.halves)]

    def _column(self, c: GemmConfig, tile: RowTile, smem_row):
        return tile.row_block * self.columns(c) + smem_row % self.columns(c)

    def first_row(self, gemm: "SingleRow"):
        return gemm.warp4 * 8 + gemm.group

    def row_steps(self, c: GemmConfig) -> tuple[int, int]:
        return 0, self.columns(c)

    def row_modulo_8(self, gemm: "SingleRow", r: int):
        return gemm.group

    def rows_of(self, c: GemmConfig, lane) -> list:
        """The tile's rows that a lane of the finishing warp evaluates: a column's."""
        column = lane % self.columns(c)
        return [column, column + self.columns(c)]

    def store_row(self, gemm: "SingleRow", tile: RowTile, state, sums) -> None:
        """A column a lane, in both windows: lanes of columns v and v + 4 of 8 store a word each of their pair."""
        assert self.form == ActivationFormat.bf16 or self.columns(gemm.c) == 32, gemm.c  # a scale block or two
        lane = gemm.thread.lane
        value = self._rounded(*self.values(gemm, state, 0, 0, [sums], [None]))
        other = let(shuffle_xor(value, 4))
        is_first = let(cast(lane & 4, "uint32")) == u32(0)
        small, large = windows_of(pack_bf16(T.Select(is_first, value, other), T.Select(is_first, other, value)))
        column = let(self._column(gemm.c, tile, lane))
        offset = column_offset(column // 8 % 4, lane % 8 // 4, column // 32 % 4)
        place = cast(column // K_BLOCK * COLUMNS_BYTES + offset + lane % 4 * 4, "int64")
        row = cast(tile.token_tile, "int64") * (self.out_width // K_BLOCK * COLUMNS_BYTES)
        with if_(lane < self.columns(gemm.c)):
            store_to("uint32", address(self.out, row + place), T.Select(is_first, small, large))

    def _rounded(self, value):
        """To the activation format, by way of bf16."""
        values = regs(1, "float32")
        store(values, bits(let(pack_bf16(value, value) << u32(16)), "float32"), 0)
        if self.form != ActivationFormat.bf16:
            amax = amax_bits(values, 0, 1)
            for distance in (1, 2, 4, 8, 16) if self.form == ActivationFormat.mxfp8 else (1, 2, 4, 8):
                amax = let(T.max(amax, shuffle_xor(amax, distance)))
            largest = let(bits(amax, "float32"))
            (round_mxfp8 if self.form == ActivationFormat.mxfp8 else round_nvfp4)(values, range(1), largest)
        return let(values[0])


class RowGemm2(Gemm2):
    """gemm2 of what :class:`RowGemm1` stores."""

    def __init__(self, a):
        super().__init__(a)
        self.operand, self.num_token_rows = a.ws["few_z"], a.num_tokens * a.top_k

    def rows_of(self, c: GemmConfig, lane) -> list:
        """The tile's rows that a lane of the finishing warp evaluates."""
        row = 2 * (lane % (c.rows // 2))
        return [row, row + 1]

    def store_row(self, gemm: "SingleRow", tile: RowTile, state, sums) -> None:
        """Two columns a lane."""
        values = [self.values(gemm, state, 0, matrix, [sums], [None])[0] for matrix in range(2)]
        lane = gemm.thread.lane
        column = let(tile.row_block * gemm.c.rows + 2 * lane)
        with if_(T.And(lane < gemm.c.rows // 2, self.is_out_column(column))):
            place = cast(tile.row, "int64") * self.out_width + cast(column, "int64")
            store_to("uint32", address(self.out, place * 2), pack_bf16(*values))


def _in_pairs(values: list):
    """Their sum, always in the same order."""
    if len(values) == 1:
        return values[0]
    return _in_pairs([let(low + high) for low, high in zip(values[::2], values[1::2], strict=True)])


@dataclass(frozen=True)
class RowConfig(GemmConfig):
    """A warp has 16 rows and every ks-th K block."""

    @property
    def rows(self) -> int:
        return 16 * 4 * self.warpgroups // self.ks


class SingleRow(ByScaleBlock):
    """What a :class:`tvmmoe.kernels.sm90a.gemm.GroupedGemm` of such tiles does in its own way."""

    def __init__(self, a, config: GemmConfig, problem):
        super().__init__(a, config, problem)
        self.first_block, self.block_step = 1, config.ks  # so that all have some of a stage that is not full

    def _divide_memory(self, problem) -> SharedMemory:
        c = self.c
        w_block, s_stage = c.rows * K_BLOCK // 2, c.rows * c.scale_pitch
        reserved = self.reserved_bytes() + constant_bytes(c.weight_format) + 4 * self.num_sums
        free = SMEM_BYTES - BARRIER_BYTES - reserved
        stages = min(c.max_stages, free // (c.k_blocks * (COLUMNS_BYTES + w_block) + s_stage))
        return SharedMemory(COLUMNS_BYTES, w_block, s_stage, 0, 0, stages, 0)

    @property
    def num_sums(self) -> int:
        """Of two tiles, in shared memory."""
        return 2 * self.c.ks * self.c.rows

    def _allocate_results(self, smem: Smem) -> None:
        self._allocate_constants(smem)
        self.sums_of_rows = smem.alloc(self.num_sums, "float32", 128)

    def _initialize(self) -> None:
        super()._initialize()
        self._write_constants()

    # ---------------------------------------------------------------------------------------------------- producers

    def _token_maps(self, p) -> tuple:
        num_blocks, row = p.padded_k // K_BLOCK, COLUMNS_BYTES // 2
        dims, strides = [T.int64(row), num_blocks, p.num_token_rows], [T.int64(2 * row), 2 * row * num_blocks]
        return (tensor_map(address(p.operand), dims, strides, [row, self.c.k_blocks, 1], self.token_dtype, 0),)

    def _token_bytes(self, tile: RowTile):
        return T.int32(self.x_stage)

    # ---------------------------------------------------------------------------------------------------- consumers

    def _allot(self) -> None:
        super()._allot()
        row_warps = self.c.rows // 16
        self.warp4, self.k_sub = let(self.thread.warp % row_warps), let(self.thread.warp // row_warps)
        self._place_columns()

    def _allot_operands(self) -> None:
        self.sums = [regs(2, "float32") for _ in range(2)]  # [window], of this thread's rows

    def _place_rows(self) -> None:
        super()._place_rows()
        self.fragment_rows = self.rows[0]
        self.rows = [[let(row) for row in self.p.rows_of(self.c, self.thread.lane)]]

    def _compute_tile(self) -> None:
        tile = self.scheduler.tile
        state = self.p.begin_tile(self, tile, self._early_expert(tile))
        for sums in self.sums:
            for r in range(2):
                store(sums, T.float32(0), r)
        self._multiply_stages_by_warp(self._multiply_stage_by_scale_block)
        base = let(self.turn % 2 * (self.num_sums // 2))
        self._hand_over(base)
        ptx["barrier.sync.aligned"](u32(1 + self.c.warpgroups), u32(128 * self.c.warpgroups))
        with if_(self._is_my_turn()):
            rows = self.rows[0]
            parts = [[self._sum_place(base, k_sub, row) for k_sub in range(self.c.ks)] for row in rows]
            parts = [[load("float32", place, "shared") for place in places] for places in parts]
            self._store(tile, state, [let(_in_pairs(of_row)) for of_row in parts])
        assign(self.turn, self.turn + 1)

    def _is_my_turn(self):
        """Whether this warp finishes the tile."""
        return self.turn % (4 * self.c.warpgroups) == self.thread.warp

    def _store(self, tile: RowTile, state, sums) -> None:
        """By one warp."""
        self.p.store_row(self, tile, state, sums)

    def _sum_place(self, base, k_sub, row):
        return self.sums_of_rows.ptr_to([base + k_sub * self.c.rows + row])

    def _hand_over(self, base) -> None:
        """Add up windows and the scale blocks of a quad's lanes; the first two lanes store one row's sum each."""
        small, large = self.sums
        totals = [sum_of_quad(let(small[r] + large[r] * T.float32(AFTER_SUM))) for r in range(2)]
        with if_(self.quad < 2):
            is_first = self.quad == 0
            place = self._sum_place(base, self.k_sub, T.Select(is_first, *self.fragment_rows))
            ptx["st.shared.f32"](place, let(T.Select(is_first, *totals)))

    def _add(self, sums, factors) -> None:
        small, large = self.sums
        for r, factor in enumerate(factors):
            store(small, small[r] + sums[2 * r] * factor, r)
            store(large, large[r] + (sums[2 * r + 1] * T.float32(BEFORE_SCALE)) * factor, r)
