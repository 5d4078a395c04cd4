# SPDX-License-Identifier: Apache-2.0
"""gemm1: tokens of the caller, gathered, times up and gate rows of an expert -> z [rows, I] bf16.

Rows and epilogue are those of sm120a: of 16 weight rows of a gated tile 8 are up rows and 8 the gate rows of the same
columns, and tcgen05.ld.16x256b gives a thread the accumulators of rows g and g + 8 as mma.sync does. TMA fetches these
rows with a 5-D view of the weights, [K/2, 8 columns, half, I/8, expert].
"""

from tvm.script import tirx as T

from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import address, let, tensor_map
from tvmmoe.kernels.sm100a import descriptors as desc
from tvmmoe.kernels.sm100a.gemm import ROWS, GemmConfig, GroupedGemm
from tvmmoe.kernels.sm120a import gemm1 as sm120a


class Gemm1(sm120a.Gemm1):
    """Rows of gemm1."""

    is_contiguous = False  # tokens are gathered

    def __init__(self, a, config: GemmConfig, is_gated: bool):
        super().__init__(a, is_gated, config.weight_format)
        self.name = f"{self.name}_{config.activation_format.name}"
        self.token_bytes = self.k * config.token_bits // 8

    def weight_map(self):
        size, row, experts = self.a.intermediate_size, self.k // 2, self.a.local_num_experts
        if self.is_gated:
            dims = [row, T.int64(8), T.int64(2), size // 8, experts]
            strides, box = [row, size * row, 8 * row, 2 * size * row], [desc.BLOCK_BYTES, 8, 2, ROWS // 16, 1]
        else:
            dims, strides, box = [row, size, experts], [row, size * row], [desc.BLOCK_BYTES, ROWS, 1]
        return tensor_map(address(self.weights), dims, strides, box, "uint8", 3)

    def weight_coordinates(self, tile: Tile):
        if self.is_gated:
            return [T.int32(0), T.int32(0), let(tile.row_block * (ROWS // 16)), tile.expert]
        return [let(tile.row_block * ROWS), tile.expert]


def gemm1(a, config: GemmConfig, is_gated: bool) -> None:
    """Emit the kernel."""
    GroupedGemm(a, config, Gemm1(a, config, is_gated)).emit()
