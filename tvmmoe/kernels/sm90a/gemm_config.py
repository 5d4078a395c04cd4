# SPDX-License-Identifier: Apache-2.0
"""Compile-time choices of the grouped GEMMs, and how a kernel divides its shared memory by them."""

from dataclasses import dataclass
from typing import NamedTuple

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm90a.layout import K_BLOCK

NUM_CTAS = 132  # SMs of an H100 SXM or H200; fewer SMs still finish, in more than one wave
SMEM_BYTES = 227 * 1024
MAX_STAGES = 12
BARRIER_BYTES = 896  # with decode_word's factors and the ring of claimed tiles
# Token columns that a tile may multiply and load, at equal steps; the smallest have one number. For more of 256, ptxas has no
# registers and waits for every wgmma (C7512); finer ones did not pay there anyway.
WIDTHS = {
    32: range(8, 33, 8), 64: range(16, 65, 8), 96: range(48, 97, 8), 128: range(32, 129, 32), 256: range(64, 257, 32),
}  # fmt: skip


@dataclass(frozen=True)
class GemmConfig:
    """Compile-time choices of one GEMM kernel: what tuning decides (tvmmoe.tuning)."""

    weight_format: WeightFormat
    tile_m: int  # tokens of a tile, the MMA's N
    mi: int  # 64-row fragments a warpgroup
    ks: int  # warpgroups that share rows and split K
    warpgroups: int  # consumers
    k_blocks: int  # of a pipeline stage, a multiple of ks
    cluster: int = 1  # neighbouring CTAs that take neighbouring row blocks of the same tokens, loaded once for all of them
    max_stages: int = MAX_STAGES

    @property
    def is_issued_by_warp(self) -> bool:
        """Whether the TMA warp stays together and its first lane issues, instead of leaving one elected thread alone.

        ptxas then keeps the pipeline's state in uniform registers and spills nothing: 2 to 5 % faster, but as much slower
        at 8 columns (schedules/notes.md; measured with wgmma).
        """
        return self.tile_m > 8

    @property
    def multiplies_by_warp(self) -> bool:
        """Whether each warp multiplies by mma.sync, not a warpgroup by wgmma: gemm_multiply.py says why."""
        return self.tile_m == 8

    @property
    def row_groups(self) -> int:
        return self.warpgroups // self.ks

    @property
    def rows(self) -> int:
        """Weight rows of a tile."""
        return 64 * self.mi * self.row_groups

    @property
    def partial_buffers(self) -> int:
        """Warpgroups' partial sums in shared memory, for two tiles."""
        return 2 * self.row_groups * (self.ks - 1)

    @property
    def registers(self) -> tuple[int, int]:
        """Of a producer and a consumer thread, summing to what the launch allots: 384 * 168 or 640 * 96.

        More than that never arrives: setmaxnreg.inc waits for registers that the CTA does not have.
        """
        return (40, 232) if self.warpgroups == 2 else (32, 112)

    @property
    def widths(self) -> tuple[int, ...]:
        """Token columns, ascending: a tile multiplies the smallest number that holds its rows."""
        return tuple(WIDTHS.get(self.tile_m, (self.tile_m,)))

    @property
    def has_one_width(self) -> bool:
        return len(self.widths) == 1

    @property
    def width_step(self) -> int:
        """Between widths; a tile loads so many token rows or a multiple."""
        return self.tile_m if self.has_one_width else self.widths[1] - self.widths[0]

    @property
    def loads_columns_at_once(self) -> bool:
        """Whether one TMA box holds a stage's token columns: 2 to 6 % faster than one for each 128 bytes of their rows, but
        1 % slower at 8 columns (measured with wgmma)."""
        return self.tile_m > 8 and self.cluster == 1

    @property
    def scale_bytes(self) -> int:
        """Scale bytes of a row in one K block."""
        return K_BLOCK // self.weight_format.block_size

    @property
    def stage_scale_bytes(self) -> int:
        """Scale bytes of a row in one stage."""
        return self.k_blocks * self.scale_bytes

    @property
    def loads_scales_by_tma(self) -> bool:
        """Whether TMA loads a stage's scales, of at least 16 bytes a row, where rows and base are of whole 16 bytes.

        That is nvfp4, which has twice as many: Qwen3-235B-A22B at 8, 32 and 64 columns -1 to -2, -6 and -3 %, but at 16 +1.
        mxfp4 gains nothing at 8 and 16 (H200). Stages of one K block have 8 bytes: those at 96 and 256, and of an
        ungated gemm1 at 32 and 64.
        """
        return self.weight_format == WeightFormat.nvfp4 and self.tile_m != 16 and self.stage_scale_bytes % 16 == 0

    @property
    def scale_granule(self) -> int:
        """Bytes of a copy of scales, and their alignment, where rows start anywhere.

        By words three warps hardly keep up: with 8 bytes gpt-oss (rows of 90 or 180) is 3 % (mxfp4) and 7 % faster at 8
        columns, nvfp4 19 % at 16. But nvfp4 is 5 % slower at 32 (schedules/notes.md), and the longer pitch takes shared
        memory: a stage of gemm2's at 8 columns, and beside one K block a stage room of results.
        """
        no_gain = (self.weight_format, self.tile_m) == (WeightFormat.nvfp4, 32)
        return 4 if no_gain or self.k_blocks == 1 else 8

    @property
    def scale_pitch(self) -> int:
        """Bytes from a row's scales in a stage to the next one's where rows start anywhere."""
        return self.stage_scale_bytes + self.scale_granule

    @property
    def held_scale_stages(self) -> int:
        """Stages whose scales pass through registers together in gemm1, where rows and base are of whole 16 bytes (1:
        cp.async copies each stage's).

        A row of a copy is another line of L2 and another write to shared memory, of 4 bytes as of 16: 2.5 % of gemm1 at 64
        and 96 columns, nothing at 256. Rows of 4 or 8 bytes' alignment are copied in granules then: no shape of shapes.json.
        """
        return max(1, 16 // self.stage_scale_bytes) if 64 <= self.tile_m < 128 else 1

    @property
    def loads_state_early(self) -> bool:
        """Whether consumers load what the epilogue needs before the main loop: small accumulators leave registers for it (256
        columns spill it, 5 % slower), and outside of clusters GroupedGemm._early_expert keeps ptxas from waiting."""
        return self.mi * self.tile_m <= 96 and self.cluster == 1

    @property
    def is_streamed(self) -> bool:
        """Whether weights are the first to leave L2. Beside many tokens they would leave before their line is used up."""
        return self.tile_m <= 32

    @property
    def l2_promotion(self) -> int:
        """CU_TENSOR_MAP_L2_PROMOTION_256B for streamed weights, else 128B."""
        return 3 if self.is_streamed else 2

    @property
    def words_per_group(self) -> int:
        """Words of weights a fragment row that one group multiplies, of wgmma."""
        return 2 if self.tile_m * self.mi <= 16 or self.tile_m in (32, 64) else 1

    @property
    def decodes_by_multiplying(self) -> bool:
        """Which form of isa.decode_word. The shorter wins 2 to 6 %, but loses 2 % at 256 columns, at the power limit."""
        return self.tile_m < 256

    @property
    def reads_tile_again(self) -> bool:
        """Whether consumers keep what they know of a tile in shared memory during its main loop, not in registers.

        nvfp4's second set of fragments leaves few: at 16 columns 3 % faster, with mxfp4 3 % slower, at 96 slower with both;
        at 8 not compared since mma.sync.
        """
        return self.weight_format == WeightFormat.nvfp4 and self.ks > 1

    @property
    def is_overlapped(self) -> bool:
        """Whether a warpgroup decodes while its own last group multiplies, of wgmma.

        Four that own different rows overlap each other: there a second set of fragments only takes registers.
        """
        return self.warpgroups == 2 or self.ks > 1


class SharedMemory(NamedTuple):
    """How a kernel divides it."""

    x_block: int  # bytes of a K block of tokens
    w_block: int  # and of weights
    s_stage: int  # bytes of a stage's scales
    pitch: int  # bytes of a token's row of results
    partial_words: int  # of a warpgroup's partial sums
    stages: int
    chunk_m: int  # tokens whose results pass through at a time: 32, or fewer where that makes room for another stage


def shared_memory(c: GemmConfig, matrices: int, token_bytes: int = 2, reserved: int = 0) -> SharedMemory:
    """For ``matrices`` 8-column output matrices of a warp's 16 fragment rows; fewer than 2 stages cannot be built.

    ``token_bytes`` an element of the operand; ``reserved`` bytes are for other things.
    """
    x_block, w_block = c.tile_m * K_BLOCK * token_bytes, c.rows * K_BLOCK // 2
    s_stage = c.rows * c.scale_pitch
    pitch = c.mi * 32 * matrices * 2 + 16
    partial_words = c.mi * (c.tile_m // 2) * 128 if c.ks > 1 else 0
    free = SMEM_BYTES - BARRIER_BYTES - reserved - c.partial_buffers * partial_words * 4
    stage_bytes = c.k_blocks * (x_block + w_block) + s_stage
    stages, chunk_m = max(
        (min(c.max_stages, (free - m * c.warpgroups * pitch) // stage_bytes), m) for m in (8, 16, 32) if m <= c.tile_m
    )
    return SharedMemory(x_block, w_block, s_stage, pitch, partial_words, stages, chunk_m)
