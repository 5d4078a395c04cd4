# SPDX-License-Identifier: Apache-2.0
"""gemm2: z [rows, I] times the down projection of an expert -> gemm2_output [rows, H], bf16(s_2 * (acc + bias)).

Tiles, roles and pipeline as in gemm.py; fragment rows are neighbouring output columns. Rows of padding are not stored.
"""

from tvm.script import tirx as T

from tvmmoe.kernels.sm90a.gemm import GroupedGemm
from tvmmoe.kernels.sm90a.gemm_config import GemmConfig
from tvmmoe.kernels.sm90a.layout import padded
from tvmmoe.kernels.sm90a.thin_tiles import grouped_gemm
from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import address, assign, cast, if_, let, load, scalar, tensor_map


class Gemm2:
    """Rows and epilogue of gemm2 for :class:`GroupedGemm`."""

    operand_scales = "z_scale"  # slice of an fp8 operand's scale bytes, on Hopper
    number = 1  # of the GEMM
    knows_tiles = True  # and so loads weights while gemm1 is still running
    matrices = 2  # 8-column output matrices of a warp's 16 fragment rows

    def __init__(self, a, is_short: bool = False):
        self.a = a
        self.name = "gemm2_short" if is_short else "gemm2"
        self.k, self.padded_k, self.operand = a.intermediate_size, padded(a.intermediate_size), a.ws["z"]
        self.weights, self.scales = a.gemm2_weights, a.gemm2_weights_scale
        self.rows_per_expert = a.hidden_size
        self.out, self.out_width = a.result("gemm2_output"), a.hidden_size

    def num_row_blocks(self, c: GemmConfig):
        return (self.rows_per_expert + c.rows - 1) // c.rows

    def row_map(self, c: GemmConfig, base, row, box_bytes: int):
        """Tensor map of a tile's rows in weights or their scales, of ``row`` bytes each."""
        dims = [row, self.rows_per_expert, self.a.local_num_experts]
        strides = [row, row * self.rows_per_expert]
        return tensor_map(address(base), dims, strides, [box_bytes, c.rows, 1], "uint8", 0, c.l2_promotion)

    def row_coordinates(self, c: GemmConfig, tile: Tile):
        return [let(tile.row_block * c.rows), tile.expert]

    def row(self, c: GemmConfig, tile: Tile, smem_row):
        """Weight row in the expert, clamped into the tensor."""
        return T.min(tile.row_block * c.rows + smem_row, cast(self.rows_per_expert, "int32") - 1)

    def first_row(self, gemm: GroupedGemm):
        return gemm.fragment(0) * 64 + gemm.warp4 * 16 + gemm.group

    def row_steps(self, c: GemmConfig) -> tuple[int, int]:
        return 64, 8

    def row_modulo_8(self, gemm: GroupedGemm, r: int):
        return gemm.group

    def begin_tile(self, gemm: GroupedGemm, tile: Tile, expert):
        """Factor of the int64 ``expert`` and this thread's biases."""
        a = self.a
        factor = scalar("float32", T.float32(1))
        with if_(a.output2_scale_scalar != 0):
            assign(factor, load("float32", address(a.output2_scale_scalar, expert * 4)))
        biases = []
        for smem_row in (row for pair in gemm.rows for row in pair):
            bias = scalar("float32", T.float32(0))
            with if_(a.gemm2_bias != 0):
                index = expert * self.rows_per_expert + cast(self.row(gemm.c, tile, smem_row), "int64")
                assign(bias, load("float32", address(a.gemm2_bias, index * 4)))
            biases.append(bias)
        return factor, biases

    def values(self, gemm: GroupedGemm, state, mi: int, matrix: int, accumulators, token_scales) -> list:
        """Outputs of one row and some tokens from their accumulators."""
        factor, biases = state
        sums = [
            acc[matrix] if scale is None else acc[matrix] * scale
            for acc, scale in zip(accumulators, token_scales, strict=True)
        ]
        return [let(factor * (total + biases[2 * mi + matrix])) for total in sums]

    def out_column(self, gemm: GroupedGemm, tile: Tile):
        """First output column of the warpgroup's part of the tile."""
        return tile.row_block * gemm.c.rows + gemm.row_group * gemm.out_columns

    def is_out_column(self, column):
        return column < cast(self.rows_per_expert, "int32")


def gemm2(a, config: GemmConfig, is_short: bool = False) -> None:
    """Emit the kernel; ``is_short``: that of few columns, beside the other."""
    grouped_gemm(a, config, Gemm2(a, is_short))
