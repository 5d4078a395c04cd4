# SPDX-License-Identifier: Apache-2.0
"""Main loop of both grouped GEMMs: FP4 weights times quantised tokens on block-scaled mma.sync, operands swapped.

    grid       one CTA a (tile of tile_m tokens of an expert, block of weight rows), row blocks first; CTAs past the last
               tile return
    warps      warps_r x warps_t; a warp owns mi fragments of 16 weight rows and ni of 8 tokens
    load       every thread, cp.async, num_stages - 1 steps of k_step columns ahead: weights and tokens 16 bytes at a time,
               scales in 4-byte words around bytes that start anywhere, or in one piece where rows are aligned
    multiply   ldmatrix -> registers; m16n8k64 takes both operands as they lie in memory, m16n8k32 wants an e2m1 a byte:
               weights are widened in registers, tokens split into even and odd columns to match (any order of k inside
               a scale block is right as long as both sides have it)
    store      bias, activation and scales on accumulators; bf16 through movmatrix; rows of tokens

There is no copy of weights, scales or tokens in another layout: gemm1 gathers token rows through ``row_token``.
K past the end of a row is zero on all sides: cp.async fills with zeros, also the scale bytes, which may be NaN beyond.

    shared memory of a stage (pitches keep ldmatrix, 8 rows of 16 bytes, on distinct banks)
      weights  [rows, k_step / 2 + 16]                  tokens  [tile_m, k_step / 2 + 16] or [tile_m, k_step + 32]
      scales   [rows + tile_m, 2 * k_step / block]      the second half takes the word that a misaligned row needs more

Roofline, RTX 5090 (170 SMs, 2.4 GHz, 1.79 TB/s), from data sheets and published issue rates, not measured here: one
m16n8k64 in 16 clocks a sub-core is 4096 FLOP/clk/SM, 1.67 PFLOP/s for nvfp4; m16n8k32 issues at the same rate, so mxfp8
has half. A weight byte is worth 4 * tokens FLOP, so weights bound the time below about 230 (nvfp4) or 115 (mxfp8)
tokens an expert. Shared memory, 128 B/clk/SM: a warp of 32 rows x 64 tokens reads 3 KB and multiplies 256 clocks for each
64 columns; four such warps keep it 40 % busy. The main loop of 128 x 128 nvfp4 issues 190 instructions for 32 OMMA (SASS),
512 clocks of a sub-core's tensor pipe.
"""

from dataclasses import dataclass
from typing import NamedTuple

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm90a.gemm import Tile
from tvmmoe.kernels.sm90a.intrinsics import copy_async
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
from tvmmoe.kernels.sm120a import intrinsics as isa

SMEM_BYTES = 99 * 1024  # most that a CTA may have

@dataclass(frozen=True)
class GemmConfig:
    """Compile-time choices of one GEMM kernel."""

    weight_format: WeightFormat  # and with it that of the tokens: nvfp4, or mxfp8 with mxfp4 weights
    warps_r: int  # warps along weight rows
    warps_t: int  # warps along tokens
    mi: int  # 16-row fragments a warp
    ni: int  # 8-token fragments a warp
    k_step: int  # columns of a pipeline stage: 128 or 256
    num_stages: int
    emulate: bool = False  # the mma instruction; for GPUs without it

    @property
    def symbol(self) -> str:
        """Of the operator that is made of it."""
        return f"fp4_block_scale_moe_{self.weight_format.name}_m{self.tile_m}"

    @property
    def form(self) -> isa.Form:
        return isa.NVFP4 if self.weight_format is WeightFormat.nvfp4 else isa.MXFP8

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
    def weight_bytes(self) -> int:
        """Of a weight row in one stage."""
        return self.k_step // 2

    @property
    def token_bytes(self) -> int:
        """Of a token in one stage."""
        return self.k_step // 2 if self.weight_format is WeightFormat.nvfp4 else self.k_step

    @property
    def weight_pitch(self) -> int:
        return self.weight_bytes + 16

    @property
    def token_pitch(self) -> int:
        # mxfp8 tokens are read 8 bytes a lane, 4 rows of 32 bytes at once
        return self.token_bytes + (16 if self.weight_format is WeightFormat.nvfp4 else 32)

    @property
    def scale_bytes(self) -> int:
        """Scales of a row in one stage: 4, 8 or 16 bytes."""
        return self.k_step // self.weight_format.block_size

    @property
    def stage_bytes(self) -> int:
        scales = (self.rows + self.tile_m) * 2 * self.scale_bytes
        return self.rows * self.weight_pitch + self.tile_m * self.token_pitch + scales

    @property
    def smem_bytes(self) -> int:
        """With the skews of the scale rows."""
        return self.num_stages * self.stage_bytes + 4 * (self.rows + self.tile_m)

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


