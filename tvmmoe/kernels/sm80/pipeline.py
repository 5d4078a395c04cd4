# SPDX-License-Identifier: Apache-2.0
"""What the grouped GEMMs on mma.sync share, weights as a and tokens as b: loads, main loop, stores.

    grid       one CTA a (tile of tile_m tokens of an expert, block of weight rows), row blocks first; CTAs past the last
               tile return: to loop over tiles instead costs 7 to 10 % (H200), also where most CTAs are past the last
    warps      warps_r x warps_t; a warp owns mi fragments of 16 weight rows and ni of 8 tokens
    load       every thread, cp.async, num_stages - 1 steps of k_step columns ahead: weights and tokens 16 bytes at a time,
               scales in 4-byte words around bytes that start anywhere, or in one piece where rows are aligned
    multiply   a subclass's, from shared memory into accumulators; a warp all of whose tokens are padding does not
    store      bias, activation and scales on accumulators; bf16 through movmatrix; rows of tokens

K past the end of a row is zero on all sides: cp.async fills with zeros, also the scale bytes, which may be NaN beyond.

    shared memory of a stage    weights, tokens: as the subclass places them
                                scales [scale_rows, 2 * k_step / block]: the second half takes the word that a misaligned
                                row needs more
"""

from dataclasses import dataclass
from typing import NamedTuple

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm80 import intrinsics as isa
from tvmmoe.kernels.sm90a.intrinsics import copy_async
from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import (
    I,
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
    ptx,
    regs,
    scalar,
    store,
    store_to,
    u32,
)  # fmt: skip

SMEM_BYTES = 99 * 1024  # most that a CTA may have on sm_86, sm_89 and sm_120


@dataclass(frozen=True)
class MmaConfig:
    """Compile-time choices of one GEMM kernel."""

    weight_format: WeightFormat
    warps_r: int  # warps along weight rows
    warps_t: int  # warps along tokens
    mi: int  # 16-row fragments a warp
    ni: int  # 8-token fragments a warp
    k_step: int  # columns of a pipeline stage: 128 or 256
    num_stages: int

    has_token_scales = False
    ctas_per_sm = 1  # that registers must suffice for

    @property
    def symbol(self) -> str:
        """Of the operator that is made of it."""
        return f"fp4_block_scale_moe_{self.weight_format.name}_m{self.tile_m}"

    @property
    def threads(self) -> int:
        return 32 * self.warps_r * self.warps_t

    @property
    def rows(self) -> int:
        """Weight rows of a tile."""
        return 16 * self.mi * self.warps_r

    @property
    def tile_m(self) -> int:
        """Tokens of a tile."""
        return 8 * self.ni * self.warps_t

    @property
    def width_step(self) -> int:
        """Tokens that tiles' multiplications differ by: a warp's."""
        return 8 * self.ni

    @property
    def weight_bytes(self) -> int:
        """Of a weight row in one stage."""
        return self.k_step // 2

    @property
    def scale_bytes(self) -> int:
        """Scales of a row in one stage: 4, 8 or 16 bytes."""
        return self.k_step // self.weight_format.block_size

    @property
    def scale_rows(self) -> int:
        """Rows of a tile that have scales: weights, then tokens."""
        return self.rows + self.tile_m * self.has_token_scales

    @property
    def token_base(self) -> int:
        """First byte of a stage's tokens."""
        return self.rows * self.weight_pitch

    @property
    def scale_base(self) -> int:
        """First byte of a stage's scales."""
        return self.token_base + self.tile_m * self.token_pitch

    @property
    def stage_bytes(self) -> int:
        return self.scale_base + self.scale_rows * 2 * self.scale_bytes

    @property
    def smem_bytes(self) -> int:
        """With the skews of the scale rows."""
        return self.num_stages * self.stage_bytes + 4 * self.scale_rows

    def __post_init__(self) -> None:
        assert self.k_step in (128, 256) and self.num_stages >= 2, self
        assert self.smem_bytes <= SMEM_BYTES, (self.smem_bytes, self)


class Piece(NamedTuple):
    """16 bytes of a row, which a thread copies in every stage."""

    pointer: object  # the row's first byte; 0: nothing to copy
    offset: object  # in a stage
    column: object  # byte of the row, in the first stage
    row_bytes: object
    step_bytes: int


