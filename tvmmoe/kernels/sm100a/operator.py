# SPDX-License-Identifier: Apache-2.0
"""The operator as one packed host function, by the calling convention of ``tvmmoe.abi``.

    route -> [count] -> scatter -> row_token -> gemm1 -> [requantize] -> gemm2 -> [finalize]

Only the GEMMs are this package's. route, count, scatter and finalize are Hopper's, row_token and requantize those of
consumer Blackwell: all of them use nothing that datacenter Blackwell lacks.
"""

from dataclasses import dataclass

import tvm

from tvmmoe.config import ActivationFormat, WeightFormat
from tvmmoe.kernels.sm90a.call import Arguments
from tvmmoe.kernels.sm90a.finalize import finalize
from tvmmoe.kernels.sm90a.operator import LAUNCH_PARAMS
from tvmmoe.kernels.sm90a.permute import permute
from tvmmoe.kernels.sm90a.route import route
from tvmmoe.kernels.sm90a.trace import if_, if_else
from tvmmoe.kernels.sm100a.gemm import GemmConfig
from tvmmoe.kernels.sm100a.gemm1 import gemm1
from tvmmoe.kernels.sm100a.gemm2 import gemm2
from tvmmoe.kernels.sm120a.operator import function_of
from tvmmoe.kernels.sm120a.requantize import requantize
from tvmmoe.kernels.sm120a.row_token import row_token

# tile_m -> (k_blocks, num_stages, accumulators) of nvfp4, mxfp8 and bf16 tokens; by arithmetic, not by measurement: as many
# stages as fit, two accumulators where tensor memory has room beside the scales.
TILES = {
    8: {"nvfp4": (1, 9, 2), "mxfp8": (1, 11, 2), "bf16": (2, 4, 2)},
    32: {"nvfp4": (1, 7, 2), "mxfp8": (1, 9, 2), "bf16": (2, 4, 2)},
    128: {"nvfp4": (1, 5, 2), "mxfp8": (1, 6, 2), "bf16": (1, 5, 2)},
    256: {"nvfp4": (1, 3, 1), "mxfp8": (1, 4, 1), "bf16": (1, 3, 2)},
}


@dataclass(frozen=True)
class Variant:
    """Compile-time choices of one artifact entry; gemm1 and gemm2 have the same."""

    quantized: GemmConfig
    bf16: GemmConfig

    def __post_init__(self) -> None:
        same = ("weight_format", "tile_m")
        assert all(getattr(self.quantized, name) == getattr(self.bf16, name) for name in same), self

    @property
    def tile_m(self) -> int:
        return self.quantized.tile_m

    @property
    def symbol(self) -> str:
        return f"fp4_block_scale_moe_{self.quantized.weight_format.name}_m{self.tile_m}"


def variant(weight_format: WeightFormat, tile_m: int) -> Variant:
    """The hand-chosen variant for tiles of ``tile_m`` tokens."""
    quantized = ActivationFormat.mxfp8 if weight_format is WeightFormat.mxfp4 else ActivationFormat.nvfp4
    formats = quantized, ActivationFormat.bf16
    return Variant(*(GemmConfig(weight_format, form, tile_m, *TILES[tile_m][form.name]) for form in formats))


def _launch_gemms(a: Arguments, v: Variant) -> None:
    row_token(a)
    for c in (v.quantized, v.bf16):
        with if_(a.activation_format == int(c.activation_format)):
            if_else(a.is_gated, lambda c=c: gemm1(a, c, True), lambda c=c: gemm1(a, c, False))
            if c is v.quantized:
                requantize(a, c.weight_format, c.tile_m)
            gemm2(a, c)


def operator(v: Variant) -> tvm.tirx.PrimFunc:
    """The host function of one variant."""

    def launch(a: Arguments) -> None:
        route(a)
        permute(a, v.tile_m, v.quantized.width_step)
        _launch_gemms(a, v)
        with if_(a.do_finalize != 0):
            finalize(a)

    return function_of(v.symbol, v.quantized, launch, LAUNCH_PARAMS)


def gemms(v: Variant) -> tvm.tirx.PrimFunc:
    """The stages from row_token to gemm2 alone, for tests."""
    return function_of(v.symbol, v.quantized, lambda a: _launch_gemms(a, v), LAUNCH_PARAMS)
