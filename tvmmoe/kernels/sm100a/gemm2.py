# SPDX-License-Identifier: Apache-2.0
"""gemm2: z [rows, I], requantised unless tokens are bf16, times the down projection -> gemm2_output, bf16(s_2 (acc + bias)).

Weight rows of a tile are neighbouring output columns. Rows of padding are not stored.
"""

from tvmmoe.config import ActivationFormat
from tvmmoe.kernels.sm90a.tile_scheduler import Tile
from tvmmoe.kernels.sm90a.trace import address, let, tensor_map
from tvmmoe.kernels.sm100a import descriptors as desc
from tvmmoe.kernels.sm100a.gemm import ROWS, GemmConfig, GroupedGemm
from tvmmoe.kernels.sm120a import gemm2 as sm120a


class Gemm2(sm120a.Gemm2):
    """Rows of gemm2; the arithmetic is that of sm90a."""

    is_contiguous = True  # tokens of a tile are neighbours

    def __init__(self, a, config: GemmConfig):
        super().__init__(a, config.weight_format)
        self.name = f"{self.name}_{config.activation_format.name}"
        self.token_bytes = self.k * config.token_bits // 8
        if config.activation_format is ActivationFormat.bf16:
            self.tokens = a.ws["z"]

    def weight_map(self):
        row, rows = self.k // 2, self.rows_per_expert
        dims, strides = [row, rows, self.a.local_num_experts], [row, row * rows]
        return tensor_map(address(self.weights), dims, strides, [desc.BLOCK_BYTES, ROWS, 1], "uint8", 3)

    def weight_coordinates(self, tile: Tile):
        return [let(tile.row_block * ROWS), tile.expert]


def gemm2(a, config: GemmConfig) -> None:
    """Emit the kernel."""
    GroupedGemm(a, config, Gemm2(a, config)).emit()
