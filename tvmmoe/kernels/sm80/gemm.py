# SPDX-License-Identifier: Apache-2.0
"""Main loop of both grouped GEMMs: FP4 weights decoded to bf16 in registers times bf16 tokens on mma.sync m16n8k16.

Grid, loads and stores are those of pipeline.py. Weights lie as in memory and nothing is shuffled: the k index of an MMA
is a dummy, so lane q of a quad owns columns 32q .. 32q + 31 of a 128-block, 16 bytes a row in one load, and tokens are
rows in the K order of sm90a/layout.py, whose positions are those of ldmatrix fragments. A word of weights makes the a
operands of two MMAs (intrinsics.spread_e2m1), an ldmatrix of four matrices the b operands of the same two.

    warps    warps_k of them share rows and tokens and split the K blocks of a stage; their sums meet in shared memory in
             a fixed order. Few tokens make few tiles: more warps are what hides the latency of loads and of decoding.

    shared memory of a stage    weights [k_step / 128, rows, 64]    tokens [tile_m, 2 * k_step + 16]
        a quarter warp's 16-byte loads are 2 rows of 64 bytes, ldmatrix's 8 rows are 16 bytes apart modulo 128: no bank twice

Roofline from data sheets, not measured here. An MMA is 4096 FLOP: 8 clocks of a sub-core's tensor pipe on A100 (108 SMs,
1.41 GHz: 312 TFLOP/s), 32 on RTX 4090 (128 SMs, 2.52 GHz: 165 TFLOP/s with fp32 sums). A weight byte is worth 4 * tokens
FLOP, so at 2.04 TB/s (A100 80GB) weights bound the time below 38 tokens an expert, at 1.01 TB/s (RTX 4090) below 41.
Decoding a word of 8 values is 8 LOP3, 7 shifts and 4 FMA (SASS). For two k16 steps of 32 x 64 (mi = 2, ni = 8) a lane has 4
words: 76 issue slots of decoding, 8 ldmatrix and 32 MMAs, which take the tensor pipe 256 clocks on A100 and 1024 on RTX
4090: the pipe is the limit. For one fragment of tokens a warp decodes 256 values in some 30 slots, 34 values a clock of an SM
with all four sub-cores busy; DRAM brings 27 (A100: 13.4 bytes a clock of an SM) or 6 (RTX 4090).
"""

from dataclasses import dataclass

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm80 import intrinsics as isa
from tvmmoe.kernels.sm80.pipeline import MmaConfig, MmaGemm
from tvmmoe.kernels.sm90a.intrinsics import NVFP4_SHIFT, TWO_POW_126, any_large
from tvmmoe.kernels.sm90a.layout import K_BLOCK
from tvmmoe.kernels.sm90a.trace import (
    address,
    assign,
    cast,
    cuda,
    if_,
    if_else,
    let,
    load,
    load_vec4,
    ptx,
    scalar,
    store,
    u32,
)  # fmt: skip

_BLOCK_BYTES = K_BLOCK // 2  # of a weight row


@dataclass(frozen=True)
class GemmConfig(MmaConfig):
    """Compile-time choices of one GEMM kernel."""

    warps_k: int = 1  # warps that share a tile's rows and tokens and split its K blocks

    @property
    def threads(self) -> int:
        return super().threads * self.warps_k

    @property
    def ctas_per_sm(self) -> int:
        """That registers must suffice for: 2 where 128 of them hold the accumulators, at 256 threads."""
        return 2 if self.mi * self.ni <= 8 else 1

    @property
    def k_blocks(self) -> int:
        """Of a stage, a warp."""
        return self.k_step // K_BLOCK // self.warps_k

    @property
    def width_step(self) -> int:
        """Of many tokens half a warp's: _multiply_live."""
        return 8 * self.ni if self.ni < 4 else 4 * self.ni

    @property
    def weight_pitch(self) -> int:
        return self.weight_bytes

    @property
    def token_bytes(self) -> int:
        """Of a token in one stage."""
        return 2 * self.k_step

    @property
    def token_pitch(self) -> int:
        return self.token_bytes + 16

    @property
    def partial_bytes(self) -> int:
        """One warp's sums."""
        return 4 * self.mi * self.ni * 32 * 4

    def __post_init__(self) -> None:
        super().__post_init__()
        partial = (self.warps_k - 1) * self.warps_r * self.warps_t * self.partial_bytes
        assert self.k_blocks >= 1 and partial <= self.num_stages * self.stage_bytes, self


