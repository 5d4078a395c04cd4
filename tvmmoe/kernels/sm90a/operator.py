# SPDX-License-Identifier: Apache-2.0
"""The whole operator as one packed host function that launches its kernels on the current stream.

    route -> [count] -> scatter -> gather -> gemm1 -> [requantize] -> gemm2 -> [finalize]
    prologue ------------------------^    for a few tokens

mxfp8 activations have variants of their own from a load on where fp8 wgmma pays (gemm_fp8.py), with gather_fp8 and
requantize_fp8; below, the bf16 kernels decode them.

The calling convention is ``tvmmoe.abi``. The host function encodes the tensor maps, picks kernels by host values
(activation format, gated or not, one chunk of pairs or more) and launches: no allocation, no synchronisation, no read
of device memory. The caller zeroes ``gemm2_output`` when it asks for it: only live rows are written.
Every kernel waits for the grids before it (griddepcontrol.wait) and lets the next one start its prologue at once.
"""

from dataclasses import dataclass, replace

import tvm
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as I  # noqa: E741

from tvmmoe import abi
from tvmmoe.config import ActivationFormat, WeightFormat
from tvmmoe.kernels.sm90a import permute, prologue
from tvmmoe.kernels.sm90a.finalize import finalize
from tvmmoe.kernels.sm90a.gather import gather
from tvmmoe.kernels.sm90a.gather_fp8 import gather_fp8
from tvmmoe.kernels.sm90a.gemm import GemmConfig, GroupedGemm
from tvmmoe.kernels.sm90a.gemm1 import Gemm1
from tvmmoe.kernels.sm90a.gemm2 import Gemm2
from tvmmoe.kernels.sm90a.gemm_fp8 import Fp8Gemm
from tvmmoe.kernels.sm90a.layout import PAIRS_PER_CTA, slices
from tvmmoe.kernels.sm90a.requantize import requantize
from tvmmoe.kernels.sm90a.requantize_fp8 import requantize_fp8
from tvmmoe.kernels.sm90a.route import route
from tvmmoe.kernels.sm90a.trace import if_, if_else
from tvmmoe.workspace import max_num_tiles

LAUNCH_PARAMS = ["blockIdx.x", "threadIdx.x", "tirx.use_programtic_dependent_launch", "tirx.use_dyn_shared_memory"]


@dataclass(frozen=True)
class Variant:
    """Compile-time choices of one artifact entry."""

    gemm1: GemmConfig
    gemm2: GemmConfig
    is_fp8: bool = False  # mxfp8 x mxfp4 on fp8 wgmma, and nothing else

    def __post_init__(self) -> None:
        same = ("weight_format", "tile_m")
        assert all(getattr(self.gemm1, name) == getattr(self.gemm2, name) for name in same), self

    @property
    def tile_m(self) -> int:
        return self.gemm1.tile_m

    @property
    def symbol(self) -> str:
        formats = self.gemm1.weight_format.name + "_mxfp8" * self.is_fp8
        return f"fp4_block_scale_moe_{formats}_m{self.tile_m}"

    @property
    def activation_formats(self) -> tuple[ActivationFormat, ...]:
        if self.is_fp8:
            return (ActivationFormat.mxfp8,)
        is_mx = self.gemm1.weight_format == WeightFormat.mxfp4
        return ActivationFormat.bf16, ActivationFormat.mxfp8 if is_mx else ActivationFormat.nvfp4

    @property
    def ungated_gemm1(self) -> GemmConfig:
        """Without a gate a tile of gemm1 has at most one 128-block of z rows."""
        config = self.gemm1
        return config if config.rows <= 128 else replace(config, mi=1, ks=1, warpgroups=2, k_blocks=1)


# tile_m: (mi, ks, warpgroups, k_blocks). Up to 96 decoding is the limit and more warps win; which tile serves which load
# is measured (schedules/sm90a/crossovers.json).
TILES = {8: (1, 4, 4, 4), 16: (1, 2, 4, 4), 32: (1, 2, 4, 2), 64: (1, 1, 4, 1), 96: (1, 1, 4, 1), 256: (1, 1, 2, 1)}

