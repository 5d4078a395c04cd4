# SPDX-License-Identifier: Apache-2.0
"""The whole operator as one packed host function that launches its kernels on the current stream.

    route -> [count] -> scatter -> gather -> gemm1 -> [requantize] -> gemm2 -> [finalize]
    route -> arrange ---------------------^    for up to 2048 (token, slot) pairs
    prologue -----------------------------^    for a few tokens
    prepare -> routing, gemm1 and gemm2 as one kernel (gemm_pair) -> [finalize]    for most calls of up to four tokens

The calling convention is ``tvmmoe.abi``. The host function encodes the tensor maps, picks kernels by host values
(activation format, gated or not, one chunk of pairs or more) and launches: no allocation, no synchronisation, no read
of device memory. The caller zeroes ``gemm2_output`` when it asks for it: only live rows are written.
Every kernel waits for the grids before it (griddepcontrol.wait) and lets the next one start its prologue at once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import tvm

from tvmmoe.config import ActivationFormat, WeightFormat
from tvmmoe.kernels.sm90a import prologue
from tvmmoe.kernels.sm90a.call import Arguments, host_function
from tvmmoe.kernels.sm90a.few_tokens import prepare
from tvmmoe.kernels.sm90a.finalize import finalize
from tvmmoe.kernels.sm90a.gather import gather
from tvmmoe.kernels.sm90a.gemm1 import gemm1
from tvmmoe.kernels.sm90a.gemm2 import gemm2
from tvmmoe.kernels.sm90a.gemm_config import GemmConfig
from tvmmoe.kernels.sm90a.gemm_pair import gemm_pair, is_served
from tvmmoe.kernels.sm90a.layout import slices
from tvmmoe.kernels.sm90a.permute import permute
from tvmmoe.kernels.sm90a.requantize import requantize
from tvmmoe.kernels.sm90a.route import route
from tvmmoe.kernels.sm90a.single_row import RowConfig
from tvmmoe.kernels.sm90a.thin_tiles import has_thin_tiles
from tvmmoe.kernels.sm90a.trace import if_, if_else

# Each for the kernels that have it.
LAUNCH_PARAMS = [
    "clusterCtaIdx.x", "blockIdx.x", "threadIdx.x", "tirx.use_programtic_dependent_launch", "tirx.use_dyn_shared_memory",
]  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """Compile-time choices of one artifact entry."""

    gemm1: GemmConfig
    gemm2: GemmConfig
    gemm2_short: GemmConfig | None = None  # for I up to SHORT_K, if another serves those

    def __post_init__(self) -> None:
        others = [c for c in (self.gemm2, self.gemm2_short) if c is not None]
        same = ("weight_format", "tile_m")
        assert all(getattr(self.gemm1, name) == getattr(c, name) for name in same for c in others), self

    @property
    def tile_m(self) -> int:
        return self.gemm1.tile_m

    @property
    def meets_few_tokens(self) -> bool:
        """Whether calls of a few tokens may come here."""
        return self.tile_m == min(TILES)

    @property
    def has_thin_tiles(self) -> bool:
        """Whether its GEMMs multiply tiles of one or two rows in a way of their own (thin_tiles.py)."""
        gemms = self.gemm1, self.ungated_gemm1, self.gemm2, self.gemm2_short or self.gemm2
        return all(map(has_thin_tiles, gemms))

    @property
    def symbol(self) -> str:
        return f"fp4_block_scale_moe_{self.gemm1.weight_format.name}_m{self.tile_m}"

    @property
    def ungated_gemm1(self) -> GemmConfig:
        """Without a gate a tile of gemm1 has at most one 128-block of z rows."""
        config = self.gemm1
        return config if config.rows <= 128 else replace(config, mi=1, ks=1, warpgroups=2, k_blocks=1)

    @property
    def gemm_pair(self) -> GemmConfig:
        """64 rows a tile: few tokens have few tiles. Of 32 there would be more (one of 32 local experts: T=1 -4 %), but every
        tile has an end (Qwen3-235B +10 %). Two K blocks a warp and stage: one is decoded while the other is multiplied."""
        return RowConfig(self.gemm1.weight_format, self.tile_m, mi=1, ks=4, warpgroups=4, k_blocks=8)


# tile_m: (mi, ks, warpgroups, k_blocks, cluster). Up to 96 decoding is the limit and more warps win; at 256 tokens are most
# of what L2 has to deliver, and a cluster asks for them once. Which tile serves which load is measured
# (schedules/sm90a/crossovers.json).
TILES = {
    8: (1, 2, 4, 4, 1), 16: (1, 2, 4, 4, 1), 32: (1, 1, 4, 2, 1), 64: (1, 1, 4, 2, 1), 96: (1, 1, 4, 1, 1),
    256: (1, 1, 2, 1, 2),
}  # fmt: skip
# gemm2 over at most SHORT_K columns, where a stage of four K blocks, or its last one, is mostly empty.
SHORT_TILES = {8: (1, 1, 4, 2, 1), 16: (1, 1, 4, 2, 1)}
SHORT_K = 1024


def hand_chosen(weight_format: WeightFormat, tile_m: int, is_short: bool = False) -> GemmConfig:
    """Configuration of a GEMM for tiles of ``tile_m`` tokens; ``is_short``: of gemm2 over at most SHORT_K columns."""
    return GemmConfig(weight_format, tile_m, *(TILES | SHORT_TILES if is_short else TILES)[tile_m])


def _activation_formats(weight_format: WeightFormat) -> tuple[ActivationFormat, ...]:
    quantized = ActivationFormat.mxfp8 if weight_format == WeightFormat.mxfp4 else ActivationFormat.nvfp4
    return ActivationFormat.bf16, quantized


def operator(variant: Variant) -> tvm.tirx.PrimFunc:
    """The host function of one variant."""
    return packed_function(variant, LAUNCH_PARAMS, gemm1, gemm2, gemm_pair)


def packed_function(
    variant: Variant, launch_params: list[str], gemm1: Callable, gemm2: Callable, gemm_pair: Callable | None = None
) -> tvm.tirx.PrimFunc:
    """The host function with these GEMMs: ``gemm1(a, config, is_gated)`` and ``gemm2(a, config)`` emit them,
    ``gemm_pair(a, config, activation_format)`` routing and both at once for what gemm_pair.is_served says."""
    if not variant.meets_few_tokens:
        gemm_pair = None
    arguments = functools.partial(Arguments, variant.tile_m, slices, variant.has_thin_tiles)
    return host_function(
        variant.symbol, launch_params, arguments, lambda a: _launch_all(a, variant, gemm1, gemm2, gemm_pair))


def _launch_all(
    a: Arguments, variant: Variant, gemm1: Callable, gemm2: Callable, gemm_pair: Callable | None
) -> None:
    formats = _activation_formats(variant.gemm1.weight_format)

    def by_format(emit):
        for form in formats:
            with if_(a.activation_format == int(form)):
                emit(form)

    def place_and_gather():
        permute(a, variant.tile_m, variant.gemm1.width_step)
        by_format(lambda form: gather(a, form))

    def by_stages():
        route(a)
        arrange = functools.partial(prologue.arrange, a, tile_m=variant.tile_m, step=variant.gemm1.width_step)
        if_else(prologue.is_medium(a), lambda: by_format(lambda form: arrange(form=form)), place_and_gather)

    def apart():
        if variant.meets_few_tokens:
            begin = functools.partial(prologue.prologue, a, tile_m=variant.tile_m, step=variant.gemm1.width_step)
            if_else(prologue.is_small(a), lambda: by_format(lambda form: begin(form=form)), by_stages)
        else:
            by_stages()
        _launch_gemms(a, variant, gemm1, gemm2)

    def together(form: ActivationFormat):
        prepare(a, form)
        gemm_pair(a, variant.gemm_pair, form)

    if gemm_pair is not None:
        if_else(is_served(a), lambda: by_format(together), apart)
    else:
        apart()
    with if_(a.do_finalize != 0):
        finalize(a, waits_for_results=gemm_pair is not None)


def _launch_gemms(a: Arguments, variant: Variant, gemm1: Callable, gemm2: Callable) -> None:
    """One after the other."""
    if_else(
        a.is_gated,
        lambda: gemm1(a, variant.gemm1, True),
        lambda: gemm1(a, variant.ungated_gemm1, False),
    )
    quantized = _activation_formats(variant.gemm1.weight_format)[1]
    with if_(a.activation_format == int(quantized)):
        if quantized == ActivationFormat.mxfp8:
            requantize(a, quantized, False, variant.tile_m)
        else:
            if_else(
                a.per_token_scale != 0,
                lambda: requantize(a, quantized, True, variant.tile_m),
                lambda: requantize(a, quantized, False, variant.tile_m),
            )
    if variant.gemm2_short is None:
        gemm2(a, variant.gemm2)
    else:
        is_short = a.intermediate_size <= SHORT_K
        if_else(is_short, lambda: gemm2(a, variant.gemm2_short, True), lambda: gemm2(a, variant.gemm2))
