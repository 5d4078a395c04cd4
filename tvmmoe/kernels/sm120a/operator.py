# SPDX-License-Identifier: Apache-2.0
"""The operator as one packed host function, by the calling convention of ``tvmmoe.abi``.

    route -> [count] -> scatter -> row_token -> gemm1 -> requantize -> gemm2 -> [finalize]    quantised activations
                                -> gather -> gemm1_bf16 -> gemm2_bf16 ->                      bf16

route, count, scatter, gather and finalize are Hopper's, which use nothing that consumer Blackwell lacks; the GEMMs of bf16
activations are those of sm80: block-scaled instructions take no bf16.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I  # noqa: E741

from tvmmoe import abi
from tvmmoe.config import ActivationFormat, WeightFormat
from tvmmoe.kernels.sm80 import operator as sm80
from tvmmoe.kernels.sm90a import permute
from tvmmoe.kernels.sm90a.finalize import finalize
from tvmmoe.kernels.sm90a.gather import gather
from tvmmoe.kernels.sm90a.layout import PAIRS_PER_CTA
from tvmmoe.kernels.sm90a.route import route
from tvmmoe.kernels.sm90a.trace import if_, if_else
from tvmmoe.kernels.sm120a.gemm import GemmConfig
from tvmmoe.kernels.sm120a.gemm1 import gemm1
from tvmmoe.kernels.sm120a.gemm2 import gemm2
from tvmmoe.kernels.sm120a.layout import slices
from tvmmoe.kernels.sm120a.requantize import requantize
from tvmmoe.kernels.sm120a.row_token import row_token
from tvmmoe.workspace import max_num_tiles

_LAUNCH_PARAMS = ["blockIdx.x", "threadIdx.x", "tirx.use_programtic_dependent_launch", "tirx.use_dyn_shared_memory"]
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


class Arguments:
    """The entry's parameters as attributes, workspace slices as int64 addresses under ``ws``."""

    def __init__(self, weight_format: WeightFormat, tile_m: int):
        workspace = I.arg("workspace", I.buffer([tvm.tirx.Var("workspace_size", "int64")], "uint8"))
        for name in (*abi.POINTERS, *abi.INTS):
            setattr(self, name, I.arg(name, I.int64()))
        self.routed_scaling_factor = I.arg("routed_scaling_factor", I.float64())
        self.max_tiles = max_num_tiles(self.num_tokens * self.top_k, self.local_num_experts, tile_m, T.min)
        sizes = (self.num_tokens, self.top_k, self.hidden_size, self.intermediate_size, self.local_num_experts)
        pieces, _ = slices(*sizes, tile_m, weight_format, T.min)
        # TensorIR has no cast from pointer to integer; build.py defines this function.
        base = I.Bind(T.call_pure_extern("int64", "tvmmoe_address", workspace.data))
        self.ws = {name: base + piece.offset for name, piece in pieces.items()}

    def result(self, name: str):
        """Address of a result that the caller may want, or else of the workspace slice of the same name."""
        given = getattr(self, name)
        return T.Select(given == 0, self.ws[name], given)


def operator(variant: Variant) -> tvm.tirx.PrimFunc:
    """The host function of one variant."""

    def launch(a):
        route(a)
        with if_(a.num_tokens * a.top_k > PAIRS_PER_CTA):
            permute.count(a)
        permute.scatter(a, variant.tile_m)
        _launch_gemms(a, variant)
        with if_(a.do_finalize != 0):
            finalize(a)

    return host_function(variant.symbol, variant.gemm1, launch)


def gemms(variant: Variant) -> tvm.tirx.PrimFunc:
    """Host function of what lies between permute and finalize."""
    return host_function(variant.symbol, variant.gemm1, lambda a: _launch_gemms(a, variant))


def host_function(symbol: str, c: GemmConfig, launch: Callable[[Arguments], None]) -> tvm.tirx.PrimFunc:
    """A packed function that takes the operator's arguments; ``c`` has the format and the tile height of its workspace."""
    with IRBuilder() as builder:
        with I.prim_func():
            I.func_name(symbol)
            I.func_attr({"global_symbol": symbol, "tirx.kernel_launch_params": _LAUNCH_PARAMS})
            a = Arguments(c.weight_format, c.tile_m)
            with if_(a.num_tokens > 0):
                launch(a)
    return builder.get()


def _launch_gemms(a: Arguments, variant: Variant) -> None:
    c = variant.gemm1
    is_gated = a.activation <= 4  # Swiglu 3, Geglu 4; Relu2 6, Identity 7

    def quantized():
        row_token(a)
        if_else(is_gated, lambda: gemm1(a, c, True), lambda: gemm1(a, c, False))
        requantize(a, c.weight_format, c.tile_m)
        gemm2(a, variant.gemm2)

    def bf16():
        decoded = sm80.config(c.weight_format, c.tile_m)
        gather(a, ActivationFormat.bf16)
        if_else(is_gated, lambda: sm80.gemm1(a, decoded, True, "_bf16"), lambda: sm80.gemm1(a, decoded, False, "_bf16"))
        sm80.gemm2(a, decoded, "_bf16")

    if_else(a.activation_format == int(ActivationFormat.bf16), bf16, quantized)
