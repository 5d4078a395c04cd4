# SPDX-License-Identifier: Apache-2.0
"""gemm1: tokens of the caller, gathered, times up and gate rows of an expert -> z [rows, I] bf16 in column order.

Fragments as in sm80/gemm1.py.
"""

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm80 import gemm1 as sm80
from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import address, assign, cast, if_, load, scalar
from tvmmoe.kernels.sm120a.gemm import GemmConfig, GroupedGemm


class Gemm1(sm80.Gemm1):
    """Rows of gemm1; the epilogue's arithmetic is that of sm90a."""

    def __init__(self, a, is_gated: bool, weight_format: WeightFormat):
        super().__init__(a, is_gated)
        self.weight_format = weight_format
        self.tokens, self.token_scales = a.hidden_states, a.hidden_states_scale
        self.token_bytes = self.k // 2 if weight_format is WeightFormat.nvfp4 else self.k
        self.out_width = a.intermediate_size

    def _column(self, c: GemmConfig, tile: Tile, smem_row):
        """z column of a row of the tile."""
        return self._position(c, tile, smem_row)

    def operand_row(self, c: GemmConfig, tile: Tile, index):
        """Row of ``hidden_states`` of a live row of the tile."""
        row = cast(tile.token_tile * c.tile_m + index, "int64")
        token = scalar("int32", T.int32(0))
        with if_(index < tile.num_rows):
            assign(token, load("int32", address(self.a.ws["row_token"], row * 4)))
        return cast(token, "int64")

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