class GroupedGemm(MmaGemm):
    """Operands in shared memory -> accumulators."""

    def weight_place(self, row, column):
        """Where a byte of a weight row goes in a stage."""
        return column // _BLOCK_BYTES * (self.c.rows * _BLOCK_BYTES) + row * _BLOCK_BYTES + column % _BLOCK_BYTES

    def _plan_fragments(self) -> None:
        """Where this lane reads its operands in a stage."""
        c, lane = self.c, self.thread.lane
        self.warp_k = let(self.thread.warp // (c.warps_r * c.warps_t))
        block = let(self.warp_k * c.k_blocks)
        row = self.first_row + self.group
        self.weight_at = let(block * (c.rows * _BLOCK_BYTES) + row * _BLOCK_BYTES + self.quad * 16)
        # ldmatrix: 8 tokens by 4 times 8 positions, the b operands of two MMAs
        token = self.first_token + lane % 8
        self.token_at = let(c.token_base + token * c.token_pitch + lane // 8 * 16 + block * (2 * K_BLOCK))
        self.block_scales = K_BLOCK // c.weight_format.block_size
        first = block * self.block_scales + self.quad * (self.block_scales // 4)
        self.scale_at = [
            let(c.scale_base + row * (2 * c.scale_bytes) + first + cast(self.skews[row] >> u32(3), "int32"))
            for pair in self.rows for row in pair
        ]  # fmt: skip

    def _multiply(self, stage) -> None:
        c = self.c
        base = let(stage * c.stage_bytes)
        for block in range(c.k_blocks):
            scales = self._load_scale_bytes(let(base + block * self.block_scales))
            first = base + self.weight_at + block * (c.rows * _BLOCK_BYTES)
            rows = [16 * i + 8 * r for i in range(c.mi) for r in range(2)]
            words = [load_vec4(self.smem.ptr_to([first + row * _BLOCK_BYTES]), "shared") for row in rows]
            tokens = let(base + self.token_at + block * (2 * K_BLOCK))
            if c.weight_format is WeightFormat.nvfp4:
                halves = [isa.e4m3_multipliers(pair) for pair in scales]
                self._multiply_live(words, tokens, lambda row, word, halves=halves: [halves[row][word // 2]])
            else:
                self._multiply_mxfp4(words, tokens, scales)

    def _load_scale_bytes(self, base):
        """uint32 per row of this lane: the scales of its 32 columns, one byte or two."""
        if self.c.weight_format is WeightFormat.mxfp4:
            return [load("uint8", self.smem.ptr_to([base + at]), "shared") for at in self.scale_at]
        pairs = [load("uint16", self.smem.ptr_to([base + at]), "shared") for at in self.scale_at]
        return [let(cast(pair, "uint32")) for pair in pairs]

    def _multiply_mxfp4(self, words, tokens, scales) -> None:
        def once():
            factors = [let(byte * u32(0x00800080) + u32((126 << 7) * 0x10001)) for byte in scales]
            self._multiply_live(words, tokens, lambda row, _: [factors[row]])

        def twice():  # b = 0 is the subnormal 2^-127, b = 255 is NaN
            nan = [((byte + u32(1)) >> u32(8)) * u32(0x007F007F) for byte in scales]
            factors = [let(T.max(b * u32(0x00800080), u32(0x00400040)) + n) for b, n in zip(scales, nan, strict=True)]
            self._multiply_words(words, tokens, lambda row, _: [u32(TWO_POW_126), factors[row]], self.c.ni)

        if_else(any_large(scales), twice, once)

    def _multiply_live(self, words, tokens, factors) -> None:
        """One K block of all tokens of the warp, or of the first half of them if no others are live."""
        ni = self.c.ni

        def multiply(count: int):
            self._multiply_words(words, tokens, factors, count)

        if ni < 4:
            multiply(ni)
        else:
            if_else(self.live > 4 * ni, lambda: multiply(ni), lambda: multiply(ni // 2))

    def _multiply_words(self, words, tokens, factors, ni: int) -> None:
        """One K block, 8 MMA steps; ``factors(row, word)`` are what a word of a row of this lane is multiplied by."""
        c = self.c
        for word in range(4):
            if word > 0 and c.mi * c.ni >= 8:
                cuda.warp_sync()  # or else ptxas loads the tokens of all words at once, and spills
            a = [self._decode([words[2 * i + r][word] for r in range(2)], 2 * i, word, factors) for i in range(c.mi)]
            for j in range(ni):
                b = isa.load_matrices(self.smem.ptr_to([tokens + 8 * j * c.token_pitch + 64 * word]))
                for step in range(2):
                    for i in range(c.mi):
                        isa.mma(self.acc[i], 4 * j, a[i][step], [b[2 * step], b[2 * step + 1]])

    def _decode(self, words, first_row: int, word: int, factors):
        """a operands of two MMAs from the words of rows g and g + 8."""
        pairs = []
        for r in range(2):
            row = isa.spread_e2m1(words[r])
            for factor in factors(first_row + r, word):
                row = [isa.multiply_pairs(pair, factor) for pair in row]
            pairs.append(row)
        return [[pairs[r][2 * step + half] for half in range(2) for r in range(2)] for step in range(2)]

    def _store(self, tile, state) -> None:
        c = self.c
        if c.warps_k == 1:
            super()._store(tile, state)
            return
        warps = c.warps_r * c.warps_t
        accumulators = [(acc, i) for acc in self.acc for i in range(4 * c.ni)]
        first = let(self.thread.warp % warps * c.partial_bytes + self.thread.lane * 4)
        cuda.cta_sync()  # stages are free for sums
        with if_(self.warp_k > 0):
            mine = let(first + (self.warp_k - 1) * (warps * c.partial_bytes))
            for index, (acc, i) in enumerate(accumulators):
                ptx["st.shared.f32"](self.smem.ptr_to([mine + index * 128]), acc[i])
        cuda.cta_sync()
        with if_(self.warp_k == 0):
            for other in range(c.warps_k - 1):
                for index, (acc, i) in enumerate(accumulators):
                    pointer = self.smem.ptr_to([first + other * (warps * c.partial_bytes) + index * 128])
                    store(acc, acc[i] + load("float32", pointer, "shared"), i)
            super()._store(tile, state)


class PermutedRows:
    """Tokens of a problem that are rows of the workspace, in the order of tiles and in K order."""

    def operand_row(self, c: GemmConfig, tile, index):
        """Row of the operand of a row of the tile."""
        return cast(tile.token_tile * c.tile_m + index, "int64")

    def token_scale(self, gemm: GroupedGemm, tile, index):
        """Factor of a row's accumulators: per-token scale and the decode's 2^NVFP4_SHIFT; None: 1."""
        if gemm.c.weight_format is WeightFormat.mxfp4:
            return None
        scale = scalar("float32", T.float32(2.0**NVFP4_SHIFT))
        with if_(T.And(self.a.per_token_scale != 0, index < tile.num_rows)):
            row = cast(tile.token_tile * gemm.c.tile_m + index, "int64")
            assign(scale, load("float32", address(self.a.ws["row_scale"], row * 4)) * T.float32(2.0**NVFP4_SHIFT))
        return scale
