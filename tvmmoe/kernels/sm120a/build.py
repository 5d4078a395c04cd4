# SPDX-License-Identifier: Apache-2.0
"""The consumer Blackwell artifacts: one file a weight format, with the instructions, or emulated for other GPUs.

The same functions are compiled twice: for sm_120a with the instructions, and with ``emulate`` for any GPU since sm_80,
which is how they run where no Blackwell is at hand.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tvm

from tvmmoe.config import WeightFormat
from tvmmoe.kernels import nvcc
from tvmmoe.kernels.sm80.pipeline import SMEM_BYTES
from tvmmoe.kernels.sm120a.operator import TILES, Variant, config, operator

NATIVE = "arch=compute_120a,code=sm_120a"
GB10 = "arch=compute_121a,code=sm_121a"  # the same instructions, another chip (DGX Spark)
EMULATED = "arch=compute_80,code=[sm_80,sm_90]"
EMULATED_SM90 = "arch=compute_90,code=sm_90"  # with programmatic dependent launch, which Hopper's stages use


def variants(weight_format: WeightFormat) -> list[Variant]:
    """The hand-chosen variants of one weight format."""
    configs = [config(weight_format, tile_m) for tile_m in TILES]
    return [Variant(c, c) for c in configs]


def file_name(weight_format: WeightFormat) -> str:
    """Artifact of one weight format."""
    return f"moe_{weight_format.name}_sm120a.so"


def cuda_source(functions: Sequence[Variant]) -> str:
    """CUDA C++ of the operators, host code included."""
    return packed_source({variant.symbol: functools.partial(operator, variant) for variant in functions})


def packed_source(makers: Mapping[str, Callable[[], tvm.tirx.PrimFunc]], pipeline: str = "tirx") -> str:
    """CUDA C++ of packed functions by symbol; ``pipeline`` is s_tir for scheduled blocks."""
    target = {"arch": "sm_120a", "max_threads_per_block": 1024, "max_shared_memory_per_block": SMEM_BYTES}
    return nvcc.packed_source(makers, target, pipeline=pipeline)


def compile_so(source: str, path: Path, *gencodes: str) -> str:
    """Run nvcc; returns its log. Raises RuntimeError with nvcc's message."""
    return nvcc.compile_so(source, path, *gencodes)
