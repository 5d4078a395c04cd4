# SPDX-License-Identifier: Apache-2.0
"""gemm2: z [rows, I] times the down projection of an expert -> gemm2_output [rows, H], bf16(s_2 (acc + bias)).

Fragment rows are neighbouring output columns. Rows of padding are not stored.
"""

from tvmmoe.kernels.sm80.gemm import GemmConfig, GroupedGemm, PermutedRows
from tvmmoe.kernels.sm80.pipeline import MmaGemm
from tvmmoe.kernels.sm90a import gemm2 as sm90a
from tvmmoe.kernels.sm90a.tile_scheduler import Tile


class Gemm2(PermutedRows, sm90a.Gemm2):
    """Rows of gemm2; the epilogue's arithmetic is that of sm90a."""

    def __init__(self, a):
        super().__init__(a)
        self.weights, self.tokens, self.token_bytes = a.gemm2_weights, self.operand, 2 * self.padded_k

    def out_column(self, gemm: MmaGemm, tile: Tile, mi: int, matrix: int):
        """First output column of an 8-column matrix of this warp."""
        return tile.row_block * gemm.c.rows + gemm.first_row + 16 * mi + 8 * matrix


def gemm2(a, config: GemmConfig, suffix: str = "") -> None:
    """Emit the kernel; ``suffix`` of its name where there is another gemm2."""
    problem = Gemm2(a)
    problem.name += suffix
    GroupedGemm(a, config, problem).emit()
