# SPDX-License-Identifier: Apache-2.0
"""The portable artifacts, one file a weight format: PTX, which the driver compiles for any newer GPU, and a cubin for sm_8x.

A cubin for sm_80 also runs on sm_86, sm_87 and sm_89, so Ampere and Ada start at once; others compile at the first call and
keep the result in the driver's cache.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tvm

from tvmmoe.config import WeightFormat
from tvmmoe.kernels import nvcc
from tvmmoe.kernels.sm80.operator import TILES, Variant, config, operator
from tvmmoe.kernels.sm80.pipeline import SMEM_BYTES


def variants(weight_format: WeightFormat) -> list[Variant]:
    """The hand-chosen variants of one weight format."""
    configs = [config(weight_format, tile_m) for tile_m in TILES]
    return [Variant(c, c) for c in configs]


def file_name(weight_format: WeightFormat) -> str:
    """Artifact of one weight format."""
    return f"moe_{weight_format.name}_sm80.so"


def cuda_source(functions: Sequence[Variant]) -> str:
    """CUDA C++ of the operators, host code included."""
    return packed_source({variant.symbol: functools.partial(operator, variant) for variant in functions})


def packed_source(makers: Mapping[str, Callable[[], tvm.tirx.PrimFunc]]) -> str:
    """CUDA C++ of packed functions by symbol."""
    limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": SMEM_BYTES}
    source = nvcc.packed_source(makers, {"arch": "sm_80", **limits})
    # Hopper's stages wait for the grids before them. Without the launch attribute they start after those anyway, and
    # sm_80 has no such instruction.
    return re.sub(r'asm volatile\("griddepcontrol[^;]*;"[^;]*;', "", source)


def compile_so(source: str, path: Path, *gencodes: str) -> str:
    """Run nvcc; returns its log. Raises RuntimeError with nvcc's message."""
    return nvcc.compile_so(source, path, *gencodes)
