# SPDX-License-Identifier: Apache-2.0
"""gemm1: tokens of the caller, gathered, times up and gate rows of an expert -> z [rows, I] bf16.

A gated 16-row fragment is 8 up rows and the gate rows of the same columns: a lane's accumulators of rows g and g + 8 are
up and gate of one column, so the epilogue needs no exchange.
"""

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm90a import gemm1 as sm90a
from tvmmoe.kernels.sm90a.gemm import Tile
from tvmmoe.kernels.sm90a.trace import address, assign, cast, if_, load, scalar
from tvmmoe.kernels.sm120a.gemm import GemmConfig, GroupedGemm


class Gemm1(sm90a.Gemm1):
    """Rows of gemm1; the epilogue's arithmetic is that of sm90a."""

    def __init__(self, a, is_gated: bool, weight_format: WeightFormat):
        self.a, self.is_gated, self.weight_format = a, is_gated, weight_format
        self.name = "gemm1_gated" if is_gated else "gemm1"
        self.halves = 2 if is_gated else 1
        self.matrices = 1 if is_gated else 2  # 8-column output matrices of 16 fragment rows
        self.k, self.rows_per_expert = a.hidden_size, self.halves * a.intermediate_size
        self.weights, self.scales = a.gemm1_weights, a.gemm1_weights_scale
        self.tokens, self.token_scales = a.hidden_states, a.hidden_states_scale
        self.token_bytes = self.k // 2 if weight_format is WeightFormat.nvfp4 else self.k
        self.out, self.out_width = a.ws["z"], a.intermediate_size

    def num_row_blocks(self, c: GemmConfig):
        return (self.rows_per_expert + c.rows - 1) // c.rows

    def _column(self, c: GemmConfig, tile: Tile, smem_row):
        """z column of a row of the tile."""
        if self.is_gated:
            return tile.row_block * (c.rows // 2) + smem_row // 16 * 8 + smem_row % 8
        return tile.row_block * c.rows + smem_row

    def row(self, c: GemmConfig, tile: Tile, smem_row):
        """Weight row in the expert, clamped into the tensor where z has no such column."""
        size = cast(self.a.intermediate_size, "int32")
        column = T.min(self._column(c, tile, smem_row), size - 1)
        return smem_row // 8 % 2 * size + column if self.is_gated else column

    def operand_row(self, c: GemmConfig, tile: Tile, index):
        """Row of ``hidden_states`` of a live row of the tile."""
        row = cast(tile.token_tile * c.tile_m + index, "int64")
        token = scalar("int32", T.int32(0))
        with if_(index < tile.num_rows):
            assign(token, load("int32", address(self.a.ws["row_token"], row * 4)))
        return cast(token, "int64")

    def out_column(self, gemm: GroupedGemm, tile: Tile, mi: int, matrix: int):
        """First z column of an 8-column matrix of this warp."""
        return self._column(gemm.c, tile, gemm.first_row + 16 * mi + 8 * matrix)

    def token_scale(self, gemm: GroupedGemm, tile: Tile, index):
        """Factor of a row's accumulators, None where the format has none."""
        if self.weight_format is WeightFormat.mxfp4:
            return None
        scale = scalar("float32", T.float32(1))
        with if_(T.And(self.a.per_token_scale != 0, index < tile.num_rows)):
            row = self.operand_row(gemm.c, tile, index)
            assign(scale, load("float32", address(self.a.per_token_scale, row * 4)))
        return scale


def gemm1(a, config: GemmConfig, is_gated: bool) -> None:
    """Emit the kernel."""
    GroupedGemm(a, config, Gemm1(a, is_gated, config.weight_format)).emit()
