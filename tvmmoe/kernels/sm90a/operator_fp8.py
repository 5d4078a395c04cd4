# SPDX-License-Identifier: Apache-2.0
"""The operator on fp8 wgmma, for mxfp8 x mxfp4 alone, as one packed host function like operator.py's.

    route -> [count] -> scatter -> gather_fp8 -> gemm1 -> requantize_fp8 -> gemm2 -> [finalize]
"""

import tvm

from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm90a.call import Arguments, host_function
from tvmmoe.kernels.sm90a.finalize import finalize
from tvmmoe.kernels.sm90a.gather_fp8 import gather_fp8
from tvmmoe.kernels.sm90a.gemm1 import Gemm1
from tvmmoe.kernels.sm90a.gemm2 import Gemm2
from tvmmoe.kernels.sm90a.gemm_config import GemmConfig
from tvmmoe.kernels.sm90a.gemm_fp8 import Fp8Gemm
from tvmmoe.kernels.sm90a.layout import slices
from tvmmoe.kernels.sm90a.operator import LAUNCH_PARAMS
from tvmmoe.kernels.sm90a.permute import permute
from tvmmoe.kernels.sm90a.requantize_fp8 import requantize_fp8
from tvmmoe.kernels.sm90a.route import route
from tvmmoe.kernels.sm90a.trace import if_, if_else

TILE_M = 128  # of those tried on the H100 the only one that wins (schedules/notes.md)
# Rows an expert from which it serves: an estimate between 32, where it is slower (gpt-oss-120b on an H200, 1191 us beside the
# exact kernels' 876), and 64, where it is faster (Qwen3-235B, 651 beside 714).
MIN_ROWS = 48.0
SYMBOL = f"fp4_block_scale_moe_mxfp4_mxfp8_m{TILE_M}"
# Two CTAs share their tokens: 3 to 6 % on an H200. The limit is power, not loads, but loads cost it too.
GEMM = GemmConfig(WeightFormat.mxfp4, TILE_M, mi=1, ks=1, warpgroups=2, k_blocks=2, cluster=2)


def operator() -> tvm.tirx.PrimFunc:
    """The host function."""
    return host_function(SYMBOL, LAUNCH_PARAMS, lambda: Arguments(TILE_M, slices), _launch_all)


def _launch_all(a: Arguments) -> None:
    route(a)
    permute(a, TILE_M, GEMM.width_step)
    gather_fp8(a)
    # What the tensor core sums is less exact: one K block in gemm1, since z is rounded to e4m3 then, and two in gemm2.
    if_else(a.is_gated, *(Fp8Gemm(a, GEMM, Gemm1(a, gated), promoted_blocks=1).emit for gated in (True, False)))
    requantize_fp8(a, TILE_M)
    Fp8Gemm(a, GEMM, Gemm2(a), promoted_blocks=2).emit()
    with if_(a.do_finalize != 0):
        finalize(a)
