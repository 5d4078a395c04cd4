# SPDX-License-Identifier: Apache-2.0
"""The operator for quantised activations as one packed host function, by the calling convention of ``tvmmoe.abi``.

    route -> [count] -> scatter -> row_token -> gemm1 -> requantize -> gemm2 -> [finalize]

route, count, scatter and finalize are Hopper's, which use nothing that consumer Blackwell lacks. bf16 activations have no
kernel here.
"""

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I  # noqa: E741

from tvmmoe import abi
from tvmmoe.config import WeightFormat
from tvmmoe.kernels.sm90a import permute
from tvmmoe.kernels.sm90a.finalize import finalize
from tvmmoe.kernels.sm90a.layout import PAIRS_PER_CTA
from tvmmoe.kernels.sm90a.route import route
from tvmmoe.kernels.sm90a.trace import if_, if_else, kernel_names
from tvmmoe.kernels.sm120a import build
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


def config(weight_format: WeightFormat, tile_m: int, emulate: bool = False) -> GemmConfig:
    """The configuration of both GEMMs for tiles of ``tile_m`` tokens."""
    return GemmConfig(weight_format, *TILES[tile_m], emulate)


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


def _launch_gemms(a: Arguments, c: GemmConfig) -> None:
    row_token(a)
    is_gated = a.activation <= 4  # Swiglu 3, Geglu 4; Relu2 6, Identity 7
    if_else(is_gated, lambda: gemm1(a, c, True), lambda: gemm1(a, c, False))
    requantize(a, c.weight_format, c.tile_m)
    gemm2(a, c)


def operator_source(c: GemmConfig) -> str:
    """CUDA C++ of the whole operator."""

    def launch(a):
        route(a)
        with if_(a.num_tokens * a.top_k > PAIRS_PER_CTA):
            permute.count(a)
        permute.scatter(a, c.tile_m)
        _launch_gemms(a, c)
        with if_(a.do_finalize != 0):
            finalize(a)

    return _source(c, launch)


def gemms_source(c: GemmConfig) -> str:
    """CUDA C++ of what this package adds to Hopper's stages: it compiles for any GPU since sm_80."""
    return _source(c, lambda a: _launch_gemms(a, c))


def _source(c: GemmConfig, launch) -> str:
    kernel_names()
    with IRBuilder() as builder:
        with I.prim_func():
            I.func_name(c.symbol)
            I.func_attr({"global_symbol": c.symbol, "tirx.kernel_launch_params": _LAUNCH_PARAMS})
            a = Arguments(c.weight_format, c.tile_m)
            with if_(a.num_tokens > 0):
                launch(a)
    return build.cuda_source({c.symbol: builder.get()}, kernel_names())
