# SPDX-License-Identifier: Apache-2.0
"""gemm1: x [rows, H] times up and gate rows of an expert -> z [rows, I] in the K order of gemm2.

A gated 16-row fragment is 8 up rows and the gate rows of the same columns: a lane's accumulators of rows g and g + 8 are
up and gate of one column, so the epilogue needs no exchange. Eight fragment rows are 8 neighbouring positions of z, and so
16 bytes of a token's row; any weight row can be any fragment row, because rows are copied one by one.
"""

from tvm.script import tirx as T

from tvmmoe.kernels.sm80.gemm import GemmConfig, GroupedGemm, PermutedRows
from tvmmoe.kernels.sm80.pipeline import MmaConfig, MmaGemm
from tvmmoe.kernels.sm90a import gemm1 as sm90a
from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import cast


def column_of(position):
    """Column at a position of z: layout.k_of_position as an expression."""
    s, g = position // 8 % 16, position % 8
    return position // 128 * 128 + 32 * (g // 2) + 8 * (s // 4) + s % 4 + 4 * (g % 2)


class Gemm1(PermutedRows, sm90a.Gemm1):
    """Rows of gemm1; the epilogue's arithmetic is that of sm90a."""

    def __init__(self, a, is_gated: bool):
        super().__init__(a, is_gated)
        self.weights, self.tokens, self.token_bytes = a.gemm1_weights, self.operand, 2 * self.padded_k

    def num_row_blocks(self, c: MmaConfig):
        return (self.halves * self.out_width + c.rows - 1) // c.rows

    def _position(self, c: MmaConfig, tile: Tile, smem_row):
        """Where in a row of z the result of a weight row goes."""
        if self.is_gated:
            return tile.row_block * (c.rows // 2) + smem_row // 16 * 8 + smem_row % 8
        return tile.row_block * c.rows + smem_row

    def _column(self, c: MmaConfig, tile: Tile, smem_row):
        """z column of a row of the tile."""
        return column_of(self._position(c, tile, smem_row))

    def row(self, c: MmaConfig, tile: Tile, smem_row):
        """Weight row in the expert, clamped into the tensor where z has no such column."""
        size = cast(self.a.intermediate_size, "int32")
        column = T.min(self._column(c, tile, smem_row), size - 1)
        return smem_row // 8 % 2 * size + column if self.is_gated else column

    def out_column(self, gemm: MmaGemm, tile: Tile, mi: int, matrix: int):
        """First position in z of an 8-column matrix of this warp."""
        return self._position(gemm.c, tile, gemm.first_row + 16 * mi + 8 * matrix)


def gemm1(a, config: GemmConfig, is_gated: bool, suffix: str = "") -> None:
    """Emit the kernel; ``suffix`` of its name where there is another gemm1."""
    problem = Gemm1(a, is_gated)
    problem.name += suffix
    GroupedGemm(a, config, problem).emit()
