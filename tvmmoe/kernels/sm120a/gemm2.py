# SPDX-License-Identifier: Apache-2.0
"""gemm2: requantised z [rows, I] times the down projection of an expert -> gemm2_output [rows, H], bf16(s_2 (acc + bias)).

Fragment rows are neighbouring output columns. Rows of padding are not stored.
"""

from tvm.script import tirx as T

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm80 import gemm2 as sm80
from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import address, assign, if_, load, scalar
from tvmmoe.kernels.sm120a.gemm import GemmConfig, GroupedGemm


class Gemm2(sm80.Gemm2):
    """Rows of gemm2; the epilogue's arithmetic is that of sm90a."""

    def __init__(self, a, weight_format: WeightFormat):
        super().__init__(a)
        self.weight_format = weight_format
        self.tokens, self.token_scales = a.ws["z_value"], a.ws["z_scale"]
        self.token_bytes = self.k // 2 if weight_format is WeightFormat.nvfp4 else self.k

    def token_scale(self, gemm: GroupedGemm, tile: Tile, index):
        """Factor of a row's accumulators, None where the format has none."""
        if self.weight_format is WeightFormat.mxfp4:
            return None
        scale = scalar("float32", T.float32(1))
        with if_(T.And(self.a.per_token_scale != 0, index < tile.num_rows)):
            row = self.operand_row(gemm.c, tile, index)
            assign(scale, load("float32", address(self.a.ws["row_scale"], row * 4)))
        return scale


def gemm2(a, config: GemmConfig) -> None:
    """Emit the kernel."""
    GroupedGemm(a, config, Gemm2(a, config.weight_format)).emit()
