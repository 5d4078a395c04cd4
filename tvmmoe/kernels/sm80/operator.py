# SPDX-License-Identifier: Apache-2.0
"""The whole operator for any GPU since Ampere: Hopper's, with GEMMs on mma.sync and without programmatic launches.

Route, permute, gather, requantize, finalize, the workspace (sm90a.layout) and the calling convention are Hopper's.
"""

from dataclasses import dataclass

import tvm

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm80.gemm import GemmConfig
from tvmmoe.kernels.sm80.gemm1 import gemm1
from tvmmoe.kernels.sm80.gemm2 import gemm2
from tvmmoe.kernels.sm90a import operator as sm90a

LAUNCH_PARAMS = [name for name in sm90a.LAUNCH_PARAMS if name != "tirx.use_programtic_dependent_launch"]
# Tokens of a tile -> warps_r, warps_t, mi, ni, k_step, num_stages, warps_k; by arithmetic, not by measurement. Few tokens: 8
# warps to decode 64 rows, 2 or more CTAs an SM. Many: 32 x 64 of accumulators a warp, which re-use shared memory most.
TILES = {
    8: (4, 1, 1, 1, 256, 4, 2),
    16: (4, 1, 1, 2, 256, 3, 2),
    32: (4, 1, 2, 4, 128, 3, 1),
    64: (4, 2, 2, 4, 128, 3, 1),
    128: (4, 2, 2, 8, 128, 2, 1),
}


@dataclass(frozen=True)
class Variant(sm90a.Variant):
    """Compile-time choices of one artifact entry."""

    has_thin_tiles = False

    @property
    def ungated_gemm1(self) -> GemmConfig:
        """Any tile will do without a gate."""
        return self.gemm1


def config(weight_format: WeightFormat, tile_m: int) -> GemmConfig:
    """The configuration of both GEMMs for tiles of ``tile_m`` tokens."""
    return GemmConfig(weight_format, *TILES[tile_m])


def operator(variant: Variant) -> tvm.tirx.PrimFunc:
    """The host function of one variant."""
    return sm90a.packed_function(variant, LAUNCH_PARAMS, gemm1, gemm2)
