# SPDX-License-Identifier: Apache-2.0
"""The operator as one packed host function, by the calling convention of ``tvmmoe.abi``.

    route -> [count] -> scatter -> row_token -> gemm1 -> requantize -> gemm2 -> [finalize]    quantised activations
                                -> gather -> gemm1_bf16 -> gemm2_bf16 ->                      bf16

route, count, scatter, gather and finalize are Hopper's, which use nothing that consumer Blackwell lacks; the GEMMs of bf16
activations are those of sm80: block-scaled instructions take no bf16.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import tvm

from tvmmoe.config import ActivationFormat, WeightFormat
from tvmmoe.kernels.sm80 import operator as sm80
from tvmmoe.kernels.sm90a.call import Arguments, host_function
from tvmmoe.kernels.sm90a.finalize import finalize
from tvmmoe.kernels.sm90a.gather import gather
from tvmmoe.kernels.sm90a.permute import permute
from tvmmoe.kernels.sm90a.route import route
from tvmmoe.kernels.sm90a.trace import if_, if_else
from tvmmoe.kernels.sm120a.gemm import GemmConfig
from tvmmoe.kernels.sm120a.gemm1 import gemm1
from tvmmoe.kernels.sm120a.gemm2 import gemm2
from tvmmoe.kernels.sm120a.layout import slices
from tvmmoe.kernels.sm120a.requantize import requantize
from tvmmoe.kernels.sm120a.row_token import row_token

LAUNCH_PARAMS = ["blockIdx.x", "threadIdx.x", "tirx.use_programtic_dependent_launch", "tirx.use_dyn_shared_memory"]
# Tokens of a tile -> warps_r, warps_t, mi, ni, k_step, num_stages; by arithmetic, not by measurement. Few tokens: two CTAs
# an SM, with 16 KB of weights each on their way. Many: 32 x 64 of accumulators a warp, which re-use shared memory most.
TILES = {8: (4, 1, 1, 1, 256, 3), 32: (4, 1, 2, 4, 128, 3), 64: (4, 2, 2, 4, 128, 4), 128: (4, 2, 2, 8, 128, 3)}


def config(weight_format: WeightFormat, tile_m: int) -> GemmConfig:
    """The hand-chosen configuration of both GEMMs for tiles of ``tile_m`` tokens."""
    return GemmConfig(weight_format, *TILES[tile_m])


@dataclass(frozen=True)
class Variant:
    """Compile-time choices of one artifact entry."""

    gemm1: GemmConfig
    gemm2: GemmConfig

    def __post_init__(self) -> None:
        same = ("weight_format", "tile_m", "emulate")
        assert all(getattr(self.gemm1, name) == getattr(self.gemm2, name) for name in same), self

    @property
    def tile_m(self) -> int:
        return self.gemm1.tile_m

    @property
    def symbol(self) -> str:
        return self.gemm1.symbol

    @property
    def emulated(self) -> "Variant":
        """For GPUs without the instruction."""
        return Variant(replace(self.gemm1, emulate=True), replace(self.gemm2, emulate=True))


def operator(variant: Variant) -> tvm.tirx.PrimFunc:
    """The host function of one variant."""

    def launch(a):
        route(a)
        permute(a, variant.tile_m, variant.gemm1.width_step)
        _launch_gemms(a, variant)
        with if_(a.do_finalize != 0):
            finalize(a)

    return function_of(variant.symbol, variant.gemm1, launch)


def gemms(variant: Variant) -> tvm.tirx.PrimFunc:
    """Host function of what lies between permute and finalize."""
    return function_of(variant.symbol, variant.gemm1, lambda a: _launch_gemms(a, variant))


def function_of(
    symbol: str, c: GemmConfig, launch: Callable[[Arguments], None], launch_params: list[str] = LAUNCH_PARAMS
) -> tvm.tirx.PrimFunc:
    """:func:`host_function` of what has the format and the tile height of ``c``, any configuration of both Blackwells."""
    arguments = functools.partial(Arguments, c.tile_m, functools.partial(slices, weight_format=c.weight_format))
    return host_function(symbol, launch_params, arguments, launch)


def _launch_gemms(a: Arguments, variant: Variant) -> None:
    c = variant.gemm1

    def quantized():
        row_token(a)
        if_else(a.is_gated, lambda: gemm1(a, c, True), lambda: gemm1(a, c, False))
        requantize(a, c.weight_format, c.tile_m)
        gemm2(a, variant.gemm2)

    def bf16():
        decoded = sm80.config(c.weight_format, c.tile_m)
        gather(a, ActivationFormat.bf16)
        if_else(a.is_gated, lambda: sm80.gemm1(a, decoded, True, "_bf16"), lambda: sm80.gemm1(a, decoded, False, "_bf16"))
        sm80.gemm2(a, decoded, "_bf16")

    if_else(a.activation_format == int(ActivationFormat.bf16), bf16, quantized)