class GroupedGemm:
    """Emits one kernel; ``problem`` (gemm1, gemm2) says which rows a tile has and what happens to accumulators."""

    def __init__(self, a, config: GemmConfig, problem):
        self.a, self.c, self.p = a, config, problem
        # of a stage: weights, tokens, scales of weights, then of tokens
        self.token_base = config.rows * config.weight_pitch
        self.scale_base = self.token_base + config.tile_m * config.token_pitch

    def emit(self) -> None:
        a, c, p = self.a, self.c, self.p
        row_blocks = cast(p.num_row_blocks(c), "int32")
        with kernel(p.name, cast(a.max_tiles, "int32") * row_blocks, c.threads) as thread:
            self.thread = thread
            smem = Smem()
            self.smem = smem.alloc(c.num_stages * c.stage_bytes, "uint8", 128)
            self.skews = smem.alloc(c.rows + c.tile_m, "uint32", 16)
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
        self._plan_fragments()
        cuda.cta_sync()
        self._load_skews()
        state = self.p.begin_tile(self, tile)
        stage, free = scalar("int32", T.int32(0)), scalar("int32", T.int32(c.num_stages - 1))
        with for_(self.k_steps) as step:
            ptx["cp.async.wait_group"](c.num_stages - 2)
            cuda.cta_sync()  # the stage is there for all, and all are done with the one before it, which is free now
            with if_(step + (c.num_stages - 1) < self.k_steps):
                self._load(free, let(step + (c.num_stages - 1)))
            ptx["cp.async.commit_group"]()
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

        self.pieces = [
            *self._share(c.rows, c.weight_bytes, weight_bytes, T.int32(0), c.weight_pitch, weight),
            *self._share(c.tile_m, c.token_bytes, token_bytes, T.int32(self.token_base), c.token_pitch, token),
        ]
        self._plan_scales(tile)

    def _share(self, rows: int, step_bytes: int, row_bytes, base, pitch: int, first_byte) -> list[Piece]:
        """Pieces of ``rows`` rows that begin at ``first_byte(row)`` and go to ``base + row * pitch`` of a stage."""
        per_row, result = step_bytes // 16, []
        column = let(self.thread.tid % per_row * 16)
        for start in range(0, rows, self.c.threads // per_row):
            row = let(start + self.thread.tid // per_row)
            pointer = scalar("int64", T.int64(0))
            with if_(row < rows):
                assign(pointer, first_byte(row))
            result.append(Piece(pointer, let(base + row * pitch + column), column, row_bytes, step_bytes))
        return result

    def _plan_scales(self, tile: Tile) -> None:
        """Scale rows, weights' first: pointer, offset in a stage; and the skews, which the multiplying lanes need too."""
        c, p = self.c, self.p
        row_bytes = cast(self.scale_row_bytes, "int64")
        weight_scales = let(p.scales + cast(tile.expert, "int64") * (p.rows_per_expert * row_bytes))
        misaligned = (p.scales | p.token_scales | p.k // c.weight_format.block_size) & T.int64(c.scale_bytes - 1)
        self.is_aligned = let(cast(misaligned == 0, "int32")) != 0
        self.scale_rows = []
        for start in range(0, c.rows + c.tile_m, c.threads):
            row = let(start + self.thread.tid)
            pointer = scalar("int64", T.int64(0))
            with if_(row < c.rows):
                assign(pointer, weight_scales + cast(p.row(c, tile, row), "int64") * row_bytes)
            token = let(row - c.rows)
            with if_(T.And(token >= 0, token < tile.num_rows)):
                assign(pointer, p.token_scales + p.operand_row(c, tile, token) * row_bytes)
            with if_(row < c.rows + c.tile_m):
                I.buffer_store(self.skews, cast(pointer & T.int64(3), "uint32") * u32(8), [row])
            self.scale_rows.append((pointer, let(self.scale_base + row * (2 * c.scale_bytes))))

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
        for pointer, offset in self.scale_rows:
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

    # ------------------------------------------------------------------------------------------------------ multiplying

    def _plan_fragments(self) -> None:
        """Where this lane reads its operands in a stage, and zero accumulators."""
        c, lane = self.c, self.thread.lane
        self.group, self.quad = let(lane // 4), let(lane % 4)
        warp_r, warp_t = let(self.thread.warp % c.warps_r), let(self.thread.warp // c.warps_r)
        self.first_row, self.first_token = let(warp_r * (16 * c.mi)), let(warp_t * (8 * c.ni))
        # [mi][r]: rows of this lane's accumulators
        self.rows = [[let(self.first_row + 16 * mi + 8 * r + self.group) for r in range(2)] for mi in range(c.mi)]
        # ldmatrix: lanes 0-7 give rows 0-7, lanes 8-15 rows 8-15, and again for the next 16 bytes
        self.weight_at = let((self.first_row + lane % 16) * c.weight_pitch + lane // 16 * 16)
        token = self.first_token + self.group
        if c.weight_format is WeightFormat.nvfp4:  # 4 matrices: both halves of k, then of the next 8 tokens or k
            self.token_at = let(self.token_base + (self.first_token + lane % 8) * c.token_pitch + lane // 8 * 16)
        else:
            self.token_at = let(self.token_base + token * c.token_pitch + self.quad * 8)
        # Lanes 0 and 1 of a quad supply the scales of rows g and g + 8, lane 0 those of column g; the others' are ignored.
        scale_row = self.first_row + self.group + self.quad % 2 * 8
        self.scale_row, self.scale_token = let(scale_row), let(token + c.rows)
        self.acc = [regs(4 * c.ni, "float32") for _ in range(c.mi)]
        for acc in self.acc:
            for i in range(4 * c.ni):
                store(acc, T.float32(0), i)

    def _load_skews(self) -> None:
        c = self.c
        self.weight_skews = [let(self.skews[self.scale_row + 16 * i]) for i in range(c.mi)]
        self.token_skews = [let(self.skews[self.scale_token + 8 * j]) for j in range(c.ni)]

    def _scale_words(self, base, row, skew):
        """The scales of a row in a stage, four a word."""
        c = self.c
        count = c.scale_bytes // 4
        at = let(base + self.scale_base + row * (2 * c.scale_bytes))
        words = [load("uint32", self.smem.ptr_to([at + 4 * i]), "shared") for i in range(count + 1)]
        return [isa.funnel(words[i], words[i + 1], skew) for i in range(count)]

    def _multiply(self, stage) -> None:
        c = self.c
        base = let(stage * c.stage_bytes)
        weight_scales = [self._scale_words(base, self.scale_row + 16 * i, self.weight_skews[i]) for i in range(c.mi)]
        token_scales = [self._scale_words(base, self.scale_token + 8 * j, self.token_skews[j]) for j in range(c.ni)]
        per_word = 4 // c.form.num_scales  # instructions that a word of scales serves
        for pair in range(0, c.k_step // c.form.k, 2):  # two instructions along k share loads
            weights, tokens = self._weights(base, pair), self._tokens(base, pair)
            for step in range(2):
                word, byte = (pair + step) // per_word, (pair + step) % per_word * c.form.num_scales
                for i in range(c.mi):
                    for j in range(c.ni):
                        isa.mma(
                            c.form, self.acc[i], 4 * j, weights[step][i], tokens[step][j], weight_scales[i][word],
                            token_scales[j][word], byte_id=byte, emulate=c.emulate,
                        )  # fmt: skip

    def _weights(self, base, pair: int):
        """A operands [step][mi] of two instructions along k."""
        c, result = self.c, [[], []]
        for i in range(c.mi):
            at = self.weight_at + 16 * i * c.weight_pitch
            if c.weight_format is WeightFormat.nvfp4:
                for step in range(2):
                    words = isa.load_matrices(self.smem.ptr_to([base + at + 32 * (pair + step)]))
                    result[step].append([words[n] for n in range(4)])
            else:
                words = isa.load_matrices(self.smem.ptr_to([base + at + 16 * pair]))
                for step in range(2):
                    (low, low_odd), (high, high_odd) = (isa.widen_e2m1(words[2 * step + n]) for n in range(2))
                    result[step].append([let(word) for word in (low, high, low_odd, high_odd)])
        return result

    def _tokens(self, base, pair: int):
        """B operands [step][ni] of two instructions along k."""
        c, result = self.c, [[], []]
        for j in range(c.ni):
            at = self.token_at + 8 * j * c.token_pitch
            if c.weight_format is WeightFormat.nvfp4:
                words = isa.load_matrices(self.smem.ptr_to([base + at + 32 * pair]))
                for step in range(2):
                    result[step].append([words[2 * step], words[2 * step + 1]])
            else:
                for step in range(2):
                    pair_of_words = regs(2, "uint32")
                    pointer = self.smem.ptr_to([base + at + 32 * (pair + step)])
                    ptx["ld.shared.v2.b32"](pair_of_words[0], pair_of_words[1], pointer)
                    result[step].append(isa.split_bytes(pair_of_words[0], pair_of_words[1]))
        return result

    # ---------------------------------------------------------------------------------------------------------- storing

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
                        p.value(self, state, i, matrix, [self.acc[i][4 * j + 2 * r + n] for r in range(2)], scales[n])
                        for n in range(2)
                    ]
                    packed = scalar("uint32")
                    ptx["cvt.rn.bf16x2.f32"](packed, values[1], values[0])
                    columns = isa.transpose(packed)
                    column = let(p.out_column(self, tile, i, matrix) + 2 * self.quad)
                    with if_(T.And(token < tile.num_rows, cast(column, "int64") < width)):
                        store_to("uint32", address(p.out, (row + cast(column, "int64")) * 2), columns)