# On fp8 wgmma, (mi, ks, warpgroups, k_blocks) of gemm1 and gemm2; k_blocks is also how often sums are promoted.
TILES_FP8 = {
    64: ((1, 1, 2, 1), (1, 1, 2, 2)),
    128: ((1, 1, 2, 1), (1, 1, 2, 2)),
    192: ((1, 1, 2, 1), (1, 1, 2, 2)),
}


class Arguments:
    """The entry's parameters as attributes, workspace slices as int64 addresses under ``ws``."""

    def __init__(self, tile_m: int):
        workspace = I.arg("workspace", I.buffer([tvm.tirx.Var("workspace_size", "int64")], "uint8"))
        for name in (*abi.POINTERS, *abi.INTS):
            setattr(self, name, I.arg(name, I.int64()))
        self.routed_scaling_factor = I.arg("routed_scaling_factor", I.float64())
        self.max_tiles = max_num_tiles(self.num_tokens * self.top_k, self.local_num_experts, tile_m, T.min)
        pieces, _ = slices(self.num_tokens, self.top_k, self.hidden_size, self.intermediate_size,
                           self.local_num_experts, tile_m, T.min)  # fmt: skip
        # TensorIR has no cast from pointer to integer; build.py defines this function.
        base = I.Bind(T.call_pure_extern("int64", "tvmmoe_address", workspace.data))
        self.ws = {name: base + piece.offset for name, piece in pieces.items()}

    def result(self, name: str):
        """Address of a result that the caller may want, or else of the workspace slice of the same name."""
        given = getattr(self, name)
        return T.Select(given == 0, self.ws[name], given)


def operator(variant: Variant) -> tvm.tirx.PrimFunc:
    """The host function of one variant."""
    with IRBuilder() as builder:
        with I.prim_func():
            I.func_name(variant.symbol)
            I.func_attr({"global_symbol": variant.symbol, "tirx.kernel_launch_params": LAUNCH_PARAMS})
            a = Arguments(variant.tile_m)
            with if_(a.num_tokens > 0):
                _launch_all(a, variant)
    return builder.get()


def _launch_all(a: Arguments, variant: Variant) -> None:
    formats = variant.activation_formats

    def by_format(emit):
        for form in formats:
            with if_(a.activation_format == int(form)):
                emit(form)

    def three_kernels():
        route(a)
        with if_(a.num_tokens * a.top_k > PAIRS_PER_CTA):
            permute.count(a)
        permute.scatter(a, variant.tile_m)
        if variant.is_fp8:
            gather_fp8(a)
        else:
            by_format(lambda form: gather(a, form))

    if variant.tile_m == min(TILES) and not variant.is_fp8:  # other tiles hardly meet so few tokens
        if_else(prologue.is_small(a), lambda: by_format(lambda f: prologue.prologue(a, f, variant.tile_m)), three_kernels)
    else:
        three_kernels()
    is_gated = a.activation <= 4  # Swiglu 3, Geglu 4; Relu2 6, Identity 7
    Gemm = Fp8Gemm if variant.is_fp8 else GroupedGemm
    if_else(
        is_gated,
        lambda: Gemm(a, variant.gemm1, Gemm1(a, True)).emit(),
        lambda: Gemm(a, variant.ungated_gemm1, Gemm1(a, False)).emit(),
    )
    if variant.is_fp8:
        requantize_fp8(a, variant.tile_m)
    else:
        with if_(a.activation_format == int(formats[1])):
            _requantize_in_place(a, formats[1], variant.tile_m)
    Gemm(a, variant.gemm2, Gemm2(a)).emit()
    with if_(a.do_finalize != 0):
        finalize(a)


def _requantize_in_place(a: Arguments, form: ActivationFormat, tile_m: int) -> None:
    if form == ActivationFormat.mxfp8:
        requantize(a, form, False, tile_m)
    else:
        if_else(
            a.per_token_scale != 0,
            lambda: requantize(a, form, True, tile_m),
            lambda: requantize(a, form, False, tile_m),
        )