class MmaGemm:
    """Emits one kernel; ``problem`` (gemm1, gemm2) says which rows a tile has and what happens to accumulators.

    A subclass has ``weight_place(row, column)``, where a byte of a weight row goes in a stage, ``_plan_fragments()`` and
    ``_multiply(stage)``.
    """

    def __init__(self, a, config: MmaConfig, problem):
        self.a, self.c, self.p = a, config, problem

    def emit(self) -> None:
        a, c, p = self.a, self.c, self.p
        row_blocks = cast(p.num_row_blocks(c), "int32")
        with kernel(p.name, cast(a.max_tiles, "int32") * row_blocks, c.threads, c.ctas_per_sm) as thread:
            self.thread = thread
            smem = Smem()
            self.smem = smem.alloc(c.num_stages * c.stage_bytes, "uint8", 128)
            self.skews = smem.alloc(c.scale_rows, "uint32", 16)
            smem.commit()
            isa.grid_dependency()
            token_tile, row_block = let(thread.cta // row_blocks), let(thread.cta % row_blocks)
            with if_(token_tile < load("int32", address(a.ws["num_tiles"]))):
                offset = let(cast(token_tile, "int64") * 4)
                expert, num_rows = (load("int32", address(a.ws[name], offset)) for name in ("tile_expert", "tile_rows"))
                self._tile(Tile(token_tile, row_block, expert, num_rows))

    def _tile(self, tile: Tile) -> None:
        c = self.c
        self.k_steps = let(cast((self.p.k + c.k_step - 1) // c.k_step, "int32"))
        self._plan_loads(tile)
        for step in range(c.num_stages - 1):
            with if_(T.int32(step) < self.k_steps):
                self._load(T.int32(step), T.int32(step))
            ptx["cp.async.commit_group"]()
        self._plan_accumulators(tile)
        cuda.cta_sync()  # the skews are there
        self._plan_fragments()
        state = self.p.begin_tile(self, tile, cast(tile.expert, "int64"))
        stage, free = scalar("int32", T.int32(0)), scalar("int32", T.int32(c.num_stages - 1))
        with for_(self.k_steps) as step:
            ptx["cp.async.wait_group"](c.num_stages - 2)
            cuda.cta_sync()  # the stage is there for all, and all are done with the one before it, which is free now
            with if_(step + (c.num_stages - 1) < self.k_steps):
                self._load(free, let(step + (c.num_stages - 1)))
            ptx["cp.async.commit_group"]()
            with if_(self.live > 0):
                self._multiply(stage)
            assign(free, stage)
            assign(stage, T.Select(stage == c.num_stages - 1, T.int32(0), stage + 1))
        self._store(tile, state)

    # ---------------------------------------------------------------------------------------------------------- loading

    def _plan_loads(self, tile: Tile) -> None:
        """This thread's share of every stage."""
        c, p = self.c, self.p
        weights = let(p.weights + cast(tile.expert, "int64") * (p.rows_per_expert * (p.k // 2)))
        weight_bytes, token_bytes = let(cast(p.k // 2, "int32")), let(cast(p.token_bytes, "int32"))
        self.scale_row_bytes = let(cast(p.k // c.weight_format.block_size, "int32"))

        def weight(row):
            return weights + cast(p.row(c, tile, row), "int64") * cast(weight_bytes, "int64")

        def token(row):
            address_of_row = p.tokens + p.operand_row(c, tile, row) * cast(token_bytes, "int64")
            return T.Select(row < tile.num_rows, address_of_row, T.int64(0))

        def token_place(row, column):
            return c.token_base + row * c.token_pitch + column

        self.pieces = [
            *self._share(c.rows, c.weight_bytes, weight_bytes, self.weight_place, weight),
            *self._share(c.tile_m, c.token_bytes, token_bytes, token_place, token),
        ]
        self._plan_scales(tile)

    def _share(self, rows: int, step_bytes: int, row_bytes, place, first_byte) -> list[Piece]:
        """Pieces of ``rows`` rows that begin at ``first_byte(row)`` and go to ``place(row, column)`` of a stage."""
        per_row, result = step_bytes // 16, []
        column = let(self.thread.tid % per_row * 16)
        for start in range(0, rows, self.c.threads // per_row):
            row = let(start + self.thread.tid // per_row)
            pointer = scalar("int64", T.int64(0))
            with if_(row < rows):
                assign(pointer, first_byte(row))
            result.append(Piece(pointer, let(place(row, column)), column, row_bytes, step_bytes))
        return result

    def _plan_scales(self, tile: Tile) -> None:
        """Scale rows, weights' first: pointer, offset in a stage; and the skews, which the multiplying lanes need too."""
        c, p = self.c, self.p
        row_bytes = cast(self.scale_row_bytes, "int64")
        weight_scales = let(p.scales + cast(tile.expert, "int64") * (p.rows_per_expert * row_bytes))
        start = p.scales | p.token_scales if c.has_token_scales else p.scales
        misaligned = (start | p.k // c.weight_format.block_size) & T.int64(c.scale_bytes - 1)
        self.is_aligned = let(cast(misaligned == 0, "int32")) != 0
        self.scale_pieces = []
        for start in range(0, c.scale_rows, c.threads):
            row = let(start + self.thread.tid)
            pointer = scalar("int64", T.int64(0))
            with if_(row < c.rows):
                assign(pointer, weight_scales + cast(p.row(c, tile, row), "int64") * row_bytes)
            if c.has_token_scales:
                token = let(row - c.rows)
                with if_(T.And(token >= 0, token < tile.num_rows)):
                    assign(pointer, p.token_scales + p.operand_row(c, tile, token) * row_bytes)
            with if_(row < c.scale_rows):
                I.buffer_store(self.skews, cast(pointer & T.int64(3), "uint32") * u32(8), [row])
            self.scale_pieces.append((pointer, let(c.scale_base + row * (2 * c.scale_bytes))))

    def _load(self, stage, step) -> None:
        """Request step ``step`` into stage ``stage``; what ends inside it is zero after the end."""
        c = self.c
        base = let(stage * c.stage_bytes)
        for piece in self.pieces:
            with if_(piece.pointer != 0):
                at = let(step * piece.step_bytes + piece.column)
                size = T.Select(at < piece.row_bytes, T.int32(16), T.int32(0))
                source = address(piece.pointer, cast(at, "int64"))
                copy_async(self.smem.ptr_to([base + piece.offset]), source, 16, size)
        at = let(step * c.scale_bytes)
        left = let(self.scale_row_bytes - at)
        for pointer, offset in self.scale_pieces:
            with if_(pointer != 0):
                self._load_scales(let(base + offset), let(pointer + cast(at, "int64")), left)

    def _load_scales(self, offset, source, left) -> None:
        """One row's scales of a step, ``left`` bytes of them before the row ends."""
        size = self.c.scale_bytes

        def in_one_piece():
            copy_async(self.smem.ptr_to([offset]), address(source), size, T.max(T.min(left, T.int32(size)), T.int32(0)))

        def in_words():
            skew = let(cast(source & T.int64(3), "int32"))
            for word in range(0, size + 4, 4):
                inside = T.max(T.min(left + skew - word, T.int32(4)), T.int32(0))
                copy_async(self.smem.ptr_to([offset + word]), address(source - cast(skew, "int64"), word), 4, inside)

        if_else(self.is_aligned, in_one_piece, in_words)

    # ---------------------------------------------------------------------------------------------------- accumulators

    def _plan_accumulators(self, tile: Tile) -> None:
        """Where this lane's accumulators are in the tile, and zeros in them; how many of its warp's tokens are live."""
        c, thread = self.c, self.thread
        self.group, self.quad = let(thread.lane // 4), let(thread.lane % 4)
        warp_r, warp_t = let(thread.warp % c.warps_r), let(thread.warp // c.warps_r % c.warps_t)
        self.first_row, self.first_token = let(warp_r * (16 * c.mi)), let(warp_t * (8 * c.ni))
        self.live = let(tile.num_rows - self.first_token)  # or less than one
        # [mi][r]: rows of this lane's accumulators
        self.rows = [[let(self.first_row + 16 * mi + 8 * r + self.group) for r in range(2)] for mi in range(c.mi)]
        self.acc = [regs(4 * c.ni, "float32") for _ in range(c.mi)]
        for acc in self.acc:
            for i in range(4 * c.ni):
                store(acc, T.float32(0), i)

    def _store(self, tile: Tile, state) -> None:
        """Accumulators -> problem's values -> bf16, 8 tokens x 8 columns at a time."""
        c, p = self.c, self.p
        width = cast(p.out_width, "int64")
        for j in range(c.ni):
            scales = [p.token_scale(self, tile, self.first_token + 8 * j + 2 * self.quad + i) for i in range(2)]
            token = let(self.first_token + 8 * j + self.group)  # after the transposition
            row = let(cast(tile.token_tile * c.tile_m + token, "int64") * width)
            for i in range(c.mi):
                for matrix in range(p.matrices):
                    values = [
                        p.values(self, state, i, matrix, [[self.acc[i][4 * j + 2 * r + n] for r in range(2)]], [scales[n]])[0]
                        for n in range(2)
                    ]
                    packed = scalar("uint32")
                    ptx["cvt.rn.bf16x2.f32"](packed, values[1], values[0])
                    columns = isa.transpose(packed)
                    column = let(p.out_column(self, tile, i, matrix) + 2 * self.quad)
                    with if_(T.And(token < tile.num_rows, cast(column, "int64") < width)):
                        store_to("uint32", address(p.out, (row + cast(column, "int64")) * 2), columns)
